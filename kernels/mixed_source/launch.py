"""Launches of the mixed source's kernels.

The operators of `op.py` call `launch` and `launch_backward` on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.clock import NOISE_AT_1
from mixflow_fast.flow.source import halves
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.layout import Layout, get_layout, one_wave
from mixflow_fast.kernels.mixed_source.triton_kernels import (
    _mixed_source_kernel,
    _odd_mixed_source_kernel,
    _odd_source_backward_kernel,
    _source_backward_kernel,
)
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.velocity_loss.launch import launch_reduction


def token_shape(shape: torch.Size, patch_size: int) -> tuple[int, ...]:
    """Shape of the network's input: that of the data, or (B, H/p W/p, p p C)."""
    if not patch_size:
        return tuple(shape)
    B, C, H, W = shape
    return B, (H // patch_size) * (W // patch_size), patch_size * patch_size * C


def _sample_arguments(
    mean: Tensor,
    log_var: Tensor,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    layout: Layout,
    element_size: int,
    *,
    clock: str,
    path: str,
    mode: str,
    low: float,
    high: float,
) -> dict[str, object]:
    """Keyword arguments that both kernels have."""
    return {
        "mean_ptr": mean,
        "log_var_ptr": log_var,
        "w_ptr": w,
        "times_ptr": slowed_t,
        "seed_ptr": seed,
        "ids_ptr": seed if ids is None else ids,
        "mean_stride": runtime.row_stride(mean),
        "log_var_stride": runtime.row_stride(log_var),
        "programs": layout.programs,
        "S": layout.places,
        "low": low,
        "high": high,
        "SAMPLES": mode == "samples",
        "PATH": path,
        "NOISE_AT_1": clock == NOISE_AT_1,
        "HAS_IDS": ids is not None,
        **layout.constants(element_size),
    }


def launch(
    x1: Tensor,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    eps: Tensor | None,
    eps1: Tensor | None,
    *,
    clock: str,
    path: str,
    mode: str,
    patch_size: int,
    low: float,
    high: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, x0, kl) by the kernel; arguments as `mix_and_interpolate`."""
    x = x1.new_empty(token_shape(x1.shape, patch_size), dtype=dtype or x1.dtype)
    x0 = x1.new_empty(x1.shape, dtype=torch.float32)
    B = len(x1)
    kl = x1.new_empty(B, dtype=torch.float32)
    if not x1.numel():
        return x, x0, kl.zero_()
    # Sums: the tiles depend on a sample's shape alone.
    layout = get_layout(x1.shape[1:], patch_size)
    partial = x1.new_empty(B * layout.programs, dtype=torch.float32)
    x1, mean, log_var = (runtime.with_unit_rows(v) for v in (x1, *halves(mean, log_var)))
    eps, eps1 = (None if v is None else runtime.with_unit_rows(v) for v in (eps, eps1))
    ids, w, slowed_t = (None if v is None else v.contiguous() for v in (ids, w, slowed_t))
    grid = (runtime.check_grid(B * layout.programs, B),)
    kernel = _mixed_source_kernel if runtime.regular(layout.numel) else _odd_mixed_source_kernel
    with runtime.on_device(x1):
        kernel[grid](
            x1_ptr=x1,
            eps_ptr=x1 if eps is None else eps,
            eps1_ptr=x1 if eps1 is None else eps1,
            x_ptr=x,
            x0_ptr=x0,
            partial_ptr=partial,
            x1_stride=runtime.row_stride(x1),
            eps_stride=0 if eps is None else runtime.row_stride(eps),
            eps1_stride=0 if eps1 is None else runtime.row_stride(eps1),
            NOISE=int(Stream.NOISE),
            SOURCE_NOISE=int(Stream.SOURCE_NOISE),
            HAS_EPS=eps is not None,
            HAS_EPS1=eps1 is not None,
            **_sample_arguments(
                mean,
                log_var,
                w,
                slowed_t,
                seed,
                ids,
                layout,
                x1.element_size(),
                clock=clock,
                path=path,
                mode=mode,
                low=low,
                high=high,
            ),
        )
        launch_reduction(partial, kl, kl[:0], B, layout.programs, 1, "none")
    return x, x0, kl


def launch_backward(
    grad_x: Tensor | None,
    grad_x0: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
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
    """Gradients of mean and log_var by the kernel; arguments as `source_backward`."""
    made = mean.new_empty(mean.shape), None if log_var is None else log_var.new_empty(mean.shape)
    if not mean.numel():
        return made
    B = len(mean)
    grad_mean, grad_log_var = halves(*made)
    mean, log_var = halves(mean, log_var)
    loops = None if patch_size else one_wave(mean.shape[1:].numel(), B)
    layout = get_layout(mean.shape[1:], patch_size, loops)
    mean, log_var = (runtime.with_unit_rows(v) for v in (mean, log_var))
    grad_x, grad_x0, eps = (
        None if v is None else runtime.with_unit_rows(v) for v in (grad_x, grad_x0, eps)
    )
    grad_kl, ids, w, slowed_t = (
        None if v is None else v.contiguous() for v in (grad_kl, ids, w, slowed_t)
    )
    grid = (runtime.check_grid(B * layout.programs, B),)
    regular = runtime.regular(layout.numel)
    kernel = _source_backward_kernel if regular else _odd_source_backward_kernel
    stream = Stream.SOURCE_NOISE if mode == "samples" else Stream.NOISE
    with runtime.on_device(mean):
        kernel[grid](
            grad_x_ptr=mean if grad_x is None else grad_x,
            grad_x0_ptr=mean if grad_x0 is None else grad_x0,
            grad_kl_ptr=w if grad_kl is None else grad_kl,
            eps_ptr=mean if eps is None else eps,
            grad_mean_ptr=grad_mean,
            grad_log_var_ptr=grad_log_var,
            grad_x_stride=0 if grad_x is None else runtime.row_stride(grad_x),
            grad_x0_stride=0 if grad_x0 is None else runtime.row_stride(grad_x0),
            eps_stride=0 if eps is None else runtime.row_stride(eps),
            grad_mean_stride=runtime.row_stride(grad_mean),
            grad_log_var_stride=runtime.row_stride(grad_log_var),
            STREAM=int(stream),
            HAS_EPS=eps is not None,
            HAS_GRAD_X=grad_x is not None,
            HAS_GRAD_X0=grad_x0 is not None,
            HAS_GRAD_KL=grad_kl is not None,
            **_sample_arguments(
                mean,
                log_var,
                w,
                slowed_t,
                seed,
                ids,
                layout,
                4 if grad_x is None else grad_x.element_size(),
                clock=clock,
                path=path,
                mode=mode,
                low=low,
                high=high,
            ),
        )
    return made
