"""Per-sample loss and its gradient in one pass over the prediction, the noise recomputed.

    error = pred - u*,   u* = d_alpha x1 + d_sigma x0        (velocity; SiT, arXiv 2401.08740)
            pred - x0  |  pred - x1  |  sigma pred + x0      (noise | data | score)
    loss_b = mean over elements of  weight lambda(t_b) error^2
    d loss_b / d pred = 2 weight lambda(t_b) error slope / E,  slope = sigma for scores, else 1

Reads the prediction and x1, writes the gradient: 6 bytes an element in bf16. Partial sums go to
memory, one per program, and a second kernel adds them in a fixed order: no atomics, the same bits
in every run, and for a sample alone or in a batch.

The forward pass writes the gradient for an upstream gradient of 1. The backward pass multiplies it
by the true one in place, on the device, and touches nothing if that is 1. float16 lacks the range
for this (2 / E underflows before a loss scaler can act), so its backward pass computes the gradient
itself, in one pass over the prediction with the upstream gradient inside.

A given x0 that requires a gradient, as that of a mixed source does, gets that of a velocity's
target: -d_sigma d loss / d pred, a multiple of what is there already, in float32. It has the
rounding of pred's gradient: one to pred's dtype, and in bf16 one more where the upstream gradient
is not 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.path import per_sample
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.kernels.interpolate.launch import check_sample_size
from mixflow_fast.kernels.runtime import compute_dtype
from mixflow_fast.kernels.velocity_loss.launch import launch, launch_scale
from mixflow_fast.kernels.velocity_loss.reference import (
    gradient_of_x0,
    gradient_reference,
    loss_shape,
    reduce,
    reference_inputs,
    samples_shape,
    to_pred_layout,
    velocity_loss_reference,
)

REDUCTIONS = ("mean", "sum", "none")


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient for an upstream of 1, losses of the samples where they are reduced), or
    (nothing, gradient, nothing) where `upstream` is given.
    """
    if runtime.use_kernels(impl, pred.device, pred.dtype, x1.dtype):
        return launch(
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
            clock=clock,
            path=path,
            prediction=prediction,
            loss_weight=loss_weight,
            reduction=reduction,
            learn_sigma=learn_sigma,
            patch_size=patch_size,
            loss=upstream is None,
            gradient=with_gradient,
        )
    options = dict(clock=clock, path=path, prediction=prediction, weight=weight)
    options.update(reduction=reduction, loss_weight=None if loss_weight == "none" else loss_weight)
    loss, gradient, samples = _empty(pred, x1, upstream, reduction, with_gradient)
    shaped_pred, x1, x0 = reference_inputs(
        pred, x1, std, scale, seed, ids, x0, learn_sigma, patch_size
    )
    if upstream is None:
        each = velocity_loss_reference(
            shaped_pred, x1, x0, times, **{**options, "reduction": "none"}
        )
        loss = reduce(each, reduction)
        samples = samples if reduction == "none" else each
    if with_gradient:
        gradient = gradient_reference(shaped_pred, x1, x0, times, upstream, **options)
        gradient = to_pred_layout(gradient, learn_sigma, patch_size)
    return loss, gradient, samples


def _empty(
    pred: Tensor, x1: Tensor, upstream: Tensor | None, reduction: str, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's results not yet written, each of no elements where it is not asked for."""
    forward, dtype = upstream is None, compute_dtype(x1)
    loss = pred.new_empty(loss_shape(x1, reduction) if forward else (0,), dtype=dtype)
    samples = pred.new_empty(samples_shape(x1, reduction) if forward else (0,), dtype=dtype)
    return loss, pred.new_empty(pred.shape if with_gradient else (0,)), samples


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
    has_kernel = gradient.dtype in runtime.KERNEL_DTYPES
    if not (has_kernel and runtime.can_launch(gradient.device)):
        gradient.mul_(per_sample(upstream, gradient) if upstream.dim() else upstream)
        return
    launch_scale(gradient, upstream)


# Places among the operator's arguments.
_X1, _X0, _TIMES, _UPSTREAM, _CLOCK, _PATH = 1, 6, 7, 9, 10, 11
_LEARN_SIGMA, _PATCH_SIZE, _WITH_GRADIENT = 15, 16, 17


def _setup_context(ctx, inputs, output) -> None:
    with_gradient = inputs[_WITH_GRADIENT]
    _, gradient, samples = output
    ctx.mark_non_differentiable(gradient, samples)
    ctx.set_materialize_grads(False)  # no zeros for the gradient of the gradient
    tensors = [value if isinstance(value, Tensor) else None for value in inputs]
    ctx.fused = with_gradient
    ctx.options = [None if isinstance(value, Tensor) else value for value in inputs]
    x0 = inputs[_X0]
    ctx.shape, ctx.x0_dtype = inputs[_X1].shape, None if x0 is None else x0.dtype
    ctx.save_for_backward(*([gradient, inputs[_TIMES]] if with_gradient else tensors))


def _backward(ctx, upstream: Tensor | None, *_) -> tuple[Tensor | None, ...]:
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
        inputs[_UPSTREAM], inputs[_WITH_GRADIENT] = upstream, True
        gradient, times = _velocity_loss_op(*inputs)[1], inputs[_TIMES]
    else:
        gradient, times = ctx.saved_tensors
        gradient = _scaled(gradient, upstream)
    gradients = [gradient, *nothing[1:]]
    if ctx.needs_input_grad[_X0]:
        gradients[_X0] = gradient_of_x0(
            gradient,
            times,
            ctx.shape,
            clock=ctx.options[_CLOCK],
            path=ctx.options[_PATH],
            learn_sigma=ctx.options[_LEARN_SIGMA],
            patch_size=ctx.options[_PATCH_SIZE],
        ).to(ctx.x0_dtype)
    return tuple(gradients)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """gradient times upstream: in place where nobody can need its old value, and nothing traces."""
    # A caller that keeps the graph may go backward twice, and would find the gradient scaled.
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
) -> tuple[Tensor, Tensor]:
    """The operator `mixflow_fast::velocity_loss`.

    Arguments are those that `MixFlow.loss` has checked.

    Args:
        pred: (B, ...) the network's output in x1's shape, or (B, H/p W/p, p p C) tokens; with
            `learn_sigma` it has 2 C channels, of which the second half gets gradient zero.
        x1: (B, ...) the data or its `Moments`, as given to `interpolate`.
        times: (B,) float32, the time of target, score scale and weight; caller's clock.
        seed, ids, x0: where the noise comes from, as given to `interpolate`. An x0 that requires a
            gradient gets one, for prediction="velocity".
        clock, path, prediction, loss_weight: as `MixFlow`.
        weight: float32, () or (B,) or broadcastable to x1; no gradient flows to it.
        reduction: "none" -> (B,), "sum", "mean" over the batch; a sample's loss is its elements'
            mean.
        patch_size: side of the patch of one of pred's tokens; 0: pred has x1's shape.
        impl: "auto", "triton" or "reference".

    Returns:
        (loss, samples), float32 (the reference: float64 for float64 data). `samples` are the (B,)
        losses of the samples, without a gradient: the sums that a "sum" or "mean" was made of, bit
        for bit what "none" gives; for "none" they are empty, as the loss has them.

    Raises:
        ValueError: impl="triton" where it cannot run; too large samples or batches; an x0 that
            requires a gradient beside another prediction than the velocity.
    """
    moments = isinstance(x1, Moments)
    data, std, scale = x1 if moments else (x1, None, 1.0)
    # Outside of the operator, so that tracing refuses it as well.
    if runtime.use_kernels(impl, data.device, pred.dtype, data.dtype):
        check_sample_size(data)
    trained = torch.is_grad_enabled() and x0 is not None and x0.requires_grad
    if trained and prediction != "velocity":
        raise ValueError(
            'x0 may require a gradient with prediction="velocity" alone, got '
            f'prediction={prediction!r}: use impl="reference"'
        )
    with_gradient = torch.is_grad_enabled() and (pred.requires_grad or trained)
    with_gradient = with_gradient and pred.dtype != torch.float16
    loss, _, samples = _velocity_loss_op(
        pred,
        data,
        std,
        float(scale),
        seed,
        ids,
        x0,
        times,
        weight,
        None,
        clock,
        path,
        prediction,
        loss_weight or "none",
        reduction,
        learn_sigma,
        patch_size,
        with_gradient,
        impl,
    )
    return loss, samples
