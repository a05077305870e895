"""Residual add, norm and modulation between two branches of an adaLN transformer block.

    x' = x + gate * (h + h_bias)
    y  = norm(x') * weight * (1 + scale) + shift

norm is LayerNorm without affine, (x' - mean(x')) rstd, or RMSNorm, x' rstd; rstd is that of the D
numbers of a token, with eps inside of the root (adaLN-Zero: DiT, arXiv 2212.09748; SiT, arXiv
2401.08740). With the upstream gradients dx' and dy, over the D numbers of a token:

    g     = dy * (1 + scale) * weight,   n = norm(x')
    total = dx' + rstd * (g - mean(g) - n * mean(g * n))              (RMSNorm: without mean(g))
    dx = total,   dh = gate * total,   dgate = total * (h + h_bias),   dshift = dy
    dscale = dy * n * weight,   dh_bias = sum of dh,   dweight = sum of dy * n * (1 + scale)

dgate, dshift and dscale are summed over the tokens where gate, shift and scale are per sample.

Forward: reads x and h, writes x' and y. Backward: reads dy, dx', x' and h, writes dx and dh, and
recomputes y where it was not kept: everything that y is made of passes through this kernel anyway.
The sums over tokens are part of the same pass: partial sums in registers go to memory once per
program, and small kernels add them in a fixed order, without atomics. Two runs give the same bits,
and all but dh_bias and dweight are the same for a sample alone or in a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels.residual_norm.checks import check_arguments, resolve
from mixflow_fast.kernels.residual_norm.launch import Needs, launch_backward, launch_forward
from mixflow_fast.kernels.residual_norm.reference import (
    gradients_reference,
    modulated_norm_reference,
    residual_norm_reference,
    stored_statistics,
)
from mixflow_fast.kernels.runtime import compute_dtype


@torch.library.custom_op("mixflow_fast::residual_norm", mutates_args=())
def residual_norm_op(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    h_bias: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean, rstd); mean and rstd are (B, N) float32, mean is empty for norm="rms"."""
    if impl == "triton":
        return launch_forward(x, h, gate, shift, scale, h_bias, weight, norm, eps)
    options = dict(weight=weight, norm=norm, eps=eps)
    x_new, y = residual_norm_reference(x, h, gate, shift, scale, h_bias=h_bias, **options)
    return x_new.contiguous(), y.contiguous(), *stored_statistics(x_new, norm, eps)


@torch.library.custom_op("mixflow_fast::modulated_norm", mutates_args=())
def modulated_norm_op(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    norm: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd)."""
    if impl == "triton":
        return launch_forward(x, None, None, shift, scale, None, weight, norm, eps)[1:]
    y = modulated_norm_reference(x, shift, scale, weight=weight, norm=norm, eps=eps)
    return y.contiguous(), *stored_statistics(x, norm, eps)


def _empty_statistics(x: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    B, N, _ = x.shape
    dtype = compute_dtype(x)
    mean = x.new_empty((B, N) if norm == "layer" else (0,), dtype=dtype)
    return mean, x.new_empty((B, N), dtype=dtype)


@residual_norm_op.register_fake
def _(x, h, gate, shift, scale, h_bias, weight, norm, eps, impl):
    return x.new_empty(x.shape), x.new_empty(x.shape), *_empty_statistics(x, norm)


@modulated_norm_op.register_fake
def _(x, shift, scale, weight, norm, eps, impl):
    return x.new_empty(x.shape), *_empty_statistics(x, norm)


@torch.library.custom_op("mixflow_fast::residual_norm_backward", mutates_args=())
def residual_norm_backward_op(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    h_bias: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: list[bool],
    h_dtype: torch.dtype,
    gate_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    h_bias_dtype: torch.dtype,
    norm: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dh, dgate, dshift, dscale, dh_bias, dweight, y), empty where `needs` says no.

    h may be missing where dgate is not needed, gate where neither dh nor dh_bias is, and shift
    where y is not.
    """
    inputs = dy, dx_new, x_new, h, gate, shift, scale, h_bias, weight, mean, rstd
    outputs = _empty_outputs(
        x_new, scale, weight, needs, h_dtype, gate_dtype, shift_dtype, h_bias_dtype
    )
    if impl == "triton":
        launch_backward(*inputs, outputs, Needs(*needs), norm)
    else:
        values = gradients_reference(*inputs, norm, Needs(*needs).y)
        for output, value, needed in zip(outputs, values, needs, strict=True):
            if needed:
                output.copy_(value)
    return outputs


def _empty_outputs(
    x: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    needs: list[bool],
    h_dtype: torch.dtype,
    gate_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    h_bias_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """Outputs of the backward operator, not yet written."""
    shapes = (*[x.shape] * 2, *[scale.shape] * 3, *[x.shape[-1:]] * 2, x.shape)
    dtypes = (x.dtype, h_dtype, gate_dtype, shift_dtype, scale.dtype, h_bias_dtype)
    dtypes += ((x if weight is None else weight).dtype, x.dtype)
    return tuple(
        x.new_empty(shape if needed else (0,), dtype=dtype)
        for shape, needed, dtype in zip(shapes, needs, dtypes, strict=True)
    )


@residual_norm_backward_op.register_fake
def _(
    dy,
    dx_new,
    x_new,
    h,
    gate,
    shift,
    scale,
    h_bias,
    weight,
    mean,
    rstd,
    needs,
    h_dtype,
    gate_dtype,
    shift_dtype,
    h_bias_dtype,
    norm,
    impl,
):
    return _empty_outputs(
        x_new, scale, weight, needs, h_dtype, gate_dtype, shift_dtype, h_bias_dtype
    )


def dtypes_of(x: Tensor, *given: Tensor | None) -> list[torch.dtype]:
    """The dtypes of gradients: an input that is not given counts as x."""
    return [(x if v is None else v).dtype for v in given]


def _save(ctx, inputs: tuple, x_new: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Keeps the tensors that the backward pass reads; inputs as `residual_norm_op` takes them."""
    x, h, gate, shift, scale, h_bias, weight, norm, _, impl = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    needs = Needs(*ctx.residual_norm_needs)
    ctx.dtypes = dtypes_of(x, h, gate, shift, h_bias)
    ctx.norm, ctx.impl = norm, impl
    # Not kept without need: h is as large as the stream.
    h, h_bias = (h, h_bias) if needs.dgate else (None, None)
    gate = gate if needs.dh or needs.dh_bias else None
    ctx.save_for_backward(x_new, h, gate, scale, h_bias, weight, mean, rstd)


def _backward(ctx, dx_new: Tensor | None, dy: Tensor | None) -> list[Tensor | None]:
    needs = ctx.residual_norm_needs
    if dx_new is None and dy is None:
        return [None] * len(needs)
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused residual norm has no second derivatives (create_graph=True): use "
            'impl="reference"'
        )
    x_new, h, gate, scale, h_bias, weight, mean, rstd = ctx.saved_tensors
    h_dtype, gate_dtype, shift_dtype, h_bias_dtype = ctx.dtypes
    outputs = residual_norm_backward_op(
        torch.zeros_like(x_new) if dy is None else dy,
        dx_new,
        x_new,
        h,
        gate,
        None,
        scale,
        h_bias,
        weight,
        mean,
        rstd,
        [*needs, False],
        h_dtype,
        gate_dtype,
        shift_dtype,
        h_bias_dtype,
        ctx.norm,
        ctx.impl,
    )
    return [v if needed else None for v, needed in zip(outputs, needs, strict=False)]


def _setup_residual_norm(ctx, inputs, output) -> None:
    x_new, _, mean, rstd = output
    ctx.residual_norm_needs = list(ctx.needs_input_grad[:7])
    _save(ctx, inputs, x_new, mean, rstd)


def _residual_norm_backward(ctx, dx_new: Tensor | None, dy: Tensor | None, *_) -> tuple:
    return *_backward(ctx, dx_new, dy), None, None, None


def _setup_modulated_norm(ctx, inputs, output) -> None:
    x, shift, scale, weight, *options = inputs
    dx, dshift, dscale, dweight = ctx.needs_input_grad[:4]
    ctx.residual_norm_needs = [dx, False, False, dshift, dscale, False, dweight]
    _save(ctx, (x, None, None, shift, scale, None, weight, *options), x, *output[1:])


def _modulated_norm_backward(ctx, dy: Tensor | None, *_) -> tuple:
    dx, _, _, dshift, dscale, _, dweight = _backward(ctx, None, dy)
    return dx, dshift, dscale, dweight, None, None, None


residual_norm_op.register_autograd(_residual_norm_backward, setup_context=_setup_residual_norm)
modulated_norm_op.register_autograd(_modulated_norm_backward, setup_context=_setup_modulated_norm)


def residual_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    h_bias: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream, and norms and modulates it for the next one.

        x' = x + gate * (h + h_bias),   y = norm(x') * weight * (1 + scale) + shift

    Floating-point dtypes may differ; x' and y have x's, gradients those of their inputs. Sums are
    float32 (float64 for float64 x), and y is the norm of x' as it was rounded to x's dtype.

    Args:
        x, h: (B, N, D), the residual stream and the branch's output.
        gate, shift, scale: all (B, D) or all (B, N, D); shift may be None. Chunks of one larger
            tensor are read in place.
        h_bias: (D,) or None, the bias of the layer that made h: its gradient is then free.
        weight: (D,) or None, learned weight of the norm.
        norm: "layer" (LayerNorm without affine) or "rms" (RMSNorm).
        eps: added to the variance or the mean square.
        impl: "auto" and "triton" call the operator `mixflow_fast::residual_norm`, which has no
            second derivatives ("auto" runs plain PyTorch inside of it where kernels cannot run);
            "reference" is `residual_norm_reference`.

    Returns:
        (x', y), both (B, N, D), contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; impl="triton" where it cannot run.
    """
    modulation = {"scale": scale, "gate": gate, "shift": shift}
    check_arguments(x, h, modulation, {"h_bias": h_bias, "weight": weight}, norm)
    if impl == "reference":
        options = dict(h_bias=h_bias, weight=weight, norm=norm, eps=eps)
        return residual_norm_reference(x, h, gate, shift, scale, **options)
    impl = resolve(impl, x, h, gate, shift, scale, h_bias, weight)
    return residual_norm_op(x, h, gate, shift, scale, h_bias, weight, norm, float(eps), impl)[:2]


def modulated_norm(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """y = norm(x) * weight * (1 + scale) + shift: a residual norm without a branch to add.

    Args, Raises: as `residual_norm`; the operator is `mixflow_fast::modulated_norm`.

    Returns:
        y, (B, N, D) in x's dtype, contiguous.
    """
    check_arguments(x, None, {"scale": scale, "shift": shift}, {"weight": weight}, norm)
    if impl == "reference":
        return modulated_norm_reference(x, shift, scale, weight=weight, norm=norm, eps=eps)
    impl = resolve(impl, x, shift, scale, weight)
    return modulated_norm_op(x, shift, scale, weight, norm, float(eps), impl)[0]
