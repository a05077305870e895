"""Triton kernel of the interpolation, and the device function that reads a sample's data.

Formulas stand in `op.py`, the launch in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.layout import load_pairs, tile_address, tile_start
from mixflow_fast.kernels.philox import normal_pairs
from mixflow_fast.kernels.runtime import for_any_alignment, jit, tl
from mixflow_fast.kernels.schedule import draw_times, path_coefficients


@jit
def load_data(
    x1_ptr,
    std_ptr,
    place,
    mask,
    noise_start,
    seed,
    position,
    scale,
    S,
    POSTERIOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """x1 of a tile as `load_pairs` has it. noise_start: the tile's (channel, place) in the sample.

    x1_ptr and std_ptr are where the program's tiles begin, `place` is how far the tile is from it.
    """
    first, second = load_pairs(x1_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
    if MOMENTS:
        std, second_std = load_pairs(std_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        eps, second_eps = normal_pairs(
            seed,
            POSTERIOR,
            position,
            noise_start[0],
            noise_start[1],
            S,
            BLOCK_C,
            BLOCK_S // 2,
            VECTOR,
        )
        first = tl.fma(std, eps, first) * scale
        second = tl.fma(second_std, second_eps, second) * scale
    return first, second


@jit(
    any_value=["programs", "loops"],
    any_address=["seed_ptr", "ids_ptr", "given_t_ptr", "given_m_ptr", "t_ptr", "m_ptr"],
)
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
    loops,
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
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
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
    first_c, first_s, tiles = tile_start(program, S, loops, BLOCK_C, BLOCK_S)
    # Addresses of 64 bits up to here, outside of the loop; inside 32 bits are enough.
    first = first_c * S + first_s
    x1_ptr += sample * x1_stride + first
    std_ptr += sample * std_stride + first
    x0_ptr += sample * x0_stride + first
    out_ptr = x_ptr + sample * (C * S)
    c = tl.arange(0, BLOCK_C)
    out_c = first_c + c
    if PATCH == 0:
        out_ptr += first
        out_c = c
    for i in range(tiles):
        place = i * BLOCK_S
        start = first_s + place
        mask = (first_c + c < C)[:, None] & (start + tl.arange(0, BLOCK_S) < S)[None, :]
        x1, second_x1 = load_data(
            x1_ptr,
            std_ptr,
            place,
            mask,
            (first_c, start),
            seed,
            position,
            scale,
            S,
            POSTERIOR,
            MOMENTS,
            EVEN,
            BLOCK_C,
            BLOCK_S,
            VECTOR,
        )
        if HAS_X0:
            x0, second_x0 = load_pairs(x0_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        else:
            x0, second_x0 = normal_pairs(
                seed, NOISE, position, first_c, start, S, BLOCK_C, BLOCK_S // 2, VECTOR
            )
        x = tl.fma(alpha, x1, sigma * x0)
        second_x = tl.fma(alpha, second_x1, sigma * second_x0)
        x = tl.interleave(x, second_x).to(x_ptr.dtype.element_ty)
        at = tile_address(out_c, first_s, place, S, W, C, PATCH, BLOCK_S)
        if EVEN:
            tl.store(out_ptr + at, x)
        else:
            tl.store(out_ptr + at, x, mask=mask)


# For samples whose size is not `regular`: they lie at any address, so there is one kernel for all.
_odd_interpolate_kernel = for_any_alignment(_interpolate_kernel)
