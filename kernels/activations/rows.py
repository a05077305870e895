"""Shared parts of elementwise kernels over rows of F columns: tiles, a sigmoid, sums over rows.

A bias' gradient is the sum over rows (tokens) of a gradient that such a kernel has in registers
anyway. A program works down a strip of rows for a block of columns, and writes what its columns
sum to, one float32 row a strip; a second kernel adds the strips in a fixed order. No atomics: two
runs give the same bits.

Tiles are (R WARPS, BLOCK_F): a thread keeps its columns and has R rows of them in flight, and warps
take turns at rows. So a bias is loaded once, and sums meet other threads' at the end only: tiles
are summed as (R, WARPS, BLOCK_F), over R.
"""

from __future__ import annotations

import math

from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.runtime import jit, tl, triton

BLOCK_F, WARPS = 256, 2
# Strips of a forward pass: long enough to use a bias more than once.
FORWARD_ROWS = 32
# Partial sums are 2% of what a strip of 64 rows moves in bfloat16; very long ones round more.
MIN_ROWS, MAX_ROWS = 64, 4096
# The device has exp2 only: where a factor is multiplied in anyway, this one is part of it.
LOG2_E = math.log2(math.e)
# Four for each multiprocessor of an H100 or H200. Five fit with up to 200 registers a thread, so
# all are resident at once, share the memory evenly and end together: no last wave of a few.
PROGRAMS = 4 * 132


def strip_rows(M: int, F: int) -> int:
    """Rows of a strip of a backward pass over (M, F): enough that about `PROGRAMS` remain."""
    blocks = -(-F // BLOCK_F)
    rows = M // -(-PROGRAMS // blocks)
    return max(MIN_ROWS, min(rows // 16 * 16, MAX_ROWS))


def strips(M: int, F: int) -> int:
    """Strips, and so rows of partial sums, of a backward pass over (M, F)."""
    return -(-M // strip_rows(M, F))


def alignment(F: int) -> int:
    """The largest power of two, up to 8, that divides F: every row starts at a multiple of it."""
    return min(F & -F, 8)


def tiling(
    M: int, F: int, rows: int, loads: int, element_size: int
) -> tuple[tuple[int], dict[str, object]]:
    """(grid, keyword arguments) of a kernel over (M, F) in strips of `rows`.

    loads: rows that a thread has in flight, for 2-byte elements and F a multiple of 8.
    """
    blocks, align = triton.cdiv(F, BLOCK_F), alignment(F)
    loads = loads * 2 // element_size
    if align * element_size < 16:  # registers hold more addresses and masks than data
        loads = max(loads // 4, 1)
    # A single short strip ends with the rows, not with the strip's usual length.
    rows = min(rows, triton.cdiv(M, loads * WARPS) * loads * WARPS)
    return (triton.cdiv(M, rows) * blocks,), {
        "M": M,
        "units": F // align,
        "blocks": blocks,
        "rows": rows,
        "ALIGN": align,
        "R": loads,
        "WARPS": WARPS,
        "BLOCK_F": BLOCK_F,
        "num_warps": WARPS,
        **runtime.OPTIONS,
    }


@jit
def strip_start(blocks, BLOCK_F: tl.constexpr):
    """(strip, columns) of a program: neighbours have neighbouring columns of the same rows."""
    index = tl.program_id(0)
    return (index // blocks).to(tl.int64), (index % blocks) * BLOCK_F + tl.arange(0, BLOCK_F)


@jit
def load_bias(
    bias_ptr,
    column,
    F,
    HAS_BIAS: tl.constexpr,
    R: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """The bias of the columns in float32, for every row of a tile; 0 without one."""
    bias = tl.zeros((WARPS, BLOCK_F), tl.float32)
    if HAS_BIAS:
        offset = tl.zeros((WARPS, 1), tl.int32) + column[None, :]
        bias = tl.load(bias_ptr + offset, mask=offset < F, other=0.0).to(tl.float32)
    # Broadcast here, so that a thread keeps the bias of its columns in registers.
    bias = tl.broadcast_to(bias[None, :, :], (R, WARPS, BLOCK_F))
    return tl.reshape(bias, (R * WARPS, BLOCK_F))


@jit
def sum_rows(tile, R: tl.constexpr, WARPS: tl.constexpr, BLOCK_F: tl.constexpr):
    """(WARPS, BLOCK_F): the sum of the rows of each warp."""
    return tl.sum(tl.reshape(tile, (R, WARPS, BLOCK_F)), axis=0)


@jit
def sigmoid_and_slope(v):
    """sigmoid and its derivative at v / LOG2_E; nothing overflows or cancels in either tail."""
    e = tl.exp2(-tl.abs(v))  # at most 1, whatever v is
    r = 1.0 / (1.0 + e)
    small = e * r
    return tl.where(v >= 0, r, small), small * r


@jit
def _add_strips_kernel(
    partial_ptr,
    out_ptr,
    strips,
    units,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = units * ALIGN
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for first in range(0, strips, BLOCK_S):
        strip = first + tl.arange(0, BLOCK_S)
        mask = (strip < strips)[:, None] & (column < columns)[None, :]
        offset = strip.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    total = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, total, mask=column < columns)


def launch_add_strips(partial: Tensor, out: Tensor) -> None:
    """out = partial.sum(0), (strips, columns) float32 -> (columns,); under `on_device`."""
    strips, columns = partial.shape
    align, block = alignment(columns), 32
    _add_strips_kernel[(triton.cdiv(columns, block),)](
        partial,
        out,
        strips,
        columns // align,
        ALIGN=align,
        BLOCK_S=64,
        BLOCK_C=block,
        num_warps=4,
        **runtime.OPTIONS,
    )


def check_arguments(x: Tensor, bias: Tensor | None) -> None:
    """ValueError where x (..., F) and bias (F,) do not fit each other; reads no device memory."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating-point tensor (..., F), got {tuple(x.shape)} {x.dtype}"
        )
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias must have x's last dimension, ({x.shape[-1]},), got {tuple(bias.shape)}"
        )
    if not bias.is_floating_point() or bias.device != x.device:
        raise ValueError(
            f"bias must be a floating-point tensor on x's device {x.device}, got {bias.dtype} on "
            f"{bias.device}"
        )


def resolve(impl: str, x: Tensor, bias: Tensor | None) -> str:
    """ "triton" or "reference", for the operators."""
    dtypes = [v.dtype for v in (x, bias) if v is not None]
    return "triton" if runtime.use_kernels(impl, x.device, *dtypes) else "reference"
