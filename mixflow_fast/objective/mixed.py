"""A batch's noise end from a mixed source: draws, predictor, interpolation (see `flow.source`)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.flow.source import MixedSource, StandardSource, kl_per_sample
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.interpolate import draw_times, interpolate
from mixflow_fast.kernels.mixed_source import (
    mix_and_interpolate,
    mix_and_interpolate_reference,
)
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype
from mixflow_fast.objective.draws import draw_noise, drop_weights


@dataclass(frozen=True)
class SourceDraw:
    """What a mixed source gave for a batch: float32, float64 for float64 data, with its graph.

    Attributes:
        mean, log_var: (B, ...) of q(x0 | kappa); the log-variance is clamped.
        w: (B,) weight of q in the mixture with N(0, I).
        kl: (B,) KL divergence of q from N(0, I), unmixed, summed over the elements.
        kl_weight: factor of `kl` in the loss of a sample, beta = lam / D; 0 for a frozen source.
    """

    mean: Tensor
    log_var: Tensor
    w: Tensor
    kl: Tensor
    kl_weight: float


def check_source(source: object, schedule: Schedule, prediction: str) -> MixedSource | None:
    """The mixed source, or None for N(0, I).

    Raises:
        ValueError: what is no source, or a prediction that it has no meaning for.
    """
    if source is None or isinstance(source, StandardSource):
        return None
    if not isinstance(source, MixedSource):
        raise ValueError(
            "source must be None or StandardSource() for N(0, I), or a MixedSource of "
            f"mixflow_fast.flow.source, got {source!r}"
        )
    if prediction == "score":
        raise ValueError(
            'prediction="score" has no meaning for a mixed source: the noise that the loss takes '
            'for the score is not that of N(0, I). Use prediction="velocity"'
        )
    if (schedule.gamma or schedule.interval == "full") and not source.frozen:
        warnings.warn(
            f"a mixed source is trained with slowed times (gamma={schedule.gamma:g}), which reward "
            "it for shortening x1 - x0 whether or not paths cross: train network and source with "
            'gamma=0, timesteps="uniform" first, then freeze the source '
            "(predictor.requires_grad_(False)) and go on with slowed times",
            stacklevel=3,
        )
    return source


def check_labels(y: object, like: Tensor) -> Tensor:
    """(B,) int64 classes for a source that is conditioned on them."""
    if not isinstance(y, Tensor):
        raise ValueError(
            f'a source with kappa="class" needs y, the (B,) = ({len(like)},) classes of x1, as an '
            f"integer tensor: got {type(y).__name__}. Pass prepare(..., y=y), labels that were not "
            "dropped"
        )
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    if y.shape != like.shape[:1] or not whole or y.device != like.device:
        raise ValueError(
            f"y must be (B,) = ({len(like)},) integers on {like.device}, the classes that the "
            f"source is conditioned on, got {tuple(y.shape)} {y.dtype} on {y.device}"
        )
    return y.to(torch.int64)


def draw_weight(source: MixedSource, seed: Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """(B,) float32 weights w of the mixture."""
    if isinstance(source.w, float):
        return torch.full(ids.shape, source.w, device=ids.device)
    if source.discrete:
        # Every k of 0..n is as likely as the next, both ends included: w = 1 is trained.
        k = (philox.random_words(seed, stream, ids)[:, 0] * (source.discrete + 1)) >> 32
        return k.to(torch.float32) / source.discrete
    return philox.uniform(seed, stream, ids)[:, 0]


def mixed_times(
    schedule: Schedule,
    path: str,
    like: Tensor,
    seed: Tensor,
    ids: Tensor,
    t: Tensor | None,
    slowed_t: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """(B,) new tensors of the times t and m that plain MixFlow draws for the data `like`.

    impl: "triton" or "reference".
    """
    if impl == "triton":
        # One launch for both, with the bits of the kernel that draws them beside the data.
        nothing = like.new_zeros((len(like), 1))
        _, t, slowed_t = interpolate(
            nothing, schedule, path, seed, ids, nothing, t, slowed_t, impl=impl
        )
        return t, slowed_t
    t, slowed_t = draw_times(schedule, seed, ids, t, slowed_t)
    return t.clone(), slowed_t.clone()


def mixed_interpolation(
    source: MixedSource,
    x1: Tensor,
    y: Tensor | None,
    seed: Tensor,
    ids: Tensor,
    slowed_t: Tensor,
    *,
    clock: str,
    path: str,
    patch_size: int,
    dtype: torch.dtype,
    impl: str,
) -> tuple[Tensor, Tensor, SourceDraw]:
    """The network's input, the noise end (B, ...), and what the source gave.

    Args:
        x1: (B, ...) data; a posterior's sample where there are moments.
        y: (B,) int64 classes, or None.
        seed, ids: of the draws.
        slowed_t: (B,) times m in the caller's clock.
        clock, path, patch_size, dtype: of the input, as `MixFlow.prepare`.
        impl: "triton" or "reference".
    """
    z = draw_noise(seed, ids, x1, impl, Stream.SOURCE_SIGNAL) if source.needs_noise else None
    mean, log_var = source.moments(x1.shape, x1=x1, y=y, z=z, dtype=compute_dtype(x1))
    w = draw_weight(source, seed, ids, Stream.SOURCE_WEIGHT).to(mean.dtype)
    w = drop_weights(w, source.dropout, seed, ids)
    path_mean, path_log_var = mean, log_var
    if source.detach:
        path_mean, path_log_var = mean.detach(), log_var.detach()
    options = dict(clock=clock, path=path, mode=source.mode, patch_size=patch_size, dtype=dtype)
    if impl == "triton":
        x, x0, kl = mix_and_interpolate(
            x1, path_mean, path_log_var, w, slowed_t, seed, ids, impl=impl, **options
        )
    else:
        # Not by the operator, which has no second derivatives.
        x, x0, kl = mix_and_interpolate_reference(
            x1, path_mean, path_log_var, w, slowed_t, seed, ids, **options
        )
    if source.detach:
        kl = kl_per_sample(mean, log_var)
    _, beta = source.weights(x1.shape[1:].numel())
    return x, x0, SourceDraw(mean, log_var, w, kl, 0.0 if source.frozen else beta)
