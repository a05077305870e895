"""Launches of the loss kernels.

The operators of `op.py` call `launch` and `launch_scale` on a device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.clock import NOISE_AT_1
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate.launch import data_arguments
from mixflow_fast.kernels.layout import get_layout
from mixflow_fast.kernels.runtime import triton
from mixflow_fast.kernels.velocity_loss.reference import gradient_scale, loss_shape
from mixflow_fast.kernels.velocity_loss.triton_kernels import (
    _odd_velocity_loss_kernel,
    _reduce_kernel,
    _scale_gradient_kernel,
    _velocity_loss_kernel,
)


def _weight_arguments(weight: Tensor | None, x1: Tensor) -> dict[str, object]:
    """Keyword arguments of a weight that is absent, per sample or per element."""
    if weight is None:
        return {
            "weight_ptr": x1,
            "weight_sample_stride": 0,
            "weight_channel_stride": 0,
            "weight_place_stride": 0,
            "weight_places": 1,
            "WEIGHT": "none",
        }
    if weight.dim() < 2:
        weight, kind, places = weight.expand(len(x1)), "sample", 1
        strides = weight.stride(0), 0, 0
    else:
        # As (B, C, places), each side its own or 1: one stride each, 0 where it is broadcast.
        rest = x1.shape[2:] if x1.dim() > 2 else x1.shape[1:]
        kind, places = "element", rest.numel()
        weight = weight if x1.dim() > 2 else weight.unsqueeze(1)
        if weight.shape[2:].numel() != 1:
            weight = weight.expand(weight.shape[:2] + rest)
        weight = weight.reshape(*weight.shape[:2], weight.shape[2:].numel())
        strides = tuple(
            step if size > 1 else 0
            for step, size in zip(weight.stride(), weight.shape, strict=True)
        )
    return {
        "weight_ptr": runtime.with_aligned_start(weight),
        "weight_sample_stride": strides[0],
        "weight_channel_stride": strides[1],
        "weight_place_stride": strides[2],
        "weight_places": places,
        "WEIGHT": kind,
    }


def launch(
    pred: Tensor,
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    times: Tensor,
    weight: Tensor | None,
    upstream: Tensor | None,
    *,
    clock: str,
    path: str,
    prediction: str,
    loss_weight: str,
    reduction: str,
    learn_sigma: bool,
    patch_size: int,
    loss: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, losses of the samples) by the kernels.

    Each of no elements where it is not asked for; the last where the first has them.
    """
    layout = get_layout(x1.shape[1:], patch_size)
    B, programs = len(x1), layout.programs
    out = pred.new_empty(loss_shape(x1, reduction) if loss else (0,), dtype=torch.float32)
    grad = pred.new_empty(pred.shape if gradient else (0,))
    reduces = loss and reduction != "none"
    samples = pred.new_empty(B if reduces else 0, dtype=torch.float32)
    if not x1.numel():
        return out.zero_(), grad.zero_(), samples.zero_()
    # One sum a program, added up by a second kernel: atomics would add them in any order.
    partial = pred.new_empty(B * programs if loss else 0, dtype=torch.float32)
    pred, x1 = runtime.with_unit_rows(pred), runtime.with_unit_rows(x1)
    std, x0 = (None if v is None else runtime.with_unit_rows(v) for v in (std, x0))
    ids = None if ids is None else ids.contiguous()
    times = times.contiguous()
    grid = (runtime.check_grid(B * programs, B),)
    kernel = _velocity_loss_kernel if runtime.regular(layout.numel) else _odd_velocity_loss_kernel
    with runtime.on_device(pred):
        kernel[grid](
            pred_ptr=pred,
            times_ptr=times,
            upstream_ptr=times if upstream is None else upstream,
            partial_ptr=partial,
            gradient_ptr=grad,
            pred_stride=runtime.row_stride(pred),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            gradient_stride=pred.shape[1:].numel(),
            gradient_scale=gradient_scale(x1, reduction),
            PREDICTION=prediction,
            LOSS_WEIGHT=loss_weight,
            PATH=path,
            NOISE_AT_1=clock == NOISE_AT_1,
            LEARN_SIGMA=learn_sigma,
            PRED_C=layout.channels * (2 if learn_sigma else 1),
            LOSS=loss,
            GRADIENT=gradient,
            UPSTREAM=upstream is not None,
            **_weight_arguments(weight, x1),
            **data_arguments(x1, std, x0, seed, ids, scale, layout, pred.element_size()),
        )
        if loss:
            launch_reduction(partial, out, samples, B, programs, layout.numel, reduction)
    return out, grad, samples


def launch_reduction(
    partial: Tensor,
    out: Tensor,
    samples: Tensor,
    B: int,
    programs: int,
    numel: int,
    reduction: str,
) -> None:
    """out = the losses of the samples, or their sum or mean, from the programs' partial sums.

    With a sum or mean, `samples` gets the losses of the samples.
    """
    block_p = min(triton.next_power_of_2(programs), 64)
    block_b = 2048 // block_p
    per_sample = reduction == "none"
    _reduce_kernel[(triton.cdiv(B, block_b) if per_sample else 1,)](
        partial,
        out,
        samples,
        B,
        programs,
        float(numel),
        float(B if reduction == "mean" else 1),
        PER_SAMPLE=per_sample,
        BLOCK_B=block_b,
        BLOCK_P=block_p,
        num_warps=8,
        **runtime.OPTIONS,
    )


def launch_scale(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, () or (B,), in place."""
    if gradient.numel():
        numel, block = gradient.shape[1:].numel(), 2048
        programs = triton.cdiv(numel, block)
        stride = upstream.stride(0) if upstream.dim() else 0
        grid = (runtime.check_grid(len(gradient) * programs, len(gradient)),)
        with runtime.on_device(gradient):
            _scale_gradient_kernel[grid](
                gradient,
                upstream,
                stride,
                numel,
                programs,
                BLOCK=block,
                num_warps=4,
                **runtime.OPTIONS,
            )
