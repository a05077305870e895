"""GELU in its tanh form, with the bias of the linear layer before it.

    y = gelu(z),  z = x + bias,  gelu(z) = z/2 (1 + tanh(u)) = z sigmoid(2u),
    u = sqrt(2/pi) (z + 0.044715 z^3)                                    (arXiv 1606.08415)
    dx = dy (sigmoid(2u) + z sigmoid'(2u) 2u'),  dbias = sum over rows of dx

x is the product alone, without its bias: adding it here is free, and so is its gradient, which is
otherwise a pass of its own over dx, the widest gradient of a transformer block. Only x and bias are
kept for the backward pass. In bf16 the forward pass moves 4 bytes an element, the backward pass 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.activations.rows import (
    FORWARD_ROWS,
    LOG2_E,
    check_arguments,
    launch_add_strips,
    load_bias,
    resolve,
    sigmoid_and_slope,
    strip_rows,
    strip_start,
    strips,
    sum_rows,
    tiling,
)
from mixflow_fast.kernels.runtime import compute_dtype, jit, tl

# 2u = z (LINEAR + CUBIC z^2)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = LINEAR * 0.044715
# Rows of each tensor that a thread has in flight.
LOADS = 8


def gelu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`gelu` in plain, differentiable PyTorch; computes float32, or float64 for float64 x."""
    z = x.to(compute_dtype(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    return functional.gelu(z, approximate="tanh").to(x.dtype)


def _backward_reference(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, y) in closed form: autograd records nothing inside of an operator."""
    z = x.to(compute_dtype(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    dz = torch.ops.aten.gelu_backward(dy.to(z.dtype), z, approximate="tanh")
    _, dbias, y = _empty(x, bias, with_dbias, with_y)
    if with_dbias:
        dbias.copy_(dz.sum_to_size(dbias.shape))
    if with_y:
        y.copy_(gelu_reference(x, bias))
    return dz.to(x.dtype).contiguous(), dbias, y


@jit
def _gelu_forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    units,
    blocks,
    rows,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    F = units * ALIGN
    strip, column = strip_start(blocks, BLOCK_F)
    bias = load_bias(bias_ptr, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    tile = tl.arange(0, R * WARPS)[:, None]
    for start in range(0, rows, R * WARPS):
        row = strip * rows + start
        mask = (tile < tl.minimum(M - row, R * WARPS).to(tl.int32)) & (column < F)[None, :]
        offset = tile * F + column[None, :]
        z = tl.load(x_ptr + row * F + offset, mask=mask, other=0.0).to(tl.float32) + bias
        # exp2 overflows to inf and 1 / inf is 0: right, and two operations less.
        y = z / (1.0 + tl.exp2(-z * (LOG2_E * LINEAR + (LOG2_E * CUBIC) * (z * z))))
        tl.store(y_ptr + row * F + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _gelu_backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    partial_ptr,
    y_ptr,
    M,
    units,
    blocks,
    rows,
    LINEAR: tl.constexpr,
    CUBIC: tl.constexpr,
    LOG2_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WITH_DBIAS: tl.constexpr,
    WITH_Y: tl.constexpr,
    ALIGN: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    F = units * ALIGN
    strip, column = strip_start(blocks, BLOCK_F)
    bias = load_bias(bias_ptr, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    total = tl.zeros((WARPS, BLOCK_F), tl.float32)
    tile = tl.arange(0, R * WARPS)[:, None]
    for start in range(0, rows, R * WARPS):
        row = strip * rows + start
        mask = (tile < tl.minimum(M - row, R * WARPS).to(tl.int32)) & (column < F)[None, :]
        offset = tile * F + column[None, :]
        z = tl.load(x_ptr + row * F + offset, mask=mask, other=0.0).to(tl.float32) + bias
        dy = tl.load(dy_ptr + row * F + offset, mask=mask, other=0.0).to(tl.float32)
        square = z * z
        v = z * (LOG2_E * LINEAR + (LOG2_E * CUBIC) * square)
        value, slope = sigmoid_and_slope(v)
        # The slope is multiplied first: it is 0 where the cubic would overflow.
        dz = dy * (value + (slope * z) * (LINEAR + (3 * CUBIC) * square))
        tl.store(dx_ptr + row * F + offset, dz.to(dx_ptr.dtype.element_ty), mask=mask)
        if WITH_Y:
            y = z * value
            tl.store(y_ptr + row * F + offset, y.to(y_ptr.dtype.element_ty), mask=mask)
        if WITH_DBIAS:
            total += sum_rows(dz, R, WARPS, BLOCK_F)
    if WITH_DBIAS:
        tl.store(partial_ptr + strip * F + column, tl.sum(total, axis=0), mask=column < F)


def _launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(x.shape)
    if not x.numel():
        return y
    F = x.shape[-1]
    x = x.contiguous()
    grid, arguments = tiling(x.numel() // F, F, FORWARD_ROWS, LOADS, x.element_size())
    with runtime.on_device(x):
        _gelu_forward_kernel[grid](
            x,
            x if bias is None else bias.contiguous(),
            y,
            LINEAR=LINEAR,
            CUBIC=CUBIC,
            LOG2_E=LOG2_E,
            HAS_BIAS=bias is not None,
            **arguments,
        )
    return y


def _launch_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dbias, y = _empty(x, bias, with_dbias, with_y)
    if not x.numel():
        return dx, dbias.zero_(), y
    F = x.shape[-1]
    M = x.numel() // F
    dy, x = dy.contiguous(), x.contiguous()
    # float32 whatever x is: sums over all rows of a batch do not fit 16 bits.
    partial = x.new_empty((strips(M, F) if with_dbias else 0, F), dtype=torch.float32)
    # With a mask for the last rows, registers would spill.
    loads = LOADS if M % 16 == 0 else LOADS // 2
    grid, arguments = tiling(M, F, strip_rows(M, F), loads, x.element_size())
    with runtime.on_device(x):
        _gelu_backward_kernel[grid](
            dy,
            x,
            x if bias is None else bias.contiguous(),
            dx,
            partial,
            y,
            LINEAR=LINEAR,
            CUBIC=CUBIC,
            LOG2_E=LOG2_E,
            HAS_BIAS=bias is not None,
            WITH_DBIAS=with_dbias,
            WITH_Y=with_y,
            **arguments,
        )
        if with_dbias:
            launch_add_strips(partial, dbias)
    return dx, dbias, y


def gelu_bytes(x: Tensor, bias: Tensor | None, backward: bool, with_y: bool = False) -> int:
    """Bytes that the kernels of one pass move, for contiguous tensors and a trained bias.

    Partial sums count twice, written and read. `with_y`: the backward pass recomputes y.
    """
    F = x.shape[-1]
    vector = 0 if bias is None else bias.numel() * bias.element_size()
    data = x.numel() * x.element_size()
    if not backward:
        return 2 * data + vector
    partial = 0 if bias is None else 4 * F * strips(x.numel() // max(F, 1), F)
    return (4 if with_y else 3) * data + 2 * vector + 2 * partial


def _empty(
    x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(
        x.shape[-1:] if with_dbias else (0,), dtype=x.dtype if bias is None else bias.dtype
    )
    return x.new_empty(x.shape), dbias, x.new_empty(x.shape if with_y else (0,))


@torch.library.custom_op("mixflow_fast::gelu", mutates_args=())
def _gelu_op(x: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    if impl == "triton":
        return _launch_forward(x, bias)
    return gelu_reference(x, bias).contiguous()


@_gelu_op.register_fake
def _(x, bias, impl):
    return x.new_empty(x.shape)


@torch.library.custom_op("mixflow_fast::gelu_backward", mutates_args=())
def _gelu_backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, y); dbias and y have no elements where they are not asked for."""
    compute = _launch_backward if impl == "triton" else _backward_reference
    return compute(dy, x, bias, with_dbias, with_y)


@_gelu_backward_op.register_fake
def _(dy, x, bias, with_dbias, with_y, impl):
    return _empty(x, bias, with_dbias, with_y)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'the fused GELU has no second derivatives (create_graph=True): use impl="reference"'
        )
    needs_dx, needs_dbias = ctx.needs_input_grad[:2]
    dx, dbias, _ = _gelu_backward_op(dy, *ctx.saved_tensors, needs_dbias, False, ctx.impl)
    # dx is made in any case, by the pass that dbias needs.
    return dx if needs_dx else None, dbias if needs_dbias else None, None


_gelu_op.register_autograd(_backward, setup_context=_setup_context)


def gelu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """y = gelu(x + bias) in the tanh form; the sum is not rounded to x's dtype.

    Args:
        x: (..., F) floating point, the product of a linear layer without its bias. Contiguous, or
            it is copied. Rows of a multiple of 8 elements are read 128 bits at once.
        bias: (F,) floating point, its dtype may be another (float32 beside bfloat16 under
            autocast), or None.
        impl: "auto" and "triton" call the operator `mixflow_fast::gelu`, which has no second
            derivatives ("auto" runs plain PyTorch inside of it where kernels cannot run);
            "reference" is `gelu_reference`.

    Returns:
        (..., F) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; impl="triton" where it cannot run.
    """
    check_arguments(x, bias)
    if impl == "reference":
        return gelu_reference(x, bias)
    return _gelu_op(x, bias, resolve(impl, x, bias))


def gelu_recompute(
    dy: Tensor, x: Tensor, bias: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `gelu` that also recomputes its output, which then need not be kept.

    Args:
        dy: gradient of the output.
        x, bias: as given to `gelu`.

    Returns:
        (dx, dbias, y); nothing here is recorded by autograd.
    """
    impl = "reference" if impl == "reference" else resolve(impl, x, bias)
    return _gelu_backward_op(dy, x, bias, True, True, impl)
