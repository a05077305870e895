"""A batch's noise end from a mixed source: draws, predictor, interpolation (see `flow.source`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.flow.source import MixedSource, StandardSource, kl_per_sample
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate import draw_times, interpolate
from mixflow_fast.kernels.mixed_source import (
    mix_and_interpolate,
    mix_and_interpolate_reference,
)
from mixflow_fast.kernels.mixed_source.weights import draw_weight
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype
from mixflow_fast.objective.draws import draw_noise, drop_weights


@dataclass(frozen=True)
class SourceDraw:
    """What a mixed source gave for a batch: float32, float64 for float64 data, with its graph.

    Attributes:
        w: (B,) weight of q in the mixture with N(0, I).
        kl: (B,) KL divergence of q from N(0, I), unmixed, summed over the elements.
        kl_weight: factor of `kl` in the loss of a sample, beta = lam / D; 0 for a frozen source.
    """

    w: Tensor
    kl: Tensor
    kl_weight: float
    _moments: Callable[[], tuple[Tensor, Tensor]]

    @property
    def mean(self) -> Tensor:
        """(B, ...) mean of q(x0 | kappa)."""
        return self._moments()[0]

    @property
    def log_var(self) -> Tensor:
        """(B, ...) log-variance of q, clamped; kernels do not store it, each look makes it."""
        return self._moments()[1]


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
    compute = compute_dtype(x1)
    mean, log_var = source.predict(x1.shape, x1=x1, y=y, z=z, dtype=compute)
    w = draw_weight(source, seed, ids, Stream.SOURCE_WEIGHT, impl).to(compute)
    w = drop_weights(w, source.dropout, seed, ids)
    options = dict(clock=clock, path=path, mode=source.mode, patch_size=patch_size, dtype=dtype)
    if impl == "triton" and not source.detach:
        mean, log_var = (
            v if v is None or v.dtype in runtime.KERNEL_DTYPES else v.to(compute)
            for v in (mean, log_var)
        )
        options.update(log_var_range=source.log_var_range, impl=impl)
        x, x0, kl = mix_and_interpolate(x1, mean, log_var, w, slowed_t, seed, ids, **options)
        moments = partial(source.bounded, mean, log_var, compute)
    else:
        mean, log_var = source.bounded(mean, log_var, compute)
        moments = partial(_pair, mean, log_var)
        path_mean, path_log_var = mean, log_var
        if source.detach:
            path_mean, path_log_var = mean.detach(), log_var.detach()
        # Not by the operator, which has no second derivatives.
        mixing = partial(mix_and_interpolate, impl=impl)
        mixing = mixing if impl == "triton" else mix_and_interpolate_reference
        x, x0, kl = mixing(x1, path_mean, path_log_var, w, slowed_t, seed, ids, **options)
        kl = kl_per_sample(mean, log_var) if source.detach else kl
    return x, x0, SourceDraw(w, kl, source.kl_weight(x1.shape[1:].numel()), moments)


def _pair(mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
    return mean, log_var
