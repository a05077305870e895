"""Per-sample loss and its gradient in one pass over the prediction, the noise drawn again.

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

from mixflow_fast.flow.clock import DATA_AT_1, engine_times
from mixflow_fast.flow.path import get_path, per_sample
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import (
    Moments,
    check_sample_size,
    compute_dtype,
    sample_moments,
    to_tokens,
)
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.velocity_loss.triton_kernels import (
    gradient_scale,
    launch,
    launch_scale,
    loss_shape,
)

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
    scale = gradient_scale(x1, reduction)
    if upstream is not None:
        scale = scale * (per_sample(upstream, error) if upstream.dim() else upstream)
    total = _weights(weight, loss_weight, error, times, clock, path)
    return (2 * scale * total * slope * error).to(pred.dtype)


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


def _to_pred_layout(gradient: Tensor, learn_sigma: bool, patch_size: int) -> Tensor:
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
    upstream: Tensor | None,
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
    """(loss, gradient for an upstream of 1), or (nothing, gradient) where `upstream` is given."""
    options = dict(clock=clock, path=path, prediction=prediction, reduction=reduction)
    layout = dict(learn_sigma=learn_sigma, patch_size=patch_size)
    if runtime.use_kernels(impl, pred.device, pred.dtype, x1.dtype):
        return launch(
            *(pred, x1, std, scale, seed, ids, x0, times, weight, upstream),
            **options,
            **layout,
            loss_weight=loss_weight,
            loss=upstream is None,
            gradient=with_gradient,
        )
    inputs = *_reference_inputs(pred, x1, std, scale, seed, ids, x0, **layout), times
    options.update(weight=weight, loss_weight=None if loss_weight == "none" else loss_weight)
    loss, gradient = _empty(pred, x1, upstream, reduction, with_gradient)
    if upstream is None:
        loss = velocity_loss_reference(*inputs, **options)
    if with_gradient:
        gradient = _gradient_reference(*inputs, upstream, **options)
        gradient = _to_pred_layout(gradient, **layout)
    return loss, gradient


def _empty(
    pred: Tensor, x1: Tensor, upstream: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    shape = loss_shape(x1, reduction) if upstream is None else (0,)
    loss = pred.new_empty(shape, dtype=compute_dtype(x1))
    return loss, pred.new_empty(pred.shape if with_gradient else (0,))


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
    upstream,
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
    return _empty(pred, x1, upstream, reduction, with_gradient)


@torch.library.custom_op("mixflow_fast::scale_gradient_", mutates_args=("gradient",))
def _scale_gradient_op(gradient: Tensor, upstream: Tensor) -> None:
    """gradient *= upstream, () or (B,); touches no memory where upstream is 1."""
    known = gradient.dtype in runtime.KERNEL_DTYPES
    if not (known and runtime.can_launch(gradient.device)):
        gradient.mul_(per_sample(upstream, gradient) if upstream.dim() else upstream)
        return
    launch_scale(gradient, upstream)


_UPSTREAM = 9  # its place among the operator's arguments


def _setup_context(ctx, inputs, output) -> None:
    with_gradient = inputs[-2]
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
        inputs[_UPSTREAM], inputs[-2] = upstream, True
        return _velocity_loss_op(*inputs)[1], *nothing[1:]
    (gradient,) = ctx.saved_tensors
    return _scaled(gradient, upstream), *nothing[1:]


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient times upstream: in place where nobody can need it again, and nothing traces."""
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    functorch = torch._C._functorch
    batched = functorch.is_batchedtensor(upstream) or functorch.is_legacy_batchedtensor(upstream)
    if type(gradient) is Tensor and not (keep or batched or torch.compiler.is_compiling()):
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
        *(pred, data, std, float(scale), seed, ids, x0, times, weight, None),
        *(clock, path, prediction, loss_weight or "none", reduction),
        *(learn_sigma, patch_size, with_gradient, impl),
    )
    return loss
