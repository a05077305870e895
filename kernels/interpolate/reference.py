"""Interpolation in plain PyTorch, which runs where kernels do not and defines their results.

Formulas stand in `op.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.flow.clock import engine_times
from mixflow_fast.flow.path import get_path
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.layout import to_tokens
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype


class Moments(NamedTuple):
    """Cached moments of an autoencoder's posterior: x1 = scale (mean + std eps), eps ~ N(0, I).

    eps is drawn from (seed, `Stream.POSTERIOR`, ids): every position has its own, and has it
    whenever it is asked for.

    Attributes:
        mean, std: (B, ...) float32, bf16 or fp16; std, not the log-variance.
        scale: factor of the latents, 0.18215 for Stable Diffusion's autoencoder.
    """

    mean: Tensor
    std: Tensor
    scale: float = 1.0


def sample_moments(moments: Moments, seed: int | Tensor, ids: Tensor, impl: str = "auto") -> Tensor:
    """(B, ...) float32 (float64 for float64 moments): the data that `moments` stand for."""
    mean, std, scale = moments
    dtype = compute_dtype(mean)
    numel = mean[0].numel() if len(mean) else 0
    eps = philox.normal(seed, Stream.POSTERIOR, ids, numel, impl).view(mean.shape)
    return (mean.to(dtype) + std.to(dtype) * eps.to(dtype)) * scale


def draw_times(
    schedule: Schedule,
    seed: int | Tensor,
    ids: Tensor | None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(B,) times t and m in the caller's clock: as given, or drawn.

    The slowed times are NaN where a given time lies outside [0, 1].
    """
    u = v = None
    given = [time for time in (t, slowed_t) if time is not None]
    if t is None:
        u = philox.uniform(seed, Stream.TIME, ids)[:, 0]
        t = schedule.time(u)
    if slowed_t is None:
        if schedule.gamma or schedule.interval == "full":
            v = philox.uniform(seed, Stream.SLOWING, ids)[:, 0]
        slowed_t = schedule.slowed(t, u, v)
    # As in the kernel, which cannot raise: NaN shows in the loss.
    for time in given:
        slowed_t = torch.where((time >= 0) & (time <= 1), slowed_t, math.nan)
    return t, slowed_t


def interpolate_reference(
    x1: Tensor | Moments,
    schedule: Schedule,
    path: str,
    seed: int | Tensor,
    ids: Tensor | None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    patch_size: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`interpolate` in plain PyTorch; float64 data is computed and kept in float64.

    The times are new tensors, and NaN where a given one lies outside [0, 1].
    """
    data = x1.mean if isinstance(x1, Moments) else x1
    compute = compute_dtype(data)
    t, slowed_t = draw_times(schedule, seed, ids, t, slowed_t)
    if isinstance(x1, Moments):
        x1 = sample_moments(x1, seed, ids, "reference")
    if x0 is None:
        numel = data[0].numel() if len(data) else 0
        x0 = philox.normal(seed, Stream.NOISE, ids, numel, "reference").view(data.shape)
    times = engine_times(slowed_t.to(compute), schedule.clock)
    x = get_path(path).interpolate(x1.to(compute), x0.to(compute), *times).to(dtype or data.dtype)
    return to_tokens(x, patch_size) if patch_size else x, t.clone(), slowed_t.clone()
