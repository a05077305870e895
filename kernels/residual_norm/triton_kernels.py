"""Triton kernels of the residual norm: the forward and the backward pass.

Formulas stand in `op.py`, launches in `launch.py`.

The backward pass reads each row once. A program owns some consecutive tokens of one sample and
keeps what is summed over tokens in registers: one float32 row each for scale, shift, gate and
h_bias, written once per program as `partial` (B, tiles, rows, D), which `reduce_kernels.py` adds
up. How many tokens depends on N alone, so a sample's gradients have the same bits in every batch.
"""

from __future__ import annotations

from mixflow_fast.kernels.residual_norm.row_parts import (
    added,
    columns,
    filled,
    inside_of,
    load_parts,
    modulation,
    row_masks,
    row_sum,
    store_parts,
    store_row,
)
from mixflow_fast.kernels.runtime import jit, tl


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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    index = tl.program_id(0)
    sample = (index // tiles).to(tl.int64)
    first = (index % tiles) * ROWS
    d = columns(HEAD, TAIL)
    inside = inside_of(d, D)
    x_ptr += sample * x_sample_stride
    h_ptr += sample * h_sample_stride
    gate_ptr += sample * gate_sample_stride
    shift_ptr += sample * shift_sample_stride
    scale_ptr += sample * scale_sample_stride
    gate = filled(d, 0.0)
    shift = filled(d, 0.0)
    factor = filled(d, 0.0)
    h_bias = filled(d, 0.0)
    weight = filled(d, 1.0)
    if HAS_H_BIAS:
        h_bias = load_parts(h_bias_ptr, d, inside)
    if HAS_WEIGHT:
        weight = load_parts(weight_ptr, d, inside)
    if not PER_TOKEN:
        factor = modulation(scale_ptr, d, inside, weight)
        if HAS_SHIFT:
            shift = load_parts(shift_ptr, d, inside)
        if HAS_H:
            gate = load_parts(gate_ptr, d, inside)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        row = (first + i).to(tl.int64)
        masks = row_masks(inside, row, N, EVEN)
        at = (sample * N + row) * D
        x = load_parts(x_ptr + row * x_row_stride, d, masks)
        if HAS_H:
            h = load_parts(h_ptr + row * h_row_stride, d, masks)
            if PER_TOKEN:
                gate = load_parts(gate_ptr + row * gate_row_stride, d, masks)
            stored = ()
            for p in tl.static_range(len(d)):
                # y is the norm of x' as it is stored: the backward pass has nothing else.
                x_new = x[p] + gate[p] * (h[p] + h_bias[p] if HAS_H_BIAS else h[p])
                x_new = x_new.to(x_new_ptr.dtype.element_ty)
                tl.store(x_new_ptr + at + d[p], x_new, mask=masks[p])
                # h_bias is there beyond the last row
                stored = stored + (tl.where(masks[p], x_new.to(tl.float32), 0.0),)
            x = stored
        if LAYER:
            mean = row_sum(x, LANES, VECTOR) * (1.0 / D)
            _store_statistic(mean_ptr + sample * N, row, mean, N, EVEN)
            centred = ()
            for p in tl.static_range(len(d)):
                centred = centred + (tl.where(masks[p], x[p] - mean, 0.0),)
            x = centred
        squares = ()
        for p in tl.static_range(len(d)):
            squares = squares + (x[p] * x[p],)
        rstd = tl.rsqrt(row_sum(squares, LANES, VECTOR) * (1.0 / D) + eps)
        _store_statistic(rstd_ptr + sample * N, row, rstd, N, EVEN)
        if PER_TOKEN:
            factor = modulation(scale_ptr + row * scale_row_stride, d, masks, weight)
            if HAS_SHIFT:
                shift = load_parts(shift_ptr + row * shift_row_stride, d, masks)
        for p in tl.static_range(len(d)):
            store_row(y_ptr + at, d[p], x[p] * rstd * factor[p] + shift[p], masks[p])


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
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """DX..WITH_Y: outputs that are written row by row. *_ROW: row of a sum in `partial`, or -1."""
    index = tl.program_id(0)
    sample = (index // tiles).to(tl.int64)
    first = (index % tiles) * ROWS
    d = columns(HEAD, TAIL)
    inside = inside_of(d, D)
    dy_ptr += sample * dy_sample_stride
    dx_new_ptr += sample * dx_new_sample_stride
    x_new_ptr += sample * x_new_sample_stride
    h_ptr += sample * h_sample_stride
    gate_ptr += sample * gate_sample_stride
    shift_ptr += sample * shift_sample_stride
    scale_ptr += sample * scale_sample_stride
    gate = filled(d, 0.0)
    shift = filled(d, 0.0)
    factor = filled(d, 0.0)
    h_bias = filled(d, 0.0)
    weight = filled(d, 1.0)
    if HAS_H_BIAS:
        h_bias = load_parts(h_bias_ptr, d, inside)
    if HAS_WEIGHT:
        weight = load_parts(weight_ptr, d, inside)
    if not PER_TOKEN:
        factor = modulation(scale_ptr, d, inside, weight)
        if HAS_H:
            gate = load_parts(gate_ptr, d, inside)
        if HAS_SHIFT:
            shift = load_parts(shift_ptr, d, inside)
    weight_sum = filled(d, 0.0)
    shift_sum = filled(d, 0.0)
    gate_sum = filled(d, 0.0)
    h_bias_sum = filled(d, 0.0)
    for i in tl.range(0, ROWS, num_stages=STAGES):
        # Beyond the last row everything is 0, and adds 0 to the sums.
        row = (first + i).to(tl.int64)
        masks = row_masks(inside, row, N, EVEN)
        at = (sample * N + row) * D
        dy = load_parts(dy_ptr + row * dy_row_stride, d, masks)
        x_new = load_parts(x_new_ptr + row * x_new_row_stride, d, masks)
        rstd = _load_statistic(rstd_ptr + sample * N, row, N, EVEN)
        mean = 0.0
        if LAYER:
            mean = _load_statistic(mean_ptr + sample * N, row, N, EVEN)
        if PER_TOKEN:
            scale = load_parts(scale_ptr + row * scale_row_stride, d, masks)
            if HAS_H:
                gate = load_parts(gate_ptr + row * gate_row_stride, d, masks)
            if HAS_SHIFT:
                shift = load_parts(shift_ptr + row * shift_row_stride, d, masks)
        normed, total, product, sums = (), (), (), ()
        for p in tl.static_range(len(d)):
            normed_p = (x_new[p] - mean if LAYER else x_new[p]) * rstd
            factor_p = factor[p]
            sum_p = weight_sum[p]
            if PER_TOKEN:
                factor_p = 1.0 + scale[p]
                if WEIGHT_ROW >= 0:
                    sum_p += dy[p] * factor_p * normed_p
                factor_p *= weight[p]
            elif WEIGHT_ROW >= 0:
                sum_p += dy[p] * normed_p
            if WITH_Y:
                # The forward pass's operations on the numbers that it stored, in its order: the
                # same bits. A compiler that contracted them otherwise would change the rounding,
                # and no more is asked of y here, which only a gradient of weights is made of.
                store_row(y_ptr + at, d[p], normed_p * factor_p + shift[p], masks[p])
            if DSCALE:
                store_row(dscale_ptr + at, d[p], dy[p] * normed_p * weight[p], masks[p])
            if DSHIFT:
                store_row(dshift_ptr + at, d[p], dy[p], masks[p])
            total_p = dy[p] * factor_p
            normed = normed + (normed_p,)
            total = total + (total_p,)
            product = product + (total_p * normed_p,)
            sums = sums + (sum_p,)
        weight_sum = sums
        if SHIFT_ROW >= 0:
            shift_sum = added(shift_sum, dy)
        mean_product = row_sum(product, LANES, VECTOR) * (1.0 / D)
        mean_total = 0.0
        if LAYER:
            mean_total = row_sum(total, LANES, VECTOR) * (1.0 / D)
        if HAS_DX_NEW:
            dx_new = load_parts(dx_new_ptr + row * dx_new_row_stride, d, masks)
        if DGATE or GATE_ROW >= 0:
            h = load_parts(h_ptr + row * h_row_stride, d, masks)
        dgate, dh_bias = (), ()
        for p in tl.static_range(len(d)):
            dx_p = total[p] * rstd - mean_total * rstd
            dx_p -= normed[p] * (mean_product * rstd)
            if HAS_DX_NEW:
                dx_p += dx_new[p]
            if DX:
                store_row(dx_ptr + at, d[p], dx_p, masks[p])
            if DH:
                store_row(dh_ptr + at, d[p], gate[p] * dx_p, masks[p])
            if DGATE or GATE_ROW >= 0:
                dgate_p = dx_p * (h[p] + h_bias[p])
                if DGATE:
                    store_row(dgate_ptr + at, d[p], dgate_p, masks[p])
                dgate = dgate + (dgate_p,)
            # A gate that all tokens share is multiplied with the sum, by the kernel that adds up.
            dh_bias = dh_bias + (gate[p] * dx_p if PER_TOKEN else dx_p,)
        if GATE_ROW >= 0:
            gate_sum = added(gate_sum, dgate)
        if H_BIAS_ROW >= 0:
            h_bias_sum = added(h_bias_sum, dh_bias)
    partial_ptr += index.to(tl.int64) * (PARTIALS * D)
    if WEIGHT_ROW >= 0:
        store_parts(partial_ptr + WEIGHT_ROW * D, d, weight_sum, inside)
    if SHIFT_ROW >= 0:
        store_parts(partial_ptr + SHIFT_ROW * D, d, shift_sum, inside)
    if GATE_ROW >= 0:
        store_parts(partial_ptr + GATE_ROW * D, d, gate_sum, inside)
    if H_BIAS_ROW >= 0:
        store_parts(partial_ptr + H_BIAS_ROW * D, d, h_bias_sum, inside)
