"""Triton kernels that add up the partial sums of the residual norm's backward pass.

First over the tiles of a sample, then over the samples, both in a fixed order. Formulas stand in
`op.py`, launches in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.residual_norm.row_parts import load_row, store_row
from mixflow_fast.kernels.runtime import jit, tl


@jit
def _tile_sum(partial_ptr, tiles, step, d, D: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over a sample's tiles, in a fixed order."""
    total = tl.zeros((BLOCK, d.shape[0]), tl.float32)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        mask = (tile < tiles)[:, None] & (d < D)[None, :]
        # 64 bits: the samples' sums may be more than 2^31 numbers.
        at = tile.to(tl.int64)[:, None] * step + d[None, :]
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)
    return tl.sum(total, axis=0)


@jit
def _residual_norm_reduce_kernel(
    partial_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    sums_ptr,
    gate_sample_stride,
    scale_sample_stride,
    tiles,
    D: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    DSCALE: tl.constexpr,
    DWEIGHT: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    SHIFT_ROW: tl.constexpr,
    GATE_ROW: tl.constexpr,
    H_BIAS_ROW: tl.constexpr,
    PARTIALS: tl.constexpr,
    SUMS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of a sample from its tiles, and its part of the gradients of weight and h_bias."""
    index = tl.program_id(0)
    sample = (index // COLUMN_BLOCKS).to(tl.int64)
    d = (index % COLUMN_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    partial_ptr += sample * tiles * (PARTIALS * D)
    if WEIGHT_ROW >= 0:
        total = _tile_sum(partial_ptr + WEIGHT_ROW * D, tiles, PARTIALS * D, d, D, BLOCK)
        if DSCALE:
            weight = 1.0
            if HAS_WEIGHT:
                weight = load_row(weight_ptr, d, inside)
            store_row(dscale_ptr + sample * D, d, total * weight, inside)
        if DWEIGHT:
            if not PER_TOKEN:
                total *= 1.0 + load_row(scale_ptr + sample * scale_sample_stride, d, inside)
            store_row(sums_ptr + (sample * SUMS + SUMS - 1) * D, d, total, inside)
    if SHIFT_ROW >= 0:
        total = _tile_sum(partial_ptr + SHIFT_ROW * D, tiles, PARTIALS * D, d, D, BLOCK)
        store_row(dshift_ptr + sample * D, d, total, inside)
    if GATE_ROW >= 0:
        total = _tile_sum(partial_ptr + GATE_ROW * D, tiles, PARTIALS * D, d, D, BLOCK)
        store_row(dgate_ptr + sample * D, d, total, inside)
    if H_BIAS_ROW >= 0:
        total = _tile_sum(partial_ptr + H_BIAS_ROW * D, tiles, PARTIALS * D, d, D, BLOCK)
        if not PER_TOKEN:
            total *= load_row(gate_ptr + sample * gate_sample_stride, d, inside)
        store_row(sums_ptr + sample * (SUMS * D), d, total, inside)


@jit
def _residual_norm_sum_kernel(
    sums_ptr,
    dh_bias_ptr,
    dweight_ptr,
    B,
    D: tl.constexpr,
    DH_BIAS: tl.constexpr,
    DWEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The samples' parts in a fixed order, a block of columns a program."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    if DH_BIAS:
        store_row(dh_bias_ptr, d, _tile_sum(sums_ptr, B, SUMS * D, d, D, BLOCK), d < D)
    if DWEIGHT:
        total = _tile_sum(sums_ptr + (SUMS - 1) * D, B, SUMS * D, d, D, BLOCK)
        store_row(dweight_ptr, d, total, d < D)
