"""Rows of the residual norm's kernels: tuples of one or two parts, whose sizes are powers of two.

A row of 1152 columns is a head of 1024 and a tail of 128. Launches ask `row_parts`, kernels use the
functions below it.
"""

from __future__ import annotations

from mixflow_fast.kernels.runtime import jit, tl, triton

# With more, a thread has less than the 255 registers that wide rows may take.
MAX_WARPS = 8


def row_parts(D: int) -> tuple[int, int, int]:
    """(head, tail, warps): the block or the two blocks that hold a row, and warps of a program.

    Blocks are powers of two, and one for 1152 columns would be 2048 wide: 44% of the lanes would
    issue instructions for nothing. Such a row is a head of 1024 and a tail of 128. 8 elements of
    the head a thread are one access of 128 bits. With a short tail it is 16 a thread, so that a
    row's sums meet across half as many warps; with a longer one that takes all registers.
    """
    block = max(triton.next_power_of_2(D), 64)
    head = block // 2
    # Two neighbours of the tail a thread at least: 4 bytes is the least that is fetched ahead.
    tail = max(triton.next_power_of_2(max(D - head, 1)), head // 8, 64)
    # Rows that begin at any address are read an element at a time, where threads hold others.
    if head >= 256 and 2 * tail <= head and D % 16 == 0:
        return head, tail, min(max(head // (512 if 8 * tail <= head else 256), 1), MAX_WARPS)
    # 16 a thread waste fewer instructions on lanes beyond the end of a row.
    warps = block // (512 if 4 * D <= 3 * block and block > 512 else 256)
    return block, 0, min(max(warps, 1), MAX_WARPS)


@jit
def load_row(ptr, d, mask):
    """A row, or a part of it, in float32."""
    return tl.load(ptr + d, mask=mask, other=0.0).to(tl.float32)


@jit
def store_row(ptr, d, value, mask):
    """A row, or a part of it, rounded to the dtype of the tensor."""
    tl.store(ptr + d, value.to(ptr.dtype.element_ty), mask=mask)


@jit
def _row_mask(inside, row, N, EVEN: tl.constexpr):
    """`inside` where the row is one of the sample's; the interpreter takes no scalar mask here."""
    mask = inside
    if not EVEN:
        mask = inside & (tl.full(inside.shape, row, tl.int64) < N)
    return mask


@jit
def columns(HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The columns of a row, in parts."""
    d = (tl.arange(0, HEAD),)
    if TAIL:
        d = d + (HEAD + tl.arange(0, TAIL),)
    return d


@jit
def inside_of(d, D: tl.constexpr):
    inside = ()
    for p in tl.static_range(len(d)):
        inside = inside + (d[p] < D,)
    return inside


@jit
def filled(d, value: tl.constexpr):
    """A row of one number, in parts."""
    row = ()
    for p in tl.static_range(len(d)):
        row = row + (tl.full(d[p].shape, value, tl.float32),)
    return row


@jit
def load_parts(ptr, d, masks):
    row = ()
    for p in tl.static_range(len(d)):
        row = row + (load_row(ptr, d[p], masks[p]),)
    return row


@jit
def store_parts(ptr, d, row, masks):
    for p in tl.static_range(len(d)):
        store_row(ptr, d[p], row[p], masks[p])


@jit
def added(a, b):
    """The sum of two rows, in parts."""
    row = ()
    for p in tl.static_range(len(a)):
        row = row + (a[p] + b[p],)
    return row


@jit
def row_masks(inside, row, N, EVEN: tl.constexpr):
    masks = ()
    for p in tl.static_range(len(inside)):
        masks = masks + (_row_mask(inside[p], row, N, EVEN),)
    return masks


@jit
def modulation(scale_ptr, d, masks, weight):
    """(1 + scale) * weight, in parts."""
    factor = ()
    for p in tl.static_range(len(d)):
        factor = factor + ((1.0 + load_row(scale_ptr, d[p], masks[p])) * weight[p],)
    return factor


@jit
def row_sum(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The sum over a row.

    Two parts are added up in each thread before threads meet: VECTOR neighbours of the first part
    lie in each of LANES threads, again and again, and the second part is spread over all of them.
    """
    total = x[0]
    if len(x) == 2:
        total = tl.sum(tl.reshape(x[0], (x[0].shape[0] // (LANES * VECTOR), LANES, VECTOR)), axis=2)
        total = tl.sum(total, axis=0)
        total += tl.sum(tl.reshape(x[1], (LANES, x[1].shape[0] // LANES)), axis=1)
    return tl.sum(total, axis=0)
