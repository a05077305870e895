"""Triton kernel of the interpolation, and the device function that reads a sample's data.

Formulas stand in `op.py`, the launch in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.layout import address, tile_start
from mixflow_fast.kernels.philox import normal_tile
from mixflow_fast.kernels.runtime import jit, tl
from mixflow_fast.kernels.schedule import draw_times, path_coefficients


@jit
def load_data(
    x1_ptr,
    std_ptr,
    offset,
    mask,
    noise_start,
    seed,
    position,
    scale,
    S,
    POSTERIOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """x1 of a tile in float32. noise_start: the tile's (channel, place)."""
    x1 = tl.load(x1_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    if MOMENTS:
        std = tl.load(std_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        eps = normal_tile(
            seed,
            POSTERIOR,
            position,
            noise_start[0],
            noise_start[1],
            S,
            BLOCK_C,
            BLOCK_S,
            VECTOR,
        )
        x1 = (x1 + std * eps) * scale
    return x1


@jit
def _interpolate_kernel(
    x1_ptr,
    std_ptr,
    x0_ptr,
    seed_ptr,
    ids_ptr,
    given_t_ptr,
    given_m_ptr,
    x_ptr,
    t_ptr,
    m_ptr,
    x1_stride,
    std_stride,
    x0_stride,
    programs,
    S,
    scale,
    gamma,
    k,
    k_less_1,
    inverse_k,
    inverse_k_less_1,
    low,
    high,
    mu,
    distribution_sigma,
    distribution_first,
    distribution_span,
    distribution_low,
    distribution_high,
    SHIFTED: tl.constexpr,
    DISTRIBUTION: tl.constexpr,
    INTERVAL: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    PATH: tl.constexpr,
    TIME: tl.constexpr,
    SLOWING: tl.constexpr,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_X0: tl.constexpr,
    HAS_T: tl.constexpr,
    HAS_M: tl.constexpr,
    MOMENTS: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PATCH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOOPS: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    program = program % programs
    seed = tl.load(seed_ptr)
    position = sample
    if HAS_IDS:
        position = tl.load(ids_ptr + sample)
    t = 0.0
    m = 0.0
    if HAS_T:
        t = tl.load(given_t_ptr + sample)
    if HAS_M:
        m = tl.load(given_m_ptr + sample)
    t, m = draw_times(
        seed,
        position,
        t,
        m,
        gamma,
        k,
        k_less_1,
        inverse_k,
        inverse_k_less_1,
        low,
        high,
        mu,
        distribution_sigma,
        distribution_first,
        distribution_span,
        distribution_low,
        distribution_high,
        SHIFTED,
        DISTRIBUTION,
        INTERVAL,
        NOISE_AT_1,
        TIME,
        SLOWING,
        HAS_T,
        HAS_M,
    )
    # A check on the host would wait for the device, so times outside [0, 1] give NaN. Explicitly,
    # because the minimum and maximum in `draw_times` drop a NaN.
    if HAS_T:
        m = tl.where((t >= 0.0) & (t <= 1.0), m, float("nan"))
    if HAS_M:
        m = tl.where((m >= 0.0) & (m <= 1.0), m, float("nan"))
    # Every program of the sample has drawn the same times; one writes them.
    if program == 0:
        tl.store(t_ptr + sample, t)
        tl.store(m_ptr + sample, m)
    alpha, sigma = path_coefficients(m, PATH, NOISE_AT_1)
    first_c, first_s = tile_start(program, S, BLOCK_C, BLOCK_S, LOOPS)
    c = first_c + tl.arange(0, BLOCK_C)
    for i in range(LOOPS):
        start = first_s + i * BLOCK_S
        s = start + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < S)[None, :]
        offset = c[:, None] * S + s[None, :]
        x1 = load_data(
            x1_ptr + sample * x1_stride,
            std_ptr + sample * std_stride,
            offset,
            mask,
            (first_c, start),
            seed,
            position,
            scale,
            S,
            POSTERIOR,
            MOMENTS,
            BLOCK_C,
            BLOCK_S,
            VECTOR,
        )
        if HAS_X0:
            x0 = tl.load(x0_ptr + sample * x0_stride + offset, mask=mask, other=0.0)
            x0 = x0.to(tl.float32)
        else:
            x0 = normal_tile(seed, NOISE, position, first_c, start, S, BLOCK_C, BLOCK_S, VECTOR)
        x = alpha * x1 + sigma * x0
        out = x_ptr + sample * (C * S) + address(c, s, S, W, C, PATCH)
        tl.store(out, x.to(x_ptr.dtype.element_ty), mask=mask)
