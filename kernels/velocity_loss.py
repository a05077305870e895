"""Per-sample loss and its gradient in one pass over the prediction, the noise made again.

    error = pred - u*,   u* = d_alpha x1 + d_sigma x0        (velocity; SiT, arXiv 2401.08740)
            pred - x0  |  pred - x1  |  sigma pred + x0      (noise | data | score)
    loss_b = mean over elements of  weight lambda(t_b) error^2
    d loss_b / d pred = 2 weight lambda(t_b) error slope / E,  slope = sigma for scores, else 1

Reads the prediction and x1, writes the gradient: 6 bytes an element in bf16. Partial sums go to
memory, one per program, and a second kernel adds them in a fixed order: no atomics, the same bits
in every run, and for a sample alone or in a batch.

The gradient is written for an upstream gradient of 1; the backward pass multiplies it by another
one in place, on the device, and returns at once if it is 1. float16 has not the range for that
(2 / E underflows before a loss scaler can act), so there the backward pass computes it, in one
pass over the prediction with the upstream gradient inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, NOISE_AT_1, engine_times
from mixflow_fast.flow.path import get_path, per_sample
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import (
    Moments,
    check_sample_size,
    compute_dtype,
    data_arguments,
    load_data,
    sample_moments,
)
from mixflow_fast.kernels.layout import Layout, address, get_layout, tile_start
from mixflow_fast.kernels.philox import Stream, normal_tile
from mixflow_fast.kernels.runtime import jit, tl, triton
from mixflow_fast.kernels.times import path_coefficients

REDUCTIONS = ("mean", "sum", "none")


def from_tokens(tokens: Tensor, shape: torch.Size, patch_size: int) -> Tensor:
    """(B, N, p p C') -> (B, C', H, W) for data of `shape` (B, C, H, W); SiT's `unpatchify`."""
    B, _, H, W = shape
    p = patch_size
    x = tokens.reshape(B, H // p, W // p, p, p, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, H, W)


def _errors(
    pred: Tensor, x1: Tensor, x0: Tensor, times: Tensor, clock: str, path: str, prediction: str
) -> tuple[Tensor, Tensor | float]:
    """(error, slope) of the formulas above, in the inputs' dtype."""
    pair = engine_times(times.to(pred.dtype), clock)
    if prediction == "velocity":
        target = get_path(path).velocity(x1, x0, *pair)
        return (pred - target if clock == DATA_AT_1 else pred + target), 1.0
    if prediction == "noise":
        return pred - x0, 1.0
    if prediction == "data":
        return pred - x1, 1.0
    # The score -x0 / sigma explodes at the data end; sigma times it does not (SiT).
    sigma = per_sample(get_path(path).coefficients(*pair).sigma, pred)
    return pred * sigma + x0, sigma


def _weights(
    weight: Tensor | None,
    loss_weight: str | None,
    error: Tensor,
    times: Tensor,
    clock: str,
    path: str,
) -> Tensor | float:
    """weight times lambda, broadcastable to the error."""
    total = 1.0
    if loss_weight is not None:
        pair = engine_times(times.to(error.dtype), clock)
        total = per_sample(get_path(path).loss_weight(loss_weight, *pair), error)
    if weight is not None:
        weight = weight.to(error.dtype)
        total = (per_sample(weight, error) if weight.dim() == 1 else weight) * total
    return total


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def velocity_loss_reference(
    pred: Tensor,
    x1: Tensor,
    x0: Tensor,
    times: Tensor,
    *,
    clock: str,
    path: str = "linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`velocity_loss` in plain, differentiable PyTorch, for tensors of one shape (B, ...).

    Computes and returns float32, or float64 for float64 data.
    """
    dtype = compute_dtype(x1)
    pred, x1, x0 = pred.to(dtype), x1.to(dtype), x0.to(dtype)
    error, _ = _errors(pred, x1, x0, times, clock, path, prediction)
    error = _weights(weight, loss_weight, error, times, clock, path) * error**2
    return _reduce(error.flatten(1).mean(dim=1), reduction)


def _gradient_reference(
    pred: Tensor,
    x1: Tensor,
    x0: Tensor,
    times: Tensor,
    upstream: Tensor | None,
    *,
    clock: str,
    path: str,
    prediction: str,
    loss_weight: str | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The gradient in closed form, in pred's dtype: an operator cannot record its own."""
    dtype = compute_dtype(x1)
    error, slope = _errors(
        pred.to(dtype), x1.to(dtype), x0.to(dtype), times, clock, path, prediction
    )
    scale = _gradient_scale(x1, reduction)
    if upstream is not None:
        scale = scale * (per_sample(upstream, error) if upstream.dim() else upstream)
    total = _weights(weight, loss_weight, error, times, clock, path)
    return (2 * scale * total * slope * error).to(pred.dtype)


def _gradient_scale(x1: Tensor, reduction: str) -> float:
    count = x1.shape[1:].numel() * (len(x1) if reduction == "mean" else 1)
    return 1.0 / max(count, 1)


@jit
def _velocity_loss_kernel(
    pred_ptr,
    x1_ptr,
    std_ptr,
    x0_ptr,
    seed_ptr,
    ids_ptr,
    times_ptr,
    weight_ptr,
    upstream_ptr,
    partial_ptr,
    gradient_ptr,
    pred_stride,
    x1_stride,
    std_stride,
    x0_stride,
    weight_sample_stride,
    weight_channel_stride,
    weight_place_stride,
    weight_places,
    upstream_stride,
    gradient_stride,
    programs,
    C,
    S,
    W,
    pred_channels,
    sigma_offset,
    scale,
    gradient_scale,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_X0: tl.constexpr,
    MOMENTS: tl.constexpr,
    PREDICTION: tl.constexpr,
    LOSS_WEIGHT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PATH: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    LEARN_SIGMA: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    UPSTREAM: tl.constexpr,
    PATCH: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOOPS: tl.constexpr,
):
    index = tl.program_id(0)
    sample = (index // programs).to(tl.int64)
    program = index % programs
    seed = tl.load(seed_ptr)
    position = sample
    if HAS_IDS:
        position = tl.load(ids_ptr + sample)
    alpha, sigma, d_alpha, d_sigma, d_log_alpha = path_coefficients(
        tl.load(times_ptr + sample), PATH, NOISE_AT_1
    )
    if NOISE_AT_1:
        d_alpha = -d_alpha
        d_sigma = -d_sigma
    weight = 1.0
    g = d_log_alpha * sigma * sigma - sigma * d_sigma
    if NOISE_AT_1:
        g = d_log_alpha * sigma * sigma + sigma * d_sigma
    if LOSS_WEIGHT == "velocity":
        weight = tl.div_rn(g, sigma)
        weight = weight * weight
    elif LOSS_WEIGHT == "likelihood":
        weight = tl.div_rn(g, sigma * sigma)
    if WEIGHT == "sample":
        weight = weight * tl.load(weight_ptr + sample * weight_sample_stride)
    slope = 2.0 * gradient_scale
    if PREDICTION == "score":
        slope = slope * sigma
    if UPSTREAM:
        slope = slope * tl.load(upstream_ptr + sample * upstream_stride)
    first_c, first_s = tile_start(program, C, S, BLOCK_C, BLOCK_S, LOOPS)
    c = first_c + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for i in range(LOOPS):
        start = first_s + i * BLOCK_S
        s = start + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < S)[None, :]
        offset = c[:, None] * S + s[None, :]
        place = address(c, s, S, W, pred_channels, PATCH)
        error = tl.load(pred_ptr + sample * pred_stride + place, mask=mask, other=0.0)
        error = error.to(tl.float32)
        if PREDICTION == "score":
            error = error * sigma
        if PREDICTION == "velocity" or PREDICTION == "data":
            x1 = load_data(
                x1_ptr + sample * x1_stride,
                std_ptr + sample * std_stride,
                offset,
                mask,
                (first_c, start),
                seed,
                position,
                scale,
                S,
                POSTERIOR,
                MOMENTS,
                BLOCK_C,
                BLOCK_S,
                ALIGNED,
            )
            if PREDICTION == "data":
                error = error - x1
            else:
                error = error - d_alpha * x1
        if PREDICTION != "data":
            if HAS_X0:
                x0 = tl.load(x0_ptr + sample * x0_stride + offset, mask=mask, other=0.0)
                x0 = x0.to(tl.float32)
            else:
                x0 = normal_tile(
                    seed, NOISE, position, first_c, start, S, BLOCK_C, BLOCK_S, ALIGNED
                )
            if PREDICTION == "velocity":
                error = error - d_sigma * x0
            elif PREDICTION == "noise":
                error = error - x0
            else:
                error = error + x0
        weighted = weight * error
        if WEIGHT == "element":
            at = (offset // weight_places) * weight_channel_stride
            at += (offset % weight_places) * weight_place_stride
            at += sample * weight_sample_stride
            weighted = weighted * tl.load(weight_ptr + at, mask=mask, other=0.0)
        if LOSS:
            total += tl.where(mask, weighted * error, 0.0)
        if GRADIENT:
            out = gradient_ptr + sample * gradient_stride + place
            dtype: tl.constexpr = gradient_ptr.dtype.element_ty
            tl.store(out, (slope * weighted).to(dtype), mask=mask)
            if LEARN_SIGMA:
                tl.store(
                    out + sigma_offset,
                    tl.zeros((BLOCK_C, BLOCK_S), tl.float32).to(dtype),
                    mask=mask,
                )
    if LOSS:
        tl.store(partial_ptr + index, tl.sum(tl.sum(total, axis=1), axis=0))


@jit
def _reduce_rows(
    partial_ptr, row, B, programs, numel, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):
    total = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    for start in range(0, programs, BLOCK_P):
        column = start + tl.arange(0, BLOCK_P)
        mask = (row < B)[:, None] & (column < programs)[None, :]
        offset = row.to(tl.int64)[:, None] * programs + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    return tl.div_rn(tl.sum(total, axis=1), numel)


@jit
def _reduce_kernel(
    partial_ptr,
    out_ptr,
    B,
    programs,
    numel,
    divisor,
    PER_SAMPLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of partials in a fixed order: per sample, or of all samples in one program."""
    rows = tl.arange(0, BLOCK_B)
    if PER_SAMPLE:
        row = tl.program_id(0) * BLOCK_B + rows
        losses = _reduce_rows(partial_ptr, row, B, programs, numel, BLOCK_B, BLOCK_P)
        tl.store(out_ptr + row, losses, mask=row < B)
    else:
        total = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, B, BLOCK_B):
            total += _reduce_rows(partial_ptr, first + rows, B, programs, numel, BLOCK_B, BLOCK_P)
        tl.store(out_ptr, tl.div_rn(tl.sum(total, axis=0), divisor))


@jit
def _scale_gradient_kernel(
    gradient_ptr, upstream_ptr, upstream_stride, numel, programs, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    sample = (index // programs).to(tl.int64)
    upstream = tl.load(upstream_ptr + sample * upstream_stride)
    if upstream != 1.0:
        element = (index % programs) * BLOCK + tl.arange(0, BLOCK)
        at = gradient_ptr + sample * numel + element
        value = tl.load(at, mask=element < numel, other=0.0).to(tl.float32) * upstream
        tl.store(at, value.to(gradient_ptr.dtype.element_ty), mask=element < numel)


def _weight_arguments(weight: Tensor | None, x1: Tensor) -> dict[str, object]:
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
            weight = weight.expand(*weight.shape[:2], *rest)
        weight = weight.reshape(*weight.shape[:2], weight.shape[2:].numel())
        strides = tuple(
            step if size > 1 else 0
            for step, size in zip(weight.stride(), weight.shape, strict=True)
        )
    return {
        "weight_ptr": weight,
        "weight_sample_stride": strides[0],
        "weight_channel_stride": strides[1],
        "weight_place_stride": strides[2],
        "weight_places": places,
        "WEIGHT": kind,
    }


def _launch(
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
) -> tuple[Tensor, Tensor]:
    """Both kernels: (loss, gradient), each empty where it is not asked for."""
    layout = get_layout(x1.shape[1:], patch_size)
    B, programs = len(x1), layout.programs
    out = pred.new_empty(_loss_shape(x1, reduction) if loss else (0,), dtype=torch.float32)
    grad = pred.new_empty(pred.shape if gradient else (0,))
    if not x1.numel():
        return out.zero_(), grad.zero_()
    partial = pred.new_empty(B * programs if loss else 0, dtype=torch.float32)
    pred, x1 = runtime.with_unit_rows(pred), runtime.with_unit_rows(x1)
    std, x0 = (None if v is None else runtime.with_unit_rows(v) for v in (std, x0))
    grid = (runtime.check_grid(B * programs, B),)
    with runtime.on_device(pred):
        _velocity_loss_kernel[grid](
            pred_ptr=pred,
            times_ptr=times,
            upstream_ptr=times if upstream is None else upstream,
            partial_ptr=partial,
            gradient_ptr=grad,
            pred_stride=pred.stride(0),
            upstream_stride=upstream.stride(0) if upstream is not None and upstream.dim() else 0,
            gradient_stride=pred.shape[1:].numel(),
            pred_channels=_token_channels(layout, learn_sigma),
            sigma_offset=layout.channels if patch_size else layout.numel,
            gradient_scale=_gradient_scale(x1, reduction),
            PREDICTION=prediction,
            LOSS_WEIGHT=loss_weight,
            PATH=path,
            NOISE_AT_1=clock == NOISE_AT_1,
            LEARN_SIGMA=learn_sigma,
            LOSS=loss,
            GRADIENT=gradient,
            UPSTREAM=upstream is not None,
            **_weight_arguments(weight, x1),
            **data_arguments(x1, std, x0, seed, ids, scale, layout),
        )
        if loss:
            _launch_reduction(partial, out, B, programs, layout.numel, reduction)
    return out, grad


def _token_channels(layout: Layout, learn_sigma: bool) -> int:
    return layout.channels * (2 if learn_sigma else 1)


def _loss_shape(x1: Tensor, reduction: str) -> tuple[int, ...]:
    return (x1.shape[0],) if reduction == "none" else ()


def _launch_reduction(
    partial: Tensor, out: Tensor, B: int, programs: int, numel: int, reduction: str
) -> None:
    block_p = min(triton.next_power_of_2(programs), 64)
    block_b = 2048 // block_p
    per_sample = reduction == "none"
    _reduce_kernel[(triton.cdiv(B, block_b) if per_sample else 1,)](
        partial,
        out,
        B,
        programs,
        float(numel),
        float(B if reduction == "mean" else 1),
        PER_SAMPLE=per_sample,
        BLOCK_B=block_b,
        BLOCK_P=block_p,
        num_warps=8,
    )


def _reference_inputs(
    pred: Tensor,
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    learn_sigma: bool,
    patch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pred, x1, x0) in x1's shape, for the reference."""
    if patch_size:
        pred = from_tokens(pred, x1.shape, patch_size)
    if learn_sigma:
        pred = pred[:, : x1.shape[1]]
    if x0 is None:
        numel = x1[0].numel() if len(x1) else 0
        x0 = philox.normal_reference(seed, Stream.NOISE, ids, numel).view(x1.shape)
    if std is not None:
        x1 = sample_moments(Moments(x1, std, scale), seed, ids, "reference")
    return pred, x1, x0


def _to_pred_layout(gradient: Tensor, pred: Tensor, learn_sigma: bool, patch_size: int) -> Tensor:
    from mixflow_fast.kernels.interpolate import to_tokens

    if learn_sigma:
        gradient = torch.cat([gradient, torch.zeros_like(gradient)], dim=1)
    if patch_size:
        gradient = to_tokens(gradient.contiguous(), patch_size)
    return gradient.contiguous()


@torch.library.custom_op("mixflow_fast::velocity_loss", mutates_args=())
def _velocity_loss_op(
    pred: Tensor,
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    times: Tensor,
    weight: Tensor | None,
    clock: str,
    path: str,
    prediction: str,
    loss_weight: str,
    reduction: str,
    learn_sigma: bool,
    patch_size: int,
    with_gradient: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    options = dict(clock=clock, path=path, prediction=prediction, reduction=reduction)
    layout = dict(learn_sigma=learn_sigma, patch_size=patch_size)
    if runtime.use_kernels(impl, pred.device, pred.dtype, x1.dtype):
        return _launch(
            *(pred, x1, std, scale, seed, ids, x0, times, weight, None),
            **options,
            **layout,
            loss_weight=loss_weight,
            loss=True,
            gradient=with_gradient,
        )
    inputs = *_reference_inputs(pred, x1, std, scale, seed, ids, x0, **layout), times
    options.update(weight=weight, loss_weight=None if loss_weight == "none" else loss_weight)
    loss = velocity_loss_reference(*inputs, **options)
    if not with_gradient:
        return loss, pred.new_empty(0)
    return loss, _to_pred_layout(_gradient_reference(*inputs, None, **options), pred, **layout)


@_velocity_loss_op.register_fake
def _(
    pred,
    x1,
    std,
    scale,
    seed,
    ids,
    x0,
    times,
    weight,
    clock,
    path,
    prediction,
    loss_weight,
    reduction,
    learn_sigma,
    patch_size,
    with_gradient,
    impl,
):
    loss = pred.new_empty(_loss_shape(x1, reduction), dtype=compute_dtype(x1))
    return loss, pred.new_empty(pred.shape if with_gradient else (0,))


@torch.library.custom_op("mixflow_fast::velocity_loss_backward", mutates_args=())
def _velocity_loss_backward_op(
    upstream: Tensor,
    pred: Tensor,
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    times: Tensor,
    weight: Tensor | None,
    clock: str,
    path: str,
    prediction: str,
    loss_weight: str,
    reduction: str,
    learn_sigma: bool,
    patch_size: int,
    impl: str,
) -> Tensor:
    options = dict(clock=clock, path=path, prediction=prediction, reduction=reduction)
    layout = dict(learn_sigma=learn_sigma, patch_size=patch_size)
    if runtime.use_kernels(impl, pred.device, pred.dtype, x1.dtype):
        return _launch(
            *(pred, x1, std, scale, seed, ids, x0, times, weight, upstream),
            **options,
            **layout,
            loss_weight=loss_weight,
            loss=False,
            gradient=True,
        )[1]
    inputs = *_reference_inputs(pred, x1, std, scale, seed, ids, x0, **layout), times
    options.update(weight=weight, loss_weight=None if loss_weight == "none" else loss_weight)
    return _to_pred_layout(_gradient_reference(*inputs, upstream, **options), pred, **layout)


@_velocity_loss_backward_op.register_fake
def _(upstream, pred, *arguments):
    return pred.new_empty(pred.shape)


@torch.library.custom_op("mixflow_fast::scale_gradient_", mutates_args=("gradient",))
def _scale_gradient_op(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, () or (B,); touches no memory where upstream is 1."""
    if not runtime.can_launch(gradient.device):
        gradient.mul_(per_sample(upstream, gradient) if upstream.dim() else upstream)
        return
    if gradient.numel():
        numel, block = gradient.shape[1:].numel(), 2048
        programs = triton.cdiv(numel, block)
        stride = upstream.stride(0) if upstream.dim() else 0
        with runtime.on_device(gradient):
            _scale_gradient_kernel[(len(gradient) * programs,)](
                gradient, upstream, stride, numel, programs, BLOCK=block, num_warps=4
            )


def _setup_context(ctx, inputs, output) -> None:
    *_, with_gradient, impl = inputs
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.set_materialize_grads(False)
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.fused = with_gradient
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*([gradient] if with_gradient else tensors))


def _backward(ctx, upstream: Tensor | None, _) -> tuple[Tensor | None, ...]:
    nothing = (None,) * len(ctx.options)
    if upstream is None:
        return nothing
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss has no second derivatives (create_graph=True): use "
            'MixFlow(impl="reference")'
        )
    if not ctx.fused:
        inputs = [
            option if tensor is None else tensor
            for option, tensor in zip(ctx.options, ctx.saved_tensors, strict=True)
        ]
        *arguments, _, impl = inputs
        return _velocity_loss_backward_op(upstream, *arguments, impl), *nothing[1:]
    (gradient,) = ctx.saved_tensors
    return _scaled(gradient, upstream), *nothing[1:]


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient times upstream: in place where nobody can need it again, and nothing traces."""
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    if type(gradient) is Tensor and not keep and not torch.compiler.is_compiling():
        _scale_gradient_op(gradient, upstream)
        return gradient
    factor = per_sample(upstream, gradient) if upstream.dim() else upstream
    return (gradient.to(upstream.dtype) * factor).to(gradient.dtype)


_velocity_loss_op.register_autograd(_backward, setup_context=_setup_context)


def velocity_loss(
    pred: Tensor,
    x1: Tensor | Moments,
    times: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    *,
    clock: str,
    x0: Tensor | None = None,
    path: str = "linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    learn_sigma: bool = False,
    patch_size: int = 0,
    impl: str = "auto",
) -> Tensor:
    """The operator `mixflow_fast::velocity_loss`; arguments are not checked again.

    Args:
        pred: (B, ...) the network's output in x1's shape, or (B, H/p W/p, p p C) tokens; with
            `learn_sigma` it has 2 C channels, of which the second half gets gradient zero.
        x1: (B, ...) the data or its `Moments`, as given to `interpolate`.
        times: (B,) float32, the time of target, score scale and weight; caller's clock.
        seed, ids, x0: of the noise, as given to `interpolate`.
        clock, path, prediction, loss_weight: as `MixFlow`.
        weight: float32, () or (B,) or broadcastable to x1; no gradient flows to it.
        reduction: "none" -> (B,), "sum", "mean" over the batch; a sample's loss is its elements'
            mean.
        patch_size: of pred's tokens; 0 is x1's shape.
        impl: "auto", "triton" or "reference".

    Returns:
        float32 (the reference: float64 for float64 data).

    Raises:
        ValueError: impl="triton" where it cannot run; too large samples or batches.
    """
    moments = isinstance(x1, Moments)
    data, std, scale = x1 if moments else (x1, None, 1.0)
    if runtime.use_kernels(impl, data.device, pred.dtype, data.dtype):
        check_sample_size(data)
    with_gradient = pred.requires_grad and torch.is_grad_enabled() and pred.dtype != torch.float16
    loss, _ = _velocity_loss_op(
        *(pred, data, std, float(scale), seed, ids, x0, times, weight),
        *(clock, path, prediction, loss_weight or "none", reduction),
        *(learn_sigma, patch_size, with_gradient, impl),
    )
    return loss
