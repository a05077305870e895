"""Triton kernels of the residual norm: the forward and the backward pass.

Formulas stand in `op.py`, launches in `launch.py`.

The backward pass reads each row once. A program owns some consecutive tokens of one sample and
keeps what is summed over tokens in registers: one float32 row each for scale, shift, gate and
h_bias, written once per program as `partial` (B, tiles, rows, D), which `reduce_kernels.py` adds
up. How many tokens depends on N alone, so a sample's gradients have the same bits in every batch.
"""

from __future__ import annotations

from mixflow_fast.kernels.runtime import jit, tl


@jit
def load_row(ptr, d, mask):
    """A row, or a part of it, in float32."""
    return tl.load(ptr + d, mask=mask, other=0.0).to(tl.float32)


@jit
def _row_mask(inside, row, N, EVEN: tl.constexpr):
    """`inside` where the row is one of the sample's; the interpreter takes no scalar mask here."""
    mask = inside
    if not EVEN:
        mask = inside & (tl.full(inside.shape, row, tl.int64) < N)
    return mask


@jit
def _load_statistic(ptr, row, N, EVEN: tl.constexpr):
    if EVEN:
        value = tl.load(ptr + row)
    else:
        value = tl.load(ptr + row, mask=row < N, other=0.0)
    return value


@jit
def _store_statistic(ptr, row, value, N, EVEN: tl.constexpr):
    if EVEN:
        tl.store(ptr + row, value)
    else:
        tl.store(ptr + row, value, mask=row < N)


@jit
def store_row(ptr, d, value, mask):
    """A row, or a part of it, rounded to the dtype of the tensor."""
    tl.store(ptr + d, value.to(ptr.dtype.element_ty), mask=mask)


@jit
def _residual_norm_forward_kernel(
    x_ptr,
    h_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    h_bias_ptr,
    weight_ptr,
    x_new_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    x_sample_stride,
    x_row_stride,
    h_sample_stride,
    h_row_stride,
    gate_sample_stride,
    gate_row_stride,
    shift_sample_stride,
    shift_row_stride,
    scale_sample_stride,
    scale_row_stride,
    N,
    tiles,
    eps,
    D: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_H_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LAYER: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    index = tl.program_id(0)
    sample = (index // tiles).to(tl.int64)
    first = (index % tiles) * ROWS
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x_ptr += sample * x_sample_stride
    h_ptr += sample * h_sample_stride
    gate_ptr += sample * gate_sample_stride
    shift_ptr += sample * shift_sample_stride
    scale_ptr += sample * scale_sample_stride
    gate = tl.zeros((BLOCK_D,), tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    factor = tl.zeros((BLOCK_D,), tl.float32)
    h_bias = tl.zeros((BLOCK_D,), tl.float32)
    weight = tl.full((BLOCK_D,), 1.0, tl.float32)
    if HAS_H_BIAS:
        h_bias = load_row(h_bias_ptr, d, inside)
    if HAS_WEIGHT:
        weight = load_row(weight_ptr, d, inside)
    if not PER_TOKEN:
        factor = (1.0 + load_row(scale_ptr, d, inside)) * weight
        if HAS_SHIFT:
            shift = load_row(shift_ptr, d, inside)
        if HAS_H:
            gate = load_row(gate_ptr, d, inside)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        row = (first + i).to(tl.int64)
        mask = _row_mask(inside, row, N, EVEN)
        at = (sample * N + row) * D
        x = load_row(x_ptr + row * x_row_stride, d, mask)
        if HAS_H:
            h = load_row(h_ptr + row * h_row_stride, d, mask)
            if PER_TOKEN:
                gate = load_row(gate_ptr + row * gate_row_stride, d, mask)
            if HAS_H_BIAS:
                h += h_bias
            # y is the norm of x' as it is stored: the backward pass has nothing else.
            x_new = (x + gate * h).to(x_new_ptr.dtype.element_ty)
            tl.store(x_new_ptr + at + d, x_new, mask=mask)
            x = tl.where(mask, x_new.to(tl.float32), 0.0)  # h_bias is there beyond the last row
        if LAYER:
            mean = tl.sum(x, axis=0) * (1.0 / D)
            _store_statistic(mean_ptr + sample * N, row, mean, N, EVEN)
            x = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) * (1.0 / D) + eps)
        _store_statistic(rstd_ptr + sample * N, row, rstd, N, EVEN)
        if PER_TOKEN:
            factor = (1.0 + load_row(scale_ptr + row * scale_row_stride, d, mask)) * weight
            if HAS_SHIFT:
                shift = load_row(shift_ptr + row * shift_row_stride, d, mask)
        store_row(y_ptr + at, d, x * rstd * factor + shift, mask)


@jit
def _residual_norm_backward_kernel(
    dy_ptr,
    dx_new_ptr,
    x_new_ptr,
    h_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    h_bias_ptr,
    weight_ptr,
    dx_ptr,
    dh_ptr,
    y_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    partial_ptr,
    dy_sample_stride,
    dy_row_stride,
    dx_new_sample_stride,
    dx_new_row_stride,
    x_new_sample_stride,
    x_new_row_stride,
    h_sample_stride,
    h_row_stride,
    gate_sample_stride,
    gate_row_stride,
    shift_sample_stride,
    shift_row_stride,
    scale_sample_stride,
    scale_row_stride,
    N,
    tiles,
    D: tl.constexpr,
    HAS_DX_NEW: tl.constexpr,
    HAS_H: tl.constexpr,
    HAS_H_BIAS: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    LAYER: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DX: tl.constexpr,
    DH: tl.constexpr,
    DGATE: tl.constexpr,
    DSHIFT: tl.constexpr,
    DSCALE: tl.constexpr,
    WITH_Y: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    SHIFT_ROW: tl.constexpr,
    GATE_ROW: tl.constexpr,
    H_BIAS_ROW: tl.constexpr,
    PARTIALS: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DX..WITH_Y: outputs that are written row by row. *_ROW: row of a sum in `partial`, or -1."""
    index = tl.program_id(0)
    sample = (index // tiles).to(tl.int64)
    first = (index % tiles) * ROWS
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    dy_ptr += sample * dy_sample_stride
    dx_new_ptr += sample * dx_new_sample_stride
    x_new_ptr += sample * x_new_sample_stride
    h_ptr += sample * h_sample_stride
    gate_ptr += sample * gate_sample_stride
    shift_ptr += sample * shift_sample_stride
    scale_ptr += sample * scale_sample_stride
    gate = tl.zeros((BLOCK_D,), tl.float32)
    shift = tl.zeros((BLOCK_D,), tl.float32)
    factor = tl.zeros((BLOCK_D,), tl.float32)
    h_bias = tl.zeros((BLOCK_D,), tl.float32)
    weight = tl.full((BLOCK_D,), 1.0, tl.float32)
    if HAS_H_BIAS:
        h_bias = load_row(h_bias_ptr, d, inside)
    if HAS_WEIGHT:
        weight = load_row(weight_ptr, d, inside)
    if not PER_TOKEN:
        factor = (1.0 + load_row(scale_ptr, d, inside)) * weight
        if HAS_H:
            gate = load_row(gate_ptr, d, inside)
        if HAS_SHIFT:
            shift = load_row(shift_ptr, d, inside)
    weight_sum = tl.zeros((BLOCK_D,), tl.float32)
    shift_sum = tl.zeros((BLOCK_D,), tl.float32)
    gate_sum = tl.zeros((BLOCK_D,), tl.float32)
    h_bias_sum = tl.zeros((BLOCK_D,), tl.float32)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        # Beyond the last row everything is 0, and adds 0 to the sums.
        row = (first + i).to(tl.int64)
        mask = _row_mask(inside, row, N, EVEN)
        at = (sample * N + row) * D
        dy = load_row(dy_ptr + row * dy_row_stride, d, mask)
        normed = load_row(x_new_ptr + row * x_new_row_stride, d, mask)
        rstd = _load_statistic(rstd_ptr + sample * N, row, N, EVEN)
        if LAYER:
            normed -= _load_statistic(mean_ptr + sample * N, row, N, EVEN)
        normed *= rstd
        if PER_TOKEN:
            factor = 1.0 + load_row(scale_ptr + row * scale_row_stride, d, mask)
            if WEIGHT_ROW >= 0:
                weight_sum += dy * factor * normed
            factor *= weight
            if HAS_H:
                gate = load_row(gate_ptr + row * gate_row_stride, d, mask)
            if HAS_SHIFT:
                shift = load_row(shift_ptr + row * shift_row_stride, d, mask)
        elif WEIGHT_ROW >= 0:
            weight_sum += dy * normed
        if WITH_Y:
            # The forward pass's operations on the numbers that it stored, in its order: the same
            # bits. A compiler that contracted them otherwise would change the rounding, and no
            # more is asked of y here, which only a gradient of weights is made of.
            store_row(y_ptr + at, d, normed * factor + shift, mask)
        if SHIFT_ROW >= 0:
            shift_sum += dy
        if DSCALE:
            store_row(dscale_ptr + at, d, dy * normed * weight, mask)
        if DSHIFT:
            store_row(dshift_ptr + at, d, dy, mask)
        total = dy * factor
        mean_product = tl.sum(total * normed, axis=0) * (1.0 / D)
        mean_total = 0.0
        if LAYER:
            mean_total = tl.sum(total, axis=0) * (1.0 / D)
        total = total * rstd - mean_total * rstd
        total -= normed * (mean_product * rstd)
        if HAS_DX_NEW:
            total += load_row(dx_new_ptr + row * dx_new_row_stride, d, mask)
        if DX:
            store_row(dx_ptr + at, d, total, mask)
        if DH:
            store_row(dh_ptr + at, d, gate * total, mask)
        if DGATE or GATE_ROW >= 0:
            h = load_row(h_ptr + row * h_row_stride, d, mask) + h_bias
            if DGATE:
                store_row(dgate_ptr + at, d, total * h, mask)
            if GATE_ROW >= 0:
                gate_sum += total * h
        if H_BIAS_ROW >= 0:
            # A gate that all tokens share is multiplied with the sum, by the kernel that adds up.
            if PER_TOKEN:
                h_bias_sum += gate * total
            else:
                h_bias_sum += total
    partial_ptr += index.to(tl.int64) * (PARTIALS * D)
    if WEIGHT_ROW >= 0:
        store_row(partial_ptr + WEIGHT_ROW * D, d, weight_sum, inside)
    if SHIFT_ROW >= 0:
        store_row(partial_ptr + SHIFT_ROW * D, d, shift_sum, inside)
    if GATE_ROW >= 0:
        store_row(partial_ptr + GATE_ROW * D, d, gate_sum, inside)
    if H_BIAS_ROW >= 0:
        store_row(partial_ptr + H_BIAS_ROW * D, d, h_bias_sum, inside)
