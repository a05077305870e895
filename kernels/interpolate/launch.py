"""Launch of the interpolation's kernel, and the arguments that it shares with the loss kernel.

The operator of `op.py` calls `launch` on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate.triton_kernels import (
    _interpolate_kernel,
    _odd_interpolate_kernel,
)
from mixflow_fast.kernels.layout import Layout, get_layout, one_wave
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.schedule import schedule_arguments


def data_arguments(
    x1: Tensor,
    std: Tensor | None,
    x0: Tensor | None,
    seed: Tensor,
    ids: Tensor | None,
    scale: float,
    layout: Layout,
    element_size: int,
) -> dict[str, object]:
    """Keyword arguments that say where a kernel finds the data and the noise of a sample.

    An absent tensor is given as any other: a constexpr keeps the kernel from using the pointer.
    """
    return {
        "x1_ptr": x1,
        "std_ptr": x1 if std is None else std,
        "x0_ptr": x1 if x0 is None else x0,
        "seed_ptr": seed,
        "ids_ptr": seed if ids is None else ids,
        "x1_stride": runtime.row_stride(x1),
        "std_stride": 0 if std is None else runtime.row_stride(std),
        "x0_stride": 0 if x0 is None else runtime.row_stride(x0),
        "programs": layout.programs,
        "S": layout.places,
        "scale": scale,
        "NOISE": int(Stream.NOISE),
        "POSTERIOR": int(Stream.POSTERIOR),
        "HAS_IDS": ids is not None,
        "HAS_X0": x0 is not None,
        "MOMENTS": std is not None,
        **layout.constants(element_size),
    }


def check_sample_size(x1: Tensor) -> None:
    """ValueError where the 32-bit offsets inside of a sample would overflow."""
    if x1.shape[1:].numel() > runtime.MAX_SAMPLE:
        raise ValueError(
            "a sample must have at most 2**29 elements for the Triton kernels, got "
            f'{tuple(x1.shape[1:])}: use impl="reference"'
        )


def empty_outputs(
    x1: Tensor, patch_size: int, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, t, slowed_t) of the right shapes and dtypes, not yet written."""
    shape = x1.shape
    if patch_size:
        B, C, H, W = shape
        shape = (B, (H // patch_size) * (W // patch_size), patch_size * patch_size * C)
    t, m = (x1.new_empty(x1.shape[0], dtype=torch.float32) for _ in range(2))
    return x1.new_empty(shape, dtype=dtype or x1.dtype), t, m


def launch(
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    schedule: Schedule,
    path: str,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    t: Tensor | None,
    slowed_t: Tensor | None,
    patch_size: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, t, slowed_t) by the kernel; arguments as `interpolate`."""
    x, out_t, out_m = empty_outputs(x1, patch_size, dtype)
    if not x.numel():
        return x, out_t, out_m
    loops = None if patch_size else one_wave(x1.shape[1:].numel(), len(x1))
    layout = get_layout(x1.shape[1:], patch_size, loops)
    x1, std, x0 = (None if v is None else runtime.with_unit_rows(v) for v in (x1, std, x0))
    ids, t, slowed_t = (None if v is None else v.contiguous() for v in (ids, t, slowed_t))
    grid = (runtime.check_grid(len(x1) * layout.programs, len(x1)),)
    kernel = _interpolate_kernel if runtime.regular(layout.numel) else _odd_interpolate_kernel
    with runtime.on_device(x1):
        kernel[grid](
            given_t_ptr=out_t if t is None else t,
            given_m_ptr=out_m if slowed_t is None else slowed_t,
            x_ptr=x,
            t_ptr=out_t,
            m_ptr=out_m,
            PATH=path,
            HAS_T=t is not None,
            HAS_M=slowed_t is not None,
            **data_arguments(x1, std, x0, seed, ids, scale, layout, x1.element_size()),
            **schedule_arguments(schedule),
        )
    return x, out_t, out_m
