"""Products of the fused block whose gradients cost less than autograd's own.

`linear_leading_bias` sums fewer columns. The others keep less between the passes: what they
multiply is recomputed by the pass that computes its gradient anyway, for one more write.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.kernels.activations.gelu import gelu, gelu_recompute
from mixflow_fast.kernels.activations.swiglu import swiglu, swiglu_recompute
from mixflow_fast.kernels.residual_norm.recompute import (
    residual_norm_forward,
    residual_norm_recompute,
)

# (h, h_bias, gate) of gate (h + h_bias), which is still to be added to the residual stream.
Pending = tuple[Tensor, Tensor, Tensor]


class _Context(Protocol):
    """What PyTorch hands to both passes of a Function, with what these ones add to it."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    leading: int  # columns of the product that have a bias
    gated: bool
    norm: str
    impl: str

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """What autocast would make of a linear's inputs; it does not see into a Function."""
    device = tensors[0].device.type
    # PyTorch has no answer for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T with a bias on the first columns only."""
    if bias is not None:
        # F.linear takes a bias for all columns or for none.
        bias = F.pad(bias, (0, weight.shape[0] - bias.shape[0]))
    return F.linear(x, weight, bias)


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'checkpointing="elementwise" has no second derivatives (create_graph=True): use '
            'checkpointing="none", impl="reference"'
        )


class _LinearLeadingBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leading = bias.shape[0]
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)  # two dimensions: one product instead of a batch of them
        dx = (rows @ weight).view(x.shape)
        dbias = rows[:, : ctx.leading].sum(0)
        return dx, rows.t() @ x.flatten(0, -2), dbias


class _ActivatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, x: Tensor, bias: Tensor, weight: Tensor, gated: bool, impl: str
    ) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        ctx.gated, ctx.impl = gated, impl
        return F.linear((swiglu if gated else gelu)(x, bias, impl=impl), weight)

    @staticmethod
    def backward(ctx: _Context, dh: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x, bias, weight = ctx.saved_tensors
        recompute = swiglu_recompute if ctx.gated else gelu_recompute
        dx, dbias, y = recompute(dh @ weight, x, bias, impl=ctx.impl)
        return dx, dbias, dh.flatten(0, -2).t() @ y.flatten(0, -2), None, None


class _NormedProduct(torch.autograd.Function):
    """(x', y W^T), or y W^T alone without h. The first seven inputs and the weight stand in the
    order of `residual_norm_recompute`'s results, where the weight's gradient asks for y.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        h: Tensor | None,
        gate: Tensor | None,
        shift: Tensor | None,
        scale: Tensor,
        h_bias: Tensor | None,
        norm_weight: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        norm: str,
        eps: float,
        impl: str,
    ) -> tuple[Tensor, Tensor] | Tensor:
        ctx.norm, ctx.impl = norm, impl
        ctx.leading = 0 if bias is None else bias.shape[0]
        x_new, y, mean, rstd = residual_norm_forward(
            x,
            h,
            gate,
            shift,
            scale,
            h_bias=h_bias,
            weight=norm_weight,
            norm=norm,
            eps=eps,
            impl=impl,
        )
        ctx.save_for_backward(x_new, h, gate, shift, scale, mean, rstd, h_bias, norm_weight, weight)
        product = _linear(y.to(weight.dtype), weight, bias)
        return product if h is None else (x_new, product)

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        x_new, h, gate, shift, scale, mean, rstd, h_bias, norm_weight, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx_new, dz = (None, *upstream)[-2:]  # without h there is one output
        rows = dz.flatten(0, -2)
        dy = (rows @ weight).view(x_new.shape)
        *gradients, y = residual_norm_recompute(
            dy,
            dx_new,
            x_new,
            h,
            gate,
            shift,
            scale,
            mean,
            rstd,
            needs[:8],
            h_bias=h_bias,
            weight=norm_weight,
            norm=ctx.norm,
            impl=ctx.impl,
        )
        dweight = None if y is None else rows.t() @ y.flatten(0, -2).to(rows.dtype)
        # A sum over all tokens, and only over the columns that have a bias.
        dbias = rows[:, : ctx.leading].sum(0) if needs[8] else None
        return *gradients, dweight, dbias, None, None, None


def linear_leading_bias(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T with a bias on the first columns only: its gradient sums no other columns.

    Args:
        x: (B, N, D).
        weight: (F, D).
        bias: (leading,), leading <= F.
    """
    return _LinearLeadingBias.apply(*_autocast(x, weight, bias))


def activated_product(x: Tensor, bias: Tensor, weight: Tensor, gated: bool, impl: str) -> Tensor:
    """act(x + bias) W^T without keeping the activation.

    Args:
        x: (B, N, F), the product before the activation; 2 F columns where `gated`.
        bias: bias of the columns of x.
        weight: (D, F).
        gated: SwiGLU instead of GELU.
        impl: implementation of the operators.
    """
    x, weight = _autocast(x, weight)
    return _ActivatedProduct.apply(x, bias, weight, gated, impl)


def normed_product(
    x: Tensor,
    pending: Pending | None,
    shift: Tensor | None,
    scale: Tensor,
    product: tuple[Tensor, Tensor | None],
    *,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x', y W^T) of a residual norm's (x', y) without keeping y; x' is x where nothing is pending.

    Args:
        x: (B, N, D).
        pending: see `Pending`.
        shift, scale, weight, norm, eps, impl: as for `kernels.residual_norm.residual_norm`.
        product: W (F, D), and a bias of its first columns as in `linear_leading_bias` or None.
    """
    h, h_bias, gate = pending or (None, None, None)
    matrix, bias = _autocast(*product)
    out = _NormedProduct.apply(
        x, h, gate, shift, scale, h_bias, weight, matrix, bias, norm, eps, impl
    )
    return (x, out) if h is None else out
