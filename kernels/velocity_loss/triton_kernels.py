"""Triton kernels of the loss: one for loss and gradient, one that adds up, one that scales.

Formulas stand in `op.py`, launches in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.interpolate.triton_kernels import load_data
from mixflow_fast.kernels.layout import load_pairs, split_pairs, tile_address, tile_start
from mixflow_fast.kernels.philox import normal_pairs
from mixflow_fast.kernels.runtime import for_any_alignment, jit, tl
from mixflow_fast.kernels.schedule import loss_weight, path_coefficients, path_derivatives


@jit(
    any_value=["programs", "loops", "upstream_stride"],
    any_address=["seed_ptr", "ids_ptr", "times_ptr", "upstream_ptr", "partial_ptr"],
)
def _velocity_loss_kernel(
    pred_ptr,
    x1_ptr,
    std_ptr,
    x0_ptr,
    seed_ptr,
    ids_ptr,
    times_ptr,
    weight_ptr,
    upstream_ptr,
    partial_ptr,
    gradient_ptr,
    pred_stride,
    x1_stride,
    std_stride,
    x0_stride,
    weight_sample_stride,
    weight_channel_stride,
    weight_place_stride,
    weight_places,
    upstream_stride,
    gradient_stride,
    programs,
    loops,
    S,
    scale,
    gradient_scale,
    NOISE: tl.constexpr,
    POSTERIOR: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_X0: tl.constexpr,
    MOMENTS: tl.constexpr,
    PREDICTION: tl.constexpr,
    LOSS_WEIGHT: tl.constexpr,
    WEIGHT: tl.constexpr,
    PATH: tl.constexpr,
    NOISE_AT_1: tl.constexpr,
    LEARN_SIGMA: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    UPSTREAM: tl.constexpr,
    PRED_C: tl.constexpr,
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
    time = tl.load(times_ptr + sample)
    alpha, sigma = path_coefficients(time, PATH, NOISE_AT_1)
    d_alpha, d_sigma = path_derivatives(time, alpha, sigma, PATH, NOISE_AT_1)
    weight = 1.0
    if LOSS_WEIGHT != "none":
        weight = loss_weight(alpha, sigma, d_alpha, d_sigma, LOSS_WEIGHT)
    if NOISE_AT_1:  # the caller's clock runs against the path's
        d_alpha = -d_alpha
        d_sigma = -d_sigma
    if PREDICTION == "data":
        d_alpha = 1.0
    elif PREDICTION == "noise":
        d_sigma = 1.0
    elif PREDICTION == "score":
        d_sigma = -1.0
    if WEIGHT == "sample":
        weight = weight * tl.load(weight_ptr + sample * weight_sample_stride)
    slope = 2.0 * gradient_scale * weight
    if PREDICTION == "score":
        slope = slope * sigma
    if UPSTREAM:
        slope = slope * tl.load(upstream_ptr + sample * upstream_stride)
    first_c, first_s, tiles = tile_start(program, S, loops, BLOCK_C, BLOCK_S)
    first = first_c * S + first_s
    x1_ptr += sample * x1_stride + first
    std_ptr += sample * std_stride + first
    x0_ptr += sample * x0_stride + first
    pred_ptr += sample * pred_stride
    gradient_ptr += sample * gradient_stride
    c = tl.arange(0, BLOCK_C)
    pred_c = first_c + c
    if PATCH == 0:
        pred_ptr += first
        gradient_ptr += first
        pred_c = c
    even = 2 * tl.arange(0, BLOCK_S // 2)
    total = tl.zeros((BLOCK_C, BLOCK_S // 2), tl.float32)
    for i in range(tiles):
        place = i * BLOCK_S
        start = first_s + place
        s = start + tl.arange(0, BLOCK_S)
        inside = (first_c + c < C)[:, None]
        mask = inside & (s < S)[None, :]
        at = tile_address(pred_c, first_s, place, S, W, PRED_C, PATCH, BLOCK_S)
        if PATCH == 0:
            error, second = load_pairs(pred_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
        else:
            if EVEN:
                error = tl.load(pred_ptr + at)
            else:
                error = tl.load(pred_ptr + at, mask=mask, other=0.0)
            error, second = split_pairs(error.to(tl.float32), BLOCK_C, BLOCK_S)
        if PREDICTION == "score":
            error = error * sigma
            second = second * sigma
        if PREDICTION == "velocity" or PREDICTION == "data":
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
            error = tl.fma(-d_alpha, x1, error)
            second = tl.fma(-d_alpha, second_x1, second)
        if PREDICTION != "data":
            if HAS_X0:
                x0, second_x0 = load_pairs(x0_ptr, place, S, mask, EVEN, BLOCK_C, BLOCK_S)
            else:
                x0, second_x0 = normal_pairs(
                    seed, NOISE, position, first_c, start, S, BLOCK_C, BLOCK_S // 2, VECTOR
                )
            error = tl.fma(-d_sigma, x0, error)
            second = tl.fma(-d_sigma, second_x0, second)
        if not EVEN:
            # Beyond the sample's end there is noise, which is no error of the prediction.
            error = tl.where(inside & (start + even < S)[None, :], error, 0.0)
            second = tl.where(inside & (start + even + 1 < S)[None, :], second, 0.0)
        weighted = error
        second_weighted = second
        if WEIGHT == "element":
            element = (first_c + c)[:, None] * S + s[None, :]
            of = (element // weight_places) * weight_channel_stride
            of += (element % weight_places) * weight_place_stride
            of += sample * weight_sample_stride
            w = tl.load(weight_ptr + of, mask=mask, other=0.0)
            w, second_w = split_pairs(w, BLOCK_C, BLOCK_S)
            weighted = w * error
            second_weighted = second_w * second
        if LOSS:
            total = tl.fma(weighted, error, total)
            total = tl.fma(second_weighted, second, total)
        if GRADIENT:
            dtype: tl.constexpr = gradient_ptr.dtype.element_ty
            out = tl.interleave(slope * weighted, slope * second_weighted).to(dtype)
            if EVEN:
                tl.store(gradient_ptr + at, out)
            else:
                tl.store(gradient_ptr + at, out, mask=mask)
            if LEARN_SIGMA:
                zero = tl.zeros((BLOCK_C, BLOCK_S), tl.float32).to(dtype)
                # The other channels of the token, or the other half of the image.
                half = C * S
                if PATCH > 0:
                    half = C
                tl.store(gradient_ptr + (at + half), zero, mask=mask)
    if LOSS:
        tl.store(partial_ptr + index, weight * tl.sum(tl.sum(total, axis=1), axis=0))


# For samples whose size is not `regular`: they lie at any address, so there is one kernel for all.
_odd_velocity_loss_kernel = for_any_alignment(_velocity_loss_kernel)


@jit
def _reduce_rows(
    partial_ptr, row, B, programs, numel, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr
):
    total = tl.zeros((BLOCK_B, BLOCK_P), tl.float32)
    for start in range(0, programs, BLOCK_P):
        column = start + tl.arange(0, BLOCK_P)
        mask = (row < B)[:, None] & (column < programs)[None, :]
        offset = row.to(tl.int64)[:, None] * programs + column[None, :]
        total += tl.load(partial_ptr + offset, mask=mask, other=0.0)
    return tl.div_rn(tl.sum(total, axis=1), numel)


@jit(any_value=["B", "programs"])
def _reduce_kernel(
    partial_ptr,
    out_ptr,
    samples_ptr,
    B,
    programs,
    numel,
    divisor,
    PER_SAMPLE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sums of partials in a fixed order: per sample, or of all samples in one program, which
    writes those per sample as well.
    """
    rows = tl.arange(0, BLOCK_B)
    if PER_SAMPLE:
        row = tl.program_id(0) * BLOCK_B + rows
        losses = _reduce_rows(partial_ptr, row, B, programs, numel, BLOCK_B, BLOCK_P)
        tl.store(out_ptr + row, losses, mask=row < B)
    else:
        total = tl.zeros((BLOCK_B,), tl.float32)
        for first in range(0, B, BLOCK_B):
            row = first + rows
            losses = _reduce_rows(partial_ptr, row, B, programs, numel, BLOCK_B, BLOCK_P)
            tl.store(samples_ptr + row, losses, mask=row < B)
            total += losses
        tl.store(out_ptr, tl.div_rn(tl.sum(total, axis=0), divisor))


@jit(any_value=["upstream_stride", "programs"], any_address=["upstream_ptr"])
def _scale_gradient_kernel(
    gradient_ptr, upstream_ptr, upstream_stride, numel, programs, BLOCK: tl.constexpr
):
    index = tl.program_id(0)
    sample = (index // programs).to(tl.int64)
    upstream = tl.load(upstream_ptr + sample * upstream_stride)
    # A loss that is not scaled leaves the gradient unread.
    if upstream != 1.0:
        element = (index % programs) * BLOCK + tl.arange(0, BLOCK)
        at = gradient_ptr + sample * numel + element
        value = tl.load(at, mask=element < numel, other=0.0).to(tl.float32) * upstream
        tl.store(at, value.to(gradient_ptr.dtype.element_ty), mask=element < numel)
