"""Triton kernels of the loss: one for loss and gradient, one that adds up, one that scales.

Formulas stand in `op.py`, launches in `launch.py`.
"""

from __future__ import annotations

from mixflow_fast.kernels.interpolate.triton_kernels import load_data
from mixflow_fast.kernels.layout import address, tile_start
from mixflow_fast.kernels.philox import normal_tile
from mixflow_fast.kernels.runtime import jit, tl
from mixflow_fast.kernels.schedule import loss_weight, path_coefficients, path_derivatives


@jit
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
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOOPS: tl.constexpr,
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
    if WEIGHT == "sample":
        weight = weight * tl.load(weight_ptr + sample * weight_sample_stride)
    slope = 2.0 * gradient_scale
    if PREDICTION == "score":
        slope = slope * sigma
    if UPSTREAM:
        slope = slope * tl.load(upstream_ptr + sample * upstream_stride)
    first_c, first_s = tile_start(program, S, BLOCK_C, BLOCK_S, LOOPS)
    c = first_c + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK_S), tl.float32)
    for i in range(LOOPS):
        start = first_s + i * BLOCK_S
        s = start + tl.arange(0, BLOCK_S)
        mask = (c < C)[:, None] & (s < S)[None, :]
        offset = c[:, None] * S + s[None, :]
        place = address(c, s, S, W, PRED_C, PATCH)
        error = tl.load(pred_ptr + sample * pred_stride + place, mask=mask, other=0.0)
        error = error.to(tl.float32)
        if PREDICTION == "score":
            error = error * sigma
        if PREDICTION == "velocity" or PREDICTION == "data":
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
            if PREDICTION == "data":
                error = error - x1
            else:
                error = error - d_alpha * x1
        if PREDICTION != "data":
            if HAS_X0:
                x0 = tl.load(x0_ptr + sample * x0_stride + offset, mask=mask, other=0.0)
                x0 = x0.to(tl.float32)
            else:
                x0 = normal_tile(seed, NOISE, position, first_c, start, S, BLOCK_C, BLOCK_S, VECTOR)
            if PREDICTION == "velocity":
                error = error - d_sigma * x0
            elif PREDICTION == "noise":
                error = error - x0
            else:
                error = error + x0
        weighted = weight * error
        if WEIGHT == "element":
            at = (offset // weight_places) * weight_channel_stride
            at += (offset % weight_places) * weight_place_stride
            at += sample * weight_sample_stride
            weighted = weighted * tl.load(weight_ptr + at, mask=mask, other=0.0)
        # Beyond the sample's end there is noise, which is no error of the prediction.
        if LOSS:
            total += tl.where(mask, weighted * error, 0.0)
        if GRADIENT:
            out = gradient_ptr + sample * gradient_stride + place
            dtype: tl.constexpr = gradient_ptr.dtype.element_ty
            tl.store(out, (slope * weighted).to(dtype), mask=mask)
            if LEARN_SIGMA:
                zero = tl.zeros((BLOCK_C, BLOCK_S), tl.float32).to(dtype)
                # The other channels of the token, or the other half of the image.
                half = S
                if PATCH > 0:
                    half = C
                tl.store(out + half, zero, mask=mask)
    if LOSS:
        tl.store(partial_ptr + index, tl.sum(tl.sum(total, axis=1), axis=0))


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


@jit
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


@jit
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
