"""Triton kernels of norm and rotary embedding of q and k; formulas stand in `qk_norm_rope.py`.

A *section* is q, k or v of a packed (B, N, 3, H, K) tensor, WIDTH = H K wide at each of B N tokens.
Every program works in one section, so which pointers it takes is one scalar decision.
"""

from __future__ import annotations

from mixflow_fast.kernels.runtime import jit, tl


@jit
def _rotate(x, cos, sin, INVERSE: tl.constexpr, NUMEL: tl.constexpr):
    """(NUMEL / 2, 2) pairs, rotated: x cos + rotate_half(x) sin, or its transpose."""
    HALF: tl.constexpr = NUMEL // 2
    x0, x1 = tl.split(tl.reshape(x, (HALF, 2)))
    cos0, cos1 = tl.split(tl.reshape(cos, (HALF, 2)))
    sin0, sin1 = tl.split(tl.reshape(sin, (HALF, 2)))
    if INVERSE:
        y0 = x0 * cos0 + x1 * sin1
        y1 = x1 * cos1 - x0 * sin0
    else:
        y0 = x0 * cos0 - x1 * sin0
        y1 = x1 * cos1 + x0 * sin1
    return tl.join(y0, y1)


@jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    q_stride,
    k_stride,
    v_stride,
    out_stride,
    tokens,
    N,
    blocks,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    ROPE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotates sections 0 and 1, copies section 2: flat over GROUP tokens, whatever H and K are."""
    index = tl.program_id(0)
    section = index // blocks
    block = index % blocks
    SPLITS: tl.constexpr = (GROUP * WIDTH + BLOCK - 1) // BLOCK
    # Offsets from the group's first token fit 32 bits, which is cheaper than 64 for each element.
    first = block // SPLITS * GROUP
    element = block % SPLITS * BLOCK + tl.arange(0, BLOCK)
    local = element // WIDTH
    inside = element % WIDTH
    mask = (element < GROUP * WIDTH) & (first + local < tokens)
    in_ptr = q_ptr
    stride = q_stride
    if section == 1:
        in_ptr = k_ptr
        stride = k_stride
    if section == 2:
        in_ptr = v_ptr
        stride = v_stride
    source = in_ptr + first.to(tl.int64) * stride + (local * stride + inside)
    x = tl.load(source, mask=mask, other=0.0)
    if ROPE:
        if section < 2:
            place = (first + local) % N * K + inside % K
            # Rows begin at multiples of VECTOR, which the compiler does not see through two `%`.
            place = tl.max_contiguous(tl.multiple_of(place, VECTOR), VECTOR)
            cos = tl.load(cos_ptr + place, mask=mask, other=0.0)
            sin = tl.load(sin_ptr + place, mask=mask, other=0.0)
            y = tl.reshape(_rotate(x.to(tl.float32), cos, sin, INVERSE, BLOCK), (BLOCK,))
            x = y.to(x.dtype)
    target = out_ptr + section * WIDTH + first.to(tl.int64) * out_stride
    tl.store(target + (local * out_stride + inside), x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _normalize(x, mask, eps, K: tl.constexpr, NORM: tl.constexpr):
    """(x normalised, 1 / deviation) of rows; masked columns hold zero."""
    if NORM == "layer":
        x = tl.where(mask, x - (tl.sum(x, axis=1) / K)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / K + eps)
    return x * scale[:, None], scale


@jit
def _qk_norm_forward_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    q_bias_ptr,
    k_weight_ptr,
    k_bias_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    q_stride,
    k_stride,
    out_stride,
    rows,
    N,
    blocks,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    index = tl.program_id(0)
    section = index // blocks
    in_ptr = q_ptr
    weight_ptr = q_weight_ptr
    bias_ptr = q_bias_ptr
    stride = q_stride
    if section == 1:
        in_ptr = k_ptr
        weight_ptr = k_weight_ptr
        bias_ptr = k_bias_ptr
        stride = k_stride
    row = index % blocks * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (k < K)[None, :]
    token = row // H
    place = (row % H * K)[:, None] + k[None, :]
    x = tl.load(in_ptr + token.to(tl.int64)[:, None] * stride + place, mask=mask, other=0.0)
    y, _ = _normalize(x.to(tl.float32), mask, eps, K, NORM)
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y = y + tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if ROPE:
        angle = (token % N * K)[:, None] + k[None, :]
        cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
        sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
        y = tl.reshape(_rotate(y, cos, sin, False, ROWS * BLOCK_K), (ROWS, BLOCK_K))
    out = out_ptr + section * (H * K) + token.to(tl.int64)[:, None] * out_stride + place
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _qk_norm_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    dq_stride,
    dk_stride,
    dv_stride,
    q_stride,
    k_stride,
    out_stride,
    rows,
    N,
    blocks,
    loops,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Transposed rotation and norm backward of sections 0 and 1, copies section 2."""
    index = tl.program_id(0)
    section = index // blocks
    grad_ptr = dq_ptr
    grad_stride = dq_stride
    in_ptr = q_ptr
    stride = q_stride
    weight_ptr = q_weight_ptr
    if section == 1:
        grad_ptr = dk_ptr
        grad_stride = dk_stride
        in_ptr = k_ptr
        stride = k_stride
        weight_ptr = k_weight_ptr
    if section == 2:
        grad_ptr = dv_ptr
        grad_stride = dv_stride
    k = tl.arange(0, BLOCK_K)
    weight_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((ROWS, BLOCK_K), tl.float32)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for i in range(loops):
        row = (index % blocks * loops + i) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (k < K)[None, :]
        token = row // H
        far = token.to(tl.int64)[:, None]  # a whole batch may exceed 32-bit offsets
        place = (row % H * K)[:, None] + k[None, :]
        g = tl.load(grad_ptr + far * grad_stride + place, mask=mask, other=0.0).to(tl.float32)
        if section < 2:
            if ROPE:
                angle = (token % N * K)[:, None] + k[None, :]
                cos = tl.load(cos_ptr + angle, mask=mask, other=0.0)
                sin = tl.load(sin_ptr + angle, mask=mask, other=0.0)
                g = tl.reshape(_rotate(g, cos, sin, True, ROWS * BLOCK_K), (ROWS, BLOCK_K))
            x = tl.load(in_ptr + far * stride + place, mask=mask, other=0.0).to(tl.float32)
            x, scale = _normalize(x, mask, eps, K, NORM)
            if HAS_WEIGHT:
                # With eps = 0, rows behind the last one hold 0 times infinity.
                weight_sum += tl.where(mask, g * x, 0.0)
            if HAS_BIAS:
                bias_sum += g
            if HAS_WEIGHT:
                g = g * tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            slope = (tl.sum(g * x, axis=1) / K)[:, None]
            if NORM == "layer":
                g = g - (tl.sum(g, axis=1) / K)[:, None]
            g = (g - x * slope) * scale[:, None]
        out = out_ptr + section * (H * K) + far * out_stride + place
        tl.store(out, g.to(dtype), mask=mask)
    if section < 2:
        if HAS_WEIGHT:
            tl.store(weight_partial_ptr + index * BLOCK_K + k, tl.sum(weight_sum, axis=0))
        if HAS_BIAS:
            tl.store(bias_partial_ptr + index * BLOCK_K + k, tl.sum(bias_sum, axis=0))


@jit
def _qk_weight_gradient_kernel(
    partial_ptr,
    q_out_ptr,
    k_out_ptr,
    partials,
    K,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the partial sums of all programs in a fixed order, first those of q, then those of k."""
    index = tl.program_id(0)
    section = index // (BLOCK_K // COLUMNS)
    column = index % (BLOCK_K // COLUMNS) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS)
        place = (section * partials + row)[:, None] * BLOCK_K + column[None, :]
        total += tl.load(partial_ptr + place, mask=(row < partials)[:, None], other=0.0)
    out_ptr = q_out_ptr
    if section == 1:
        out_ptr = k_out_ptr
    value = tl.sum(total, axis=0).to(q_out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, value, mask=column < K)
