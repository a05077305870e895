"""The network's input: draw the times, make the noise in registers, interpolate, in one launch.

    t, m from (seed, position)                            (flow.schedule)
    x1 = data, or scale (mean + std eps)                  posterior of an autoencoder
    x_m = alpha_m x1 + sigma_m x0,  x0 ~ N(0, I)          (MixFlow, arXiv 2512.19311)

Reads x1 and writes x_m, once: 4 bytes an element in bf16, 6 from an autoencoder's fp16 moments. The
noise is a function of (seed, ids, element) and is never stored: the loss kernel recomputes the same
numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate.launch import check_sample_size, empty_outputs, launch
from mixflow_fast.kernels.interpolate.reference import Moments, interpolate_reference


@torch.library.custom_op("mixflow_fast::interpolate", mutates_args=())
def _interpolate_op(
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    t: Tensor | None,
    slowed_t: Tensor | None,
    clock: str,
    distribution: str,
    interval: str,
    numbers: list[float],
    path: str,
    patch_size: int,
    impl: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    schedule = Schedule.from_parts(clock, distribution, interval, numbers)
    if runtime.use_kernels(impl, x1.device, x1.dtype, dtype or x1.dtype):
        return launch(x1, std, scale, schedule, path, seed, ids, x0, t, slowed_t, patch_size, dtype)
    data = x1 if std is None else Moments(x1, std, scale)
    x, t, slowed_t = interpolate_reference(
        data, schedule, path, seed, ids, x0, t, slowed_t, patch_size, dtype
    )
    # As the fake implementation promises them.
    return x.contiguous(), t.contiguous(), slowed_t.contiguous()


@_interpolate_op.register_fake
def _(
    x1,
    std,
    scale,
    seed,
    ids,
    x0,
    t,
    slowed_t,
    clock,
    distribution,
    interval,
    numbers,
    path,
    patch_size,
    impl,
    dtype=None,
):
    return empty_outputs(x1, patch_size, dtype)


def interpolate(
    x1: Tensor | Moments,
    schedule: Schedule,
    path: str,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    patch_size: int = 0,
    impl: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `mixflow_fast::interpolate`, without gradients.

    Arguments are those that `MixFlow.prepare` has checked.

    Args:
        x1: (B, ...) data, or its `Moments`; float32, bf16 or fp16, samples of (C, H, W) for tokens.
            Samples may lie apart: mean and std may be the halves of one (B, 2 C, H, W) buffer.
        schedule: how the times are drawn; its clock is the caller's.
        path: "linear", "gvp" or "vp".
        seed: `philox.seed_tensor`, read on the device.
        ids: (B,) int64 positions; needed for whatever is drawn.
        x0: (B, ...) noise; None is drawn in registers.
        t, slowed_t: (B,) float32 times in the caller's clock; None is drawn.
        patch_size: side of the patches that make a token; 0 writes x in x1's shape.
        impl: "auto", "triton" or "reference" (see `runtime.use_kernels`).
        dtype: of x, which is computed in float32 and rounded once; None is that of x1.

    Returns:
        x: in `dtype`, (B, ...) or (B, H/p W/p, p p C); t and slowed_t: (B,) float32.

    Raises:
        ValueError: impl="triton" where it cannot run; too large samples or batches.
    """
    moments = isinstance(x1, Moments)
    data, std, scale = x1 if moments else (x1, None, 1.0)
    # Outside of the operator, so that tracing refuses it as well.
    if runtime.use_kernels(impl, data.device, data.dtype, dtype or data.dtype):
        check_sample_size(data)
    return _interpolate_op(
        data,
        std,
        float(scale),
        seed,
        ids,
        x0,
        t,
        slowed_t,
        schedule.clock,
        schedule.distribution.name,
        schedule.interval,
        schedule.numbers(),
        path,
        patch_size,
        impl,
        dtype,
    )
