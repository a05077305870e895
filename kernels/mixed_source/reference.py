"""The noise end of a mixed source and the interpolation with it, in plain differentiable PyTorch.

    mode "moments":  x0 = w mean + sqrt((1 - w) + w exp(log_var)) eps
    mode "samples":  x0 = w (mean + exp(log_var / 2) eps1) + (1 - w) eps
    x_m = alpha_m x1 + sigma_m x0
    kl  = 1/2 sum(mean^2 + exp(log_var) - 1 - log_var)          of the unmixed source

Noise is a function of (seed, ids): eps of `Stream.NOISE`, the noise of plain MixFlow, so that w = 0
gives its bits; eps1 of `Stream.SOURCE_NOISE`. The sum under the root has two positive terms and
keeps its digits where the variance is small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.clock import engine_times
from mixflow_fast.flow.path import get_path, per_sample
from mixflow_fast.flow.source import (
    bounded_log_var,
    halves,
    kl_per_sample,
    mixed_moments,
    mixed_samples,
)
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.layout import from_tokens, to_tokens
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype


def mix_and_interpolate_reference(
    x1: Tensor,
    mean: Tensor,
    log_var: Tensor,
    w: Tensor,
    slowed_t: Tensor,
    seed: int | Tensor,
    ids: Tensor | None,
    *,
    clock: str,
    path: str,
    mode: str,
    eps: Tensor | None = None,
    eps1: Tensor | None = None,
    patch_size: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_m, x0, kl), with gradients to mean and log_var.

    Args:
        x1: (B, ...) data in float32, bf16, fp16 or float64.
        mean, log_var: (B, ...) of the unmixed source, log_var within its bounds.
        w: (B,) weight of the source in [0, 1].
        slowed_t: (B,) times m in the caller's clock.
        seed, ids: of the draws; not read where eps (and eps1 in mode "samples") is given.
        clock, path: as `MixFlow`'s.
        mode: "moments" or "samples".
        eps, eps1: (B, ...) noise; None is drawn.
        patch_size: p writes x_m as (B, H/p W/p, p p C) tokens.
        dtype: of x_m; None is that of x1.

    Returns:
        x_m in `dtype`; x0 (B, ...) and kl (B,) in float32, or float64 for float64 data.
    """
    compute = compute_dtype(x1)
    mean, log_var, w = mean.to(compute), log_var.to(compute), w.to(compute)
    if eps is None:
        eps = _normal(x1, seed, Stream.NOISE, ids)
    if mode == "moments":
        mixed_mean, std = mixed_moments(mean, log_var, w)
        x0 = mixed_mean + std * eps.to(compute)
    else:
        if eps1 is None:
            eps1 = _normal(x1, seed, Stream.SOURCE_NOISE, ids)
        x0 = mixed_samples(mean, log_var, w, eps.to(compute), eps1.to(compute))
    times = engine_times(slowed_t.to(compute), clock)
    x = get_path(path).interpolate(x1.to(compute), x0, *times).to(dtype or x1.dtype)
    return to_tokens(x, patch_size) if patch_size else x, x0, kl_per_sample(mean, log_var)


def source_backward_reference(
    grad_x: Tensor | None,
    grad_x0: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: int | Tensor,
    ids: Tensor | None,
    eps: Tensor | None,
    *,
    clock: str,
    path: str,
    mode: str,
    patch_size: int,
    low: float,
    high: float,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of mean and log_var in closed form: an operator cannot record its own.

    Formulas stand in `op.py`; arguments as its `source_backward`.
    """
    both, (mean, raw) = log_var is None, halves(mean, log_var)
    shape, compute = mean.shape, compute_dtype(mean)
    mu, log_var = mean.to(compute), bounded_log_var(raw.to(compute), (low, high))
    w = per_sample(w.to(compute), mean)
    gradient = torch.zeros_like(mu) if grad_x0 is None else grad_x0.to(compute)
    if grad_x is not None:
        h = from_tokens(grad_x, shape, patch_size) if patch_size else grad_x
        times = engine_times(slowed_t.to(compute), clock)
        sigma = per_sample(get_path(path).coefficients(*times).sigma, mu)
        gradient = gradient + sigma * h.to(compute)
    stream = Stream.NOISE if mode == "moments" else Stream.SOURCE_NOISE
    eps = (_normal(mean, seed, stream, ids) if eps is None else eps).to(compute)
    if mode == "moments":
        slope = w * torch.exp(log_var) / (2 * mixed_moments(mu, log_var, w.flatten())[1])
    else:
        slope = w * torch.exp(log_var / 2) / 2
    of_mean, of_log_var = w * gradient, gradient * eps * slope
    if grad_kl is not None:
        grad_kl = per_sample(grad_kl.to(compute), mu)
        of_mean = of_mean + grad_kl * mu
        of_log_var = of_log_var + grad_kl * torch.expm1(log_var) / 2
    of_log_var = torch.where((raw >= low) & (raw <= high) & raw.isfinite(), of_log_var, 0.0)
    of_mean, of_log_var = of_mean.to(mean.dtype), of_log_var.to(raw.dtype)
    if both:
        return torch.cat([of_mean, of_log_var], dim=1), None
    return of_mean.contiguous(), of_log_var.contiguous()


def _normal(x1: Tensor, seed: int | Tensor, stream: Stream, ids: Tensor | None) -> Tensor:
    return philox.normal(seed, stream, ids, x1.shape[1:].numel(), "reference").view(x1.shape)
