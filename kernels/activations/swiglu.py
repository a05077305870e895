"""SwiGLU: the gated linear unit of a joint projection, with that projection's bias.

    (a, b) = split(x + bias),  y = silu(a) b,  silu(a) = a sigmoid(a)    (arXiv 2002.05202)
    da = dy b (sigmoid(a) + a sigmoid'(a)),  db = dy silu(a),  dbias = sum over rows of (da, db)

x is the product alone, without its bias: adding it here is free, and so is its gradient, which is
otherwise a pass of its own over dx. Only x and bias are kept for the backward pass. In bf16 the
forward pass moves 6 bytes an element of y, the backward pass 10.
"""

from __future__ import annotations

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

# Rows of each tensor that a thread has in flight: with more, registers spill.
FORWARD_LOADS, BACKWARD_LOADS = 2, 4


def _halves(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    z = x.to(compute_dtype(x))
    if bias is not None:
        z = z + bias.to(z.dtype)
    a, b = z.chunk(2, dim=-1)
    return a, b


def swiglu_reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`swiglu` in plain, differentiable PyTorch; computes float32, or float64 for float64 x."""
    a, b = _halves(x, bias)
    return (functional.silu(a) * b).to(x.dtype)


def _backward_reference(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, y) in closed form: autograd records nothing inside of an operator."""
    a, b = _halves(x, bias)
    dy = dy.to(a.dtype)
    da = torch.ops.aten.silu_backward(dy * b, a)
    dz = torch.cat([da, dy * functional.silu(a)], dim=-1)
    _, dbias, y = _empty(x, bias, with_dbias, with_y)
    if with_dbias:
        dbias.copy_(dz.sum_to_size(dbias.shape))
    if with_y:
        y.copy_(swiglu_reference(x, bias))
    return dz.to(x.dtype).contiguous(), dbias, y


@jit
def _swiglu_forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    M,
    units,
    blocks,
    rows,
    LOG2_E: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ALIGN: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    F = units * ALIGN
    strip, column = strip_start(blocks, BLOCK_F)
    bias_a = load_bias(bias_ptr, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    bias_b = load_bias(bias_ptr + F, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    tile = tl.arange(0, R * WARPS)[:, None]
    for start in range(0, rows, R * WARPS):
        row = strip * rows + start
        mask = (tile < tl.minimum(M - row, R * WARPS).to(tl.int32)) & (column < F)[None, :]
        offset = tile * F + column[None, :]
        at = x_ptr + row * (2 * F) + (offset + tile * F)
        a = tl.load(at, mask=mask, other=0.0).to(tl.float32) + bias_a
        b = tl.load(at + F, mask=mask, other=0.0).to(tl.float32) + bias_b
        # exp2 overflows to inf and 1 / inf is 0: right, and two operations less.
        y = a / (1.0 + tl.exp2(-LOG2_E * a)) * b
        tl.store(y_ptr + row * F + offset, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _swiglu_backward_kernel(
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
    bias_a = load_bias(bias_ptr, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    bias_b = load_bias(bias_ptr + F, column, F, HAS_BIAS, R, WARPS, BLOCK_F)
    total_a = tl.zeros((WARPS, BLOCK_F), tl.float32)
    total_b = tl.zeros((WARPS, BLOCK_F), tl.float32)
    tile = tl.arange(0, R * WARPS)[:, None]
    for start in range(0, rows, R * WARPS):
        row = strip * rows + start
        mask = (tile < tl.minimum(M - row, R * WARPS).to(tl.int32)) & (column < F)[None, :]
        offset = tile * F + column[None, :]
        wide = row * (2 * F) + (offset + tile * F)
        a = tl.load(x_ptr + wide, mask=mask, other=0.0).to(tl.float32) + bias_a
        b = tl.load(x_ptr + F + wide, mask=mask, other=0.0).to(tl.float32) + bias_b
        dy = tl.load(dy_ptr + row * F + offset, mask=mask, other=0.0).to(tl.float32)
        value, slope = sigmoid_and_slope(LOG2_E * a)
        dtype: tl.constexpr = dx_ptr.dtype.element_ty
        da = dy * b * (value + a * slope)
        tl.store(dx_ptr + wide, da.to(dtype), mask=mask)
        if WITH_DBIAS:
            total_a += sum_rows(da, R, WARPS, BLOCK_F)
        db = dy * (a * value)
        tl.store(dx_ptr + F + wide, db.to(dtype), mask=mask)
        if WITH_Y:
            y = a * value * b
            tl.store(y_ptr + row * F + offset, y.to(dtype), mask=mask)
        if WITH_DBIAS:
            total_b += sum_rows(db, R, WARPS, BLOCK_F)
    if WITH_DBIAS:
        out = partial_ptr + strip * (2 * F) + column
        tl.store(out, tl.sum(total_a, axis=0), mask=column < F)
        tl.store(out + F, tl.sum(total_b, axis=0), mask=column < F)


def _launch_forward(x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.new_empty(_half_shape(x))
    if not x.numel():
        return y
    F = y.shape[-1]
    x = x.contiguous()
    grid, arguments = tiling(y.numel() // F, F, FORWARD_ROWS, FORWARD_LOADS, x.element_size())
    with runtime.on_device(x):
        _swiglu_forward_kernel[grid](
            x,
            x if bias is None else bias.contiguous(),
            y,
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
    F = x.shape[-1] // 2
    M = x.numel() // (2 * F)
    dy, x = dy.contiguous(), x.contiguous()
    # float32 whatever x is: sums over all rows of a batch do not fit 16 bits.
    partial = x.new_empty((strips(M, F) if with_dbias else 0, 2 * F), dtype=torch.float32)
    grid, arguments = tiling(M, F, strip_rows(M, F), BACKWARD_LOADS, x.element_size())
    with runtime.on_device(x):
        _swiglu_backward_kernel[grid](
            dy,
            x,
            x if bias is None else bias.contiguous(),
            dx,
            partial,
            y,
            LOG2_E=LOG2_E,
            HAS_BIAS=bias is not None,
            WITH_DBIAS=with_dbias,
            WITH_Y=with_y,
            **arguments,
        )
        if with_dbias:
            launch_add_strips(partial, dbias)
    return dx, dbias, y


def swiglu_bytes(x: Tensor, bias: Tensor | None, backward: bool, with_y: bool = False) -> int:
    """Bytes that the kernels of one pass move, for contiguous tensors and a trained bias.

    Partial sums count twice, written and read. `with_y`: the backward pass recomputes y.
    """
    F = x.shape[-1] // 2
    vector = 0 if bias is None else bias.numel() * bias.element_size()
    data = x.numel() * x.element_size()
    if not backward:
        return data + data // 2 + vector
    partial = 0 if bias is None else 4 * 2 * F * strips(x.numel() // max(2 * F, 1), F)
    y = data // 2 if with_y else 0
    return 2 * data + data // 2 + y + 2 * vector + 2 * partial


def _half_shape(x: Tensor) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2)


def _empty(
    x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(
        x.shape[-1:] if with_dbias else (0,), dtype=x.dtype if bias is None else bias.dtype
    )
    return x.new_empty(x.shape), dbias, x.new_empty(_half_shape(x) if with_y else (0,))


@torch.library.custom_op("mixflow_fast::swiglu", mutates_args=())
def _swiglu_op(x: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    if impl == "triton":
        return _launch_forward(x, bias)
    return swiglu_reference(x, bias).contiguous()


@_swiglu_op.register_fake
def _(x, bias, impl):
    return x.new_empty(_half_shape(x))


@torch.library.custom_op("mixflow_fast::swiglu_backward", mutates_args=())
def _swiglu_backward_op(
    dy: Tensor, x: Tensor, bias: Tensor | None, with_dbias: bool, with_y: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dbias, y); dbias and y have no elements where they are not asked for."""
    compute = _launch_backward if impl == "triton" else _backward_reference
    return compute(dy, x, bias, with_dbias, with_y)


@_swiglu_backward_op.register_fake
def _(dy, x, bias, with_dbias, with_y, impl):
    return _empty(x, bias, with_dbias, with_y)


def _setup_context(ctx, inputs, output) -> None:
    x, bias, ctx.impl = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError(
            'the fused SwiGLU has no second derivatives (create_graph=True): use impl="reference"'
        )
    needs_dx, needs_dbias = ctx.needs_input_grad[:2]
    dx, dbias, _ = _swiglu_backward_op(dy, *ctx.saved_tensors, needs_dbias, False, ctx.impl)
    # dx is made in any case, by the pass that dbias needs.
    return dx if needs_dx else None, dbias if needs_dbias else None, None


_swiglu_op.register_autograd(_backward, setup_context=_setup_context)


def swiglu(x: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """y = silu(a) b for (a, b) = split(x + bias, 2, -1); the sum is not rounded to x's dtype.

    Args:
        x: (..., 2F) floating point, the product of a linear layer without its bias: first what
            goes through the SiLU, then what it gates. Contiguous, or it is copied. Where F is a
            multiple of 8, 128 bits are read at once.
        bias: (2F,) floating point, its dtype may be another (float32 beside bfloat16 under
            autocast), or None.
        impl: "auto" and "triton" call the operator `mixflow_fast::swiglu`, which has no second
            derivatives ("auto" runs plain PyTorch inside of it where kernels cannot run);
            "reference" is `swiglu_reference`.

    Returns:
        (..., F) in x's dtype, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or an odd last dimension; impl="triton"
            where it cannot run.
    """
    check_arguments(x, bias)
    if x.shape[-1] % 2:
        raise ValueError(
            f"x must have an even last dimension, the two halves of SwiGLU, got {x.shape[-1]}"
        )
    if impl == "reference":
        return swiglu_reference(x, bias)
    return _swiglu_op(x, bias, resolve(impl, x, bias))


def swiglu_recompute(
    dy: Tensor, x: Tensor, bias: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `swiglu` that also recomputes its output, which then need not be kept.

    Args:
        dy: gradient of the output.
        x, bias: as given to `swiglu`.

    Returns:
        (dx, dbias, y); nothing here is recorded by autograd.
    """
    impl = "reference" if impl == "reference" else resolve(impl, x, bias)
    return _swiglu_backward_op(dy, x, bias, True, True, impl)
