"""Triton kernels of norm and rotary embedding of q and k; formulas stand in `qk_norm_rope.py`.

A *section* is q, k or v of a packed (B, N, 3, H, K) tensor, WIDTH = H K wide at each of B N tokens.
Every program works in one section, so which pointers it takes is one scalar decision.
"""

from __future__ import annotations

from mixflow_fast.kernels.runtime import jit, tl


@jit
def _rotate(x, cos, sin, INVERSE: tl.constexpr):
    """Pairs (x.numel / 2, 2), rotated: x cos + rotate_half(x) sin, or its transpose."""
    HALF: tl.constexpr = x.numel // 2
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
            y = tl.reshape(_rotate(x.to(tl.float32), cos, sin, INVERSE), (BLOCK,))
            x = y.to(x.dtype)
    target = out_ptr + section * WIDTH + first.to(tl.int64) * out_stride
    tl.store(target + (local * out_stride + inside), x.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _columns(HEAD: tl.constexpr, TAIL: tl.constexpr):
    """The columns of a row of K elements, in parts (1, HEAD) and (1, TAIL)."""
    k = (tl.arange(0, HEAD)[None, :],)
    if TAIL:
        k = k + (HEAD + tl.arange(0, TAIL)[None, :],)
    return k


@jit
def _masks(there, k, K: tl.constexpr, FULL: tl.constexpr):
    """Where rows and columns are, in parts. `there`: (ROWS, 1); FULL: no column is beyond K."""
    masks = ()
    for p in tl.static_range(len(k)):
        mask = tl.broadcast_to(there, (there.shape[0], k[p].shape[1]))
        if not FULL:
            mask = there & (k[p] < K)
        masks = masks + (mask,)
    return masks


@jit
def _by_lanes(x, LANES: tl.constexpr):
    """(ROWS, columns) -> (ROWS, LANES, columns of a lane): no number changes its thread."""
    return tl.reshape(x, (x.shape[0], LANES, x.shape[1] // LANES))


@jit
def _load(ptr, k, row, masks, LANES: tl.constexpr):
    """Rows in float32, in parts by lanes; `row` (ROWS, 1) has the offset of each."""
    x = ()
    for p in tl.static_range(len(k)):
        part = tl.load(ptr + (row + k[p]), mask=masks[p], other=0.0)
        x = x + (_by_lanes(part.to(tl.float32), LANES),)
    return x


@jit
def _load_vector(ptr, k, K: tl.constexpr, LANES: tl.constexpr):
    """A vector of K numbers in float32, in parts that rows can be multiplied with."""
    x = ()
    for p in tl.static_range(len(k)):
        part = tl.load(ptr + k[p], mask=k[p] < K, other=0.0)
        x = x + (_by_lanes(part.to(tl.float32), LANES),)
    return x


@jit
def _times(a, b):
    product = ()
    for p in tl.static_range(len(a)):
        product = product + (a[p] * b[p],)
    return product


@jit
def _plus(a, b):
    total = ()
    for p in tl.static_range(len(a)):
        total = total + (a[p] + b[p],)
    return total


@jit
def _mean(x, K: tl.constexpr):
    """Means of rows, (ROWS, 1, 1): each thread adds up its columns of both parts first."""
    total = tl.sum(x[0], axis=2)
    if len(x) == 2:
        total += tl.sum(x[1], axis=2)
    return (tl.sum(total, axis=1) / K)[:, None, None]


@jit
def _rotated(x, cos_ptr, sin_ptr, k, row, masks, LANES: tl.constexpr, INVERSE: tl.constexpr):
    """Rows after their rotation, in parts: sizes are even, so no pair lies in both."""
    cos = _load(cos_ptr, k, row, masks, LANES)
    sin = _load(sin_ptr, k, row, masks, LANES)
    y = ()
    for p in tl.static_range(len(k)):
        if x[p].shape[2] == 1:
            # A thread has one element of a pair, and asks its neighbour for the other.
            lane = tl.arange(0, LANES)[None, :, None]
            other = tl.broadcast_to(lane ^ 1, x[p].shape)
            sign = tl.where(lane % 2 == 0, -1.0, 1.0)
            if INVERSE:
                y_p = x[p] * cos[p] - sign * tl.gather(x[p] * sin[p], other, 1)
            else:
                y_p = x[p] * cos[p] + sign * tl.gather(x[p], other, 1) * sin[p]
            y = y + (y_p,)
        else:
            y = y + (tl.reshape(_rotate(x[p], cos[p], sin[p], INVERSE), x[p].shape),)
    return y


@jit
def _normalize(
    x,
    masks,
    eps,
    K: tl.constexpr,
    NORM: tl.constexpr,
    FULL: tl.constexpr,
    LANES: tl.constexpr,
):
    """(x normalised, 1 / deviation) of rows; masked columns hold zero."""
    if NORM == "layer":
        mean = _mean(x, K)
        centred = ()
        for p in tl.static_range(len(x)):
            centred_p = x[p] - mean
            if not FULL:
                centred_p = tl.where(_by_lanes(masks[p], LANES), centred_p, 0.0)
            centred = centred + (centred_p,)
        x = centred
    scale = tl.rsqrt(_mean(_times(x, x), K) + eps)
    y = ()
    for p in tl.static_range(len(x)):
        y = y + (x[p] * scale,)
    return y, scale


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
    LANES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
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
    row = index % blocks * ROWS + tl.arange(0, ROWS)[:, None]
    k = _columns(HEAD, TAIL)
    FULL: tl.constexpr = HEAD + TAIL == K
    masks = _masks(row < rows, k, K, FULL)
    token = row // H
    place = row % H * K
    far = token.to(tl.int64)  # a whole batch may exceed 32-bit offsets
    x = _load(in_ptr + far * stride, k, place, masks, LANES)
    y, _ = _normalize(x, masks, eps, K, NORM, FULL, LANES)
    if HAS_WEIGHT:
        y = _times(y, _load_vector(weight_ptr, k, K, LANES))
    if HAS_BIAS:
        y = _plus(y, _load_vector(bias_ptr, k, K, LANES))
    if ROPE:
        y = _rotated(y, cos_ptr, sin_ptr, k, token % N * K, masks, LANES, False)
    out_ptr += section * (H * K)
    for p in tl.static_range(len(k)):
        out = out_ptr + far * out_stride + (place + k[p])
        value = tl.reshape(y[p], (ROWS, k[p].shape[1]))
        tl.store(out, value.to(out_ptr.dtype.element_ty), mask=masks[p])


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
    LANES: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
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
    k = _columns(HEAD, TAIL)
    FULL: tl.constexpr = HEAD + TAIL == K
    weight_sum = ()
    bias_sum = ()
    for p in tl.static_range(len(k)):
        weight_sum = weight_sum + (tl.zeros((ROWS, LANES, k[p].shape[1] // LANES), tl.float32),)
        bias_sum = bias_sum + (tl.zeros((ROWS, LANES, k[p].shape[1] // LANES), tl.float32),)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for i in range(loops):
        row = (index % blocks * loops + i) * ROWS + tl.arange(0, ROWS)[:, None]
        masks = _masks(row < rows, k, K, FULL)
        token = row // H
        far = token.to(tl.int64)  # a whole batch may exceed 32-bit offsets
        place = row % H * K
        g = _load(grad_ptr + far * grad_stride, k, place, masks, LANES)
        if section < 2:
            if ROPE:
                g = _rotated(g, cos_ptr, sin_ptr, k, token % N * K, masks, LANES, True)
            x = _load(in_ptr + far * stride, k, place, masks, LANES)
            # Rows behind the last one are 0, and with eps = 0 would become 0 times infinity.
            some = tl.where((row < rows)[:, :, None], eps, 1.0)
            x, scale = _normalize(x, masks, some, K, NORM, FULL, LANES)
            if HAS_WEIGHT:
                weight_sum = _plus(weight_sum, _times(g, x))
            if HAS_BIAS:
                bias_sum = _plus(bias_sum, g)
            if HAS_WEIGHT:
                g = _times(g, _load_vector(weight_ptr, k, K, LANES))
            slope = _mean(_times(g, x), K)
            mean = 0.0
            if NORM == "layer":
                mean = _mean(g, K)
            dx = ()
            for p in tl.static_range(len(k)):
                centred = g[p] - mean if NORM == "layer" else g[p]
                dx = dx + ((centred - x[p] * slope) * scale,)
            g = dx
        for p in tl.static_range(len(k)):
            out = out_ptr + section * (H * K) + far * out_stride + (place + k[p])
            value = tl.reshape(g[p], (ROWS, k[p].shape[1]))
            tl.store(out, value.to(dtype), mask=masks[p])
    if section < 2:
        for p in tl.static_range(len(k)):
            at = index * K + k[p]
            if HAS_WEIGHT:
                total = tl.reshape(tl.sum(weight_sum[p], axis=0), k[p].shape)
                tl.store(weight_partial_ptr + at, total, mask=k[p] < K)
            if HAS_BIAS:
                total = tl.reshape(tl.sum(bias_sum[p], axis=0), k[p].shape)
                tl.store(bias_partial_ptr + at, total, mask=k[p] < K)


@jit
def _qk_weight_gradient_kernel(
    partial_ptr,
    q_out_ptr,
    k_out_ptr,
    partials,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Adds the partial sums of all programs in a fixed order, first those of q, then those of k."""
    index = tl.program_id(0)
    BLOCKS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    section = index // BLOCKS
    column = index % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS)
        place = (section * partials + row)[:, None] * K + column[None, :]
        mask = (row < partials)[:, None] & (column < K)[None, :]
        total += tl.load(partial_ptr + place, mask=mask, other=0.0)
    out_ptr = q_out_ptr
    if section == 1:
        out_ptr = k_out_ptr
    value = tl.sum(total, axis=0).to(q_out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, value, mask=column < K)
