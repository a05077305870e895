"""Triton kernels of the mixed source: one forward, with the interpolation, and one backward.

Formulas stand in `op.py`, launches in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.layout import load_pairs, split_pairs, tile_address, tile_start
from mixflow_fast.kernels.philox import normal_pairs
from mixflow_fast.kernels.runtime import for_any_alignment, jit, tl
from mixflow_fast.kernels.schedule import path_coefficients


@jit
def load_noise(
    eps_ptr,
    place,
    mask,
    noise_start,
    seed,
    position,
    S,
    STREAM: tl.constexpr,
    GIVEN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Noise of a tile as `load_pairs` has it, given or drawn; `noise_start` as of `load_data`."""
    if GIVEN:
        first, second = load_pairs(eps_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
    else:
        first, second = normal_pairs(
            seed,
            STREAM,
            position,
            noise_start[0],
            noise_start[1],
            S,
            BLOCK_C,
            BLOCK_S // 2,
            VECTOR,
        )
    return first, second


@jit
def bounded(log_var, low, high):
    """Clamped; NaN where it is not finite, which a minimum would turn into a healthy number."""
    inside = tl.minimum(tl.maximum(log_var, low), high)
    return tl.where(tl.abs(log_var) < float("inf"), inside, float("nan"))


@jit
def exp_and_rest(x):
    """(exp(x), exp(x) - 1 - x), the second without the difference near 0, where it has no digits.

    The remainder of the Taylor series, to 4e-8 of it for |x| < 1/2.
    """
    exp = tl.exp(x)
    p = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880)))
    p = 0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * p)))
    return exp, tl.where(tl.abs(x) < 0.5, x * x * p, exp - 1.0 - x)


@jit
def mix(mean, log_var, exp, w, eps, eps1, SAMPLES: tl.constexpr):
    """x0 from the source's moments, exp(log_var), the weight and the noise."""
    if SAMPLES:
        x0 = tl.fma(1.0 - w, eps, w * tl.fma(tl.exp(0.5 * log_var), eps1, mean))
    else:
        x0 = tl.fma(tl.sqrt_rn(tl.fma(w, exp, 1.0 - w)), eps, w * mean)
    return x0


@jit(
    any_value=["programs", "loops"],
    any_address=["w_ptr", "times_ptr", "seed_ptr", "ids_ptr", "partial_ptr"],
)
def _mixed_source_kernel(
    x1_ptr,
    mean_ptr,
    log_var_ptr,
    eps_ptr,
    eps1_ptr,
    w_ptr,
    times_ptr,
    seed_ptr,
    ids_ptr,
    x_ptr,
    x0_ptr,
    partial_ptr,
    x1_stride,
    mean_stride,
    log_var_stride,
    eps_stride,
    eps1_stride,
    programs,
    loops,
    S,
    low,
    high,
    SAMPLES: tl.constexpr,
    PATH: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    NOISE: tl.constexpr,
    SOURCE_NOISE: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_EPS1: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PATCH: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index = tl.program_id(0)
    sample = (index // programs).to(tl.int64)
    program = index % programs
    seed = tl.load(seed_ptr)
    position = sample
    if HAS_IDS:
        position = tl.load(ids_ptr + sample)
    w = tl.load(w_ptr + sample)
    time = tl.load(times_ptr + sample)
    alpha, sigma = path_coefficients(time, PATH, NOISE_AT_1)
    first_c, first_s, tiles = tile_start(program, S, loops, BLOCK_C, BLOCK_S)
    first = first_c * S + first_s
    x1_ptr += sample * x1_stride + first
    mean_ptr += sample * mean_stride + first
    log_var_ptr += sample * log_var_stride + first
    eps_ptr += sample * eps_stride + first
    eps1_ptr += sample * eps1_stride + first
    x0_ptr += sample * (C * S) + first
    x_ptr += sample * (C * S)
    c = tl.arange(0, BLOCK_C)
    out_c = first_c + c
    if PATCH == 0:
        x_ptr += first
        out_c = c
    total = tl.zeros((BLOCK_C, BLOCK_S // 2), tl.float32)
    for i in range(tiles):
        place = i * BLOCK_S
        start = first_s + place
        mask = (first_c + c < C)[:, None] & (start + tl.arange(0, BLOCK_S) < S)[None, :]
        x1, second_x1 = load_pairs(x1_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        mean, second_mean = load_pairs(mean_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        log_var, second_log_var = load_pairs(log_var_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        noise_start = (first_c, start)
        eps, second_eps = load_noise(
            eps_ptr,
            place,
            mask,
            noise_start,
            seed,
            position,
            S,
            NOISE,
            HAS_EPS,
            EVEN,
            BLOCK_C,
            BLOCK_S,
            VECTOR,
        )
        eps1 = eps
        second_eps1 = second_eps
        if SAMPLES:
            eps1, second_eps1 = load_noise(
                eps1_ptr,
                place,
                mask,
                noise_start,
                seed,
                position,
                S,
                SOURCE_NOISE,
                HAS_EPS1,
                EVEN,
                BLOCK_C,
                BLOCK_S,
                VECTOR,
            )
        log_var = bounded(log_var, low, high)
        second_log_var = bounded(second_log_var, low, high)
        exp, rest = exp_and_rest(log_var)
        second_exp, second_rest = exp_and_rest(second_log_var)
        # Beyond the sample's end mean and log-variance were loaded as 0, which adds nothing.
        total += tl.fma(mean, mean, rest) + tl.fma(second_mean, second_mean, second_rest)
        x0 = mix(mean, log_var, exp, w, eps, eps1, SAMPLES)
        second_x0 = mix(
            second_mean, second_log_var, second_exp, w, second_eps, second_eps1, SAMPLES
        )
        x = tl.fma(alpha, x1, sigma * x0)
        second_x = tl.fma(alpha, second_x1, sigma * second_x0)
        x = tl.interleave(x, second_x).to(x_ptr.dtype.element_ty)
        x0 = tl.interleave(x0, second_x0)
        at = tile_address(out_c, first_s, place, S, W, C, PATCH, BLOCK_S)
        at_x0 = tile_address(c, first_s, place, S, W, C, 0, BLOCK_S)
        if EVEN:
            tl.store(x_ptr + at, x)
            tl.store(x0_ptr + at_x0, x0)
        else:
            tl.store(x_ptr + at, x, mask=mask)
            tl.store(x0_ptr + at_x0, x0, mask=mask)
    tl.store(partial_ptr + index, 0.5 * tl.sum(tl.sum(total, axis=1), axis=0))


# For samples whose size is not `regular`: they lie at any address, so there is one kernel for all.
_odd_mixed_source_kernel = for_any_alignment(_mixed_source_kernel)


@jit
def gradient_of_log_var(gradient, raw, w, eps, grad_kl, low, high, SAMPLES: tl.constexpr):
    """The log-variance's gradient from that of x0; `eps` is the noise that it scales."""
    log_var = bounded(raw, low, high)
    exp, rest = exp_and_rest(log_var)
    if SAMPLES:
        slope = w * tl.exp(0.5 * log_var)
    else:
        slope = tl.div_rn(w * exp, tl.sqrt_rn(tl.fma(w, exp, 1.0 - w)))
    of_kl = (0.5 * grad_kl) * (rest + log_var)
    of_log_var = tl.fma(gradient, 0.5 * (eps * slope), of_kl)
    inside = (raw >= low) & (raw <= high) & (tl.abs(raw) < float("inf"))
    return tl.where(inside, of_log_var, 0.0)


@jit(
    any_value=["programs", "loops"],
    any_address=["w_ptr", "times_ptr", "seed_ptr", "ids_ptr", "grad_kl_ptr"],
)
def _source_backward_kernel(
    grad_x_ptr,
    grad_x0_ptr,
    grad_kl_ptr,
    mean_ptr,
    log_var_ptr,
    eps_ptr,
    w_ptr,
    times_ptr,
    seed_ptr,
    ids_ptr,
    grad_mean_ptr,
    grad_log_var_ptr,
    grad_x_stride,
    grad_x0_stride,
    mean_stride,
    log_var_stride,
    eps_stride,
    grad_mean_stride,
    grad_log_var_stride,
    programs,
    loops,
    S,
    low,
    high,
    SAMPLES: tl.constexpr,
    PATH: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    STREAM: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EPS: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
    HAS_GRAD_X0: tl.constexpr,
    HAS_GRAD_KL: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    PATCH: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    index = tl.program_id(0)
    sample = (index // programs).to(tl.int64)
    program = index % programs
    seed = tl.load(seed_ptr)
    position = sample
    if HAS_IDS:
        position = tl.load(ids_ptr + sample)
    w = tl.load(w_ptr + sample)
    time = tl.load(times_ptr + sample)
    _, sigma = path_coefficients(time, PATH, NOISE_AT_1)
    grad_kl = 0.0
    if HAS_GRAD_KL:
        grad_kl = tl.load(grad_kl_ptr + sample)
    first_c, first_s, tiles = tile_start(program, S, loops, BLOCK_C, BLOCK_S)
    first = first_c * S + first_s
    grad_x0_ptr += sample * grad_x0_stride + first
    mean_ptr += sample * mean_stride + first
    log_var_ptr += sample * log_var_stride + first
    eps_ptr += sample * eps_stride + first
    grad_mean_ptr += sample * grad_mean_stride + first
    grad_log_var_ptr += sample * grad_log_var_stride + first
    grad_x_ptr += sample * grad_x_stride
    c = tl.arange(0, BLOCK_C)
    x_c = first_c + c
    if PATCH == 0:
        grad_x_ptr += first
        x_c = c
    for i in range(tiles):
        place = i * BLOCK_S
        start = first_s + place
        mask = (first_c + c < C)[:, None] & (start + tl.arange(0, BLOCK_S) < S)[None, :]
        mean, second_mean = load_pairs(mean_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        log_var, second_log_var = load_pairs(log_var_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        # The gradient of x0: of the input's share and, from the loss, of the target's.
        gradient = tl.zeros((BLOCK_C, BLOCK_S // 2), tl.float32)
        second = tl.zeros((BLOCK_C, BLOCK_S // 2), tl.float32)
        if HAS_GRAD_X0:
            gradient, second = load_pairs(grad_x0_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        if HAS_GRAD_X:
            if PATCH == 0:
                h, second_h = load_pairs(grad_x_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
            else:
                at_x = tile_address(x_c, first_s, place, S, W, C, PATCH, BLOCK_S)
                if EVEN:
                    h = tl.load(grad_x_ptr + at_x)
                else:
                    h = tl.load(grad_x_ptr + at_x, mask=mask, other=0.0)
                h, second_h = split_pairs(h.to(tl.float32), BLOCK_C, BLOCK_S)
            gradient = tl.fma(sigma, h, gradient)
            second = tl.fma(sigma, second_h, second)
        eps, second_eps = load_noise(
            eps_ptr,
            place,
            mask,
            (first_c, start),
            seed,
            position,
            S,
            STREAM,
            HAS_EPS,
            EVEN,
            BLOCK_C,
            BLOCK_S,
            VECTOR,
        )
        of_log_var = gradient_of_log_var(gradient, log_var, w, eps, grad_kl, low, high, SAMPLES)
        second_of_log_var = gradient_of_log_var(
            second, second_log_var, w, second_eps, grad_kl, low, high, SAMPLES
        )
        of_mean = tl.fma(grad_kl, mean, w * gradient)
        second_of_mean = tl.fma(grad_kl, second_mean, w * second)
        of_mean = tl.interleave(of_mean, second_of_mean).to(grad_mean_ptr.dtype.element_ty)
        of_log_var = tl.interleave(of_log_var, second_of_log_var)
        of_log_var = of_log_var.to(grad_log_var_ptr.dtype.element_ty)
        at = tile_address(c, first_s, place, S, W, C, 0, BLOCK_S)
        if EVEN:
            tl.store(grad_mean_ptr + at, of_mean)
            tl.store(grad_log_var_ptr + at, of_log_var)
        else:
            tl.store(grad_mean_ptr + at, of_mean, mask=mask)
            tl.store(grad_log_var_ptr + at, of_log_var, mask=mask)


_odd_source_backward_kernel = for_any_alignment(_source_backward_kernel)
