"""The network's input: draw the times, make the noise in registers, interpolate, in one launch.

    t, m from (seed, position)                            (flow.schedule)
    x1 = data, or scale (mean + std eps)                  posterior of an autoencoder
    x_m = alpha_m x1 + sigma_m x0,  x0 ~ N(0, I)          (MixFlow, arXiv 2512.19311)

Reads x1 and writes x_m, once: 4 bytes an element in bf16. The noise is a function of (seed, ids,
element) and is never stored; the loss kernel makes the same numbers again.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.flow.clock import engine_times
from mixflow_fast.flow.path import get_path
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.layout import Layout, address, get_layout, tile_start
from mixflow_fast.kernels.philox import Stream, normal_tile
from mixflow_fast.kernels.runtime import jit, tl
from mixflow_fast.kernels.schedule import draw_times, path_coefficients, schedule_arguments


class Moments(NamedTuple):
    """Cached moments of an autoencoder's posterior: x1 = scale (mean + std eps), eps ~ N(0, I).

    eps is drawn from (seed, `Stream.POSTERIOR`, ids): afresh for every position, the same for the
    same one.

    Attributes:
        mean, std: (B, ...) float32, bf16 or fp16; std, not the log-variance.
        scale: of the latents, 0.18215 for Stable Diffusion's autoencoder.
    """

    mean: Tensor
    std: Tensor
    scale: float = 1.0


def sample_moments(moments: Moments, seed: int | Tensor, ids: Tensor, impl: str = "auto") -> Tensor:
    """(B, ...) float32 (float64 for float64 moments): the data that `moments` stand for."""
    mean, std, scale = moments
    dtype = compute_dtype(mean)
    numel = mean[0].numel() if len(mean) else 0
    eps = philox.normal(seed, Stream.POSTERIOR, ids, numel, impl).view(mean.shape)
    return (mean.to(dtype) + std.to(dtype) * eps.to(dtype)) * scale


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_tokens(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, H/p W/p, p p C), channels last in each token."""
    B, C, H, W = x.shape
    p = patch_size
    return x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)


def interpolate_reference(
    x1: Tensor | Moments,
    schedule: Schedule,
    path: str,
    seed: int | Tensor,
    ids: Tensor | None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    patch_size: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`interpolate` in plain PyTorch; float64 data is computed and kept in float64.

    The times are new tensors, and NaN where a given one lies outside [0, 1].
    """
    data = x1.mean if isinstance(x1, Moments) else x1
    dtype = compute_dtype(data)
    u = v = None
    given = [time for time in (t, slowed_t) if time is not None]
    if t is None:
        u = philox.uniform(seed, Stream.TIME, ids)[:, 0]
        t = schedule.label(u)
    if slowed_t is None:
        if schedule.gamma or schedule.interval == "full":
            v = philox.uniform(seed, Stream.SLOWING, ids)[:, 0]
        slowed_t = schedule.slowed(t, u, v)
    for time in given:
        slowed_t = torch.where((time >= 0) & (time <= 1), slowed_t, math.nan)
    if isinstance(x1, Moments):
        x1 = sample_moments(x1, seed, ids, "reference")
    if x0 is None:
        numel = data[0].numel() if len(data) else 0
        x0 = philox.normal_reference(seed, Stream.NOISE, ids, numel).view(data.shape)
    times = engine_times(slowed_t.to(dtype), schedule.clock)
    x = get_path(path).interpolate(x1.to(dtype), x0.to(dtype), *times).to(data.dtype)
    return to_tokens(x, patch_size) if patch_size else x, t.clone(), slowed_t.clone()


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
    law_first,
    law_span,
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
        law_first,
        law_span,
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
    # A device is not made to wait for a check: times outside [0, 1] give NaN. (min and max do not.)
    if HAS_T:
        m = tl.where((t >= 0.0) & (t <= 1.0), m, float("nan"))
    if HAS_M:
        m = tl.where((m >= 0.0) & (m <= 1.0), m, float("nan"))
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


def data_arguments(
    x1: Tensor,
    std: Tensor | None,
    x0: Tensor | None,
    seed: Tensor,
    ids: Tensor | None,
    scale: float,
    layout: Layout,
    element_size: int,
) -> dict[str, object]:
    """Keyword arguments for everything that says where a sample's data and noise come from.

    An absent tensor's pointer is any other's: a constexpr keeps the kernel from using it.
    """
    return {
        "x1_ptr": x1,
        "std_ptr": x1 if std is None else std,
        "x0_ptr": x1 if x0 is None else x0,
        "seed_ptr": seed,
        "ids_ptr": seed if ids is None else ids,
        "x1_stride": x1.stride(0),
        "std_stride": 0 if std is None else std.stride(0),
        "x0_stride": 0 if x0 is None else x0.stride(0),
        "programs": layout.programs,
        "S": layout.places,
        "scale": scale,
        "NOISE": int(Stream.NOISE),
        "POSTERIOR": int(Stream.POSTERIOR),
        "HAS_IDS": ids is not None,
        "HAS_X0": x0 is not None,
        "MOMENTS": std is not None,
        **layout.constants(element_size),
    }


def check_sample_size(x1: Tensor) -> None:
    if x1.shape[1:].numel() > runtime.MAX_SAMPLE:
        raise ValueError(
            "a sample must have at most 2**29 elements for the Triton kernels, got "
            f'{tuple(x1.shape[1:])}: use impl="reference"'
        )


def _launch(
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    schedule: Schedule,
    path: str,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    t: Tensor | None,
    slowed_t: Tensor | None,
    patch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    x, out_t, out_m = _empty(x1, patch_size)
    if not x.numel():
        return x, out_t, out_m
    # No sums here, so how much one program does may follow the size of the whole.
    loops = None
    if not patch_size:
        loops = 8 if x1.numel() >= 1 << 25 else 4 if x1.numel() >= 1 << 22 else 1
    layout = get_layout(x1.shape[1:], patch_size, loops)
    x1, std, x0 = (None if v is None else runtime.with_unit_rows(v) for v in (x1, std, x0))
    ids, t, slowed_t = (None if v is None else v.contiguous() for v in (ids, t, slowed_t))
    grid = (runtime.check_grid(len(x1) * layout.programs, len(x1)),)
    with runtime.on_device(x1):
        _interpolate_kernel[grid](
            given_t_ptr=out_t if t is None else t,
            given_m_ptr=out_m if slowed_t is None else slowed_t,
            x_ptr=x,
            t_ptr=out_t,
            m_ptr=out_m,
            PATH=path,
            HAS_T=t is not None,
            HAS_M=slowed_t is not None,
            **data_arguments(x1, std, x0, seed, ids, scale, layout, x1.element_size()),
            **schedule_arguments(schedule),
        )
    return x, out_t, out_m


def _empty(x1: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = x1.shape
    if patch_size:
        B, C, H, W = shape
        shape = (B, (H // patch_size) * (W // patch_size), patch_size * patch_size * C)
    t, m = (x1.new_empty(x1.shape[0], dtype=torch.float32) for _ in range(2))
    return x1.new_empty(shape), t, m


@torch.library.custom_op("mixflow_fast::interpolate", mutates_args=())
def _interpolate_op(
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    t: Tensor | None,
    slowed_t: Tensor | None,
    clock: str,
    distribution: str,
    interval: str,
    numbers: list[float],
    path: str,
    patch_size: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    schedule = Schedule.from_parts(clock, distribution, interval, numbers)
    if runtime.use_kernels(impl, x1.device, x1.dtype):
        return _launch(x1, std, scale, schedule, path, seed, ids, x0, t, slowed_t, patch_size)
    data = x1 if std is None else Moments(x1, std, scale)
    out = interpolate_reference(data, schedule, path, seed, ids, x0, t, slowed_t, patch_size)
    return tuple(v.contiguous() for v in out)


@_interpolate_op.register_fake
def _(
    x1,
    std,
    scale,
    seed,
    ids,
    x0,
    t,
    slowed_t,
    clock,
    distribution,
    interval,
    numbers,
    path,
    patch_size,
    impl,
):
    return _empty(x1, patch_size)


def interpolate(
    x1: Tensor | Moments,
    schedule: Schedule,
    path: str,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    patch_size: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `mixflow_fast::interpolate`, without gradients; arguments are not checked again.

    Args:
        x1: (B, ...) data, or its `Moments`; float32, bf16 or fp16, samples of (C, H, W) for tokens.
        schedule: of the times; its clock is the caller's.
        path: "linear", "gvp" or "vp".
        seed: `philox.seed_tensor`, read on the device.
        ids: (B,) int64 positions; needed for whatever is drawn.
        x0: (B, ...) noise; None is drawn in registers.
        t, slowed_t: (B,) float32 times in the caller's clock; None is drawn.
        patch_size: of the tokens to write; 0 writes x in x1's shape.
        impl: "auto", "triton" or "reference" (see `runtime.use_kernels`).

    Returns:
        x: dtype of x1, (B, ...) or (B, H/p W/p, p p C); t and slowed_t: (B,) float32.

    Raises:
        ValueError: impl="triton" where it cannot run; too large samples or batches.
    """
    moments = isinstance(x1, Moments)
    data, std, scale = x1 if moments else (x1, None, 1.0)
    if runtime.use_kernels(impl, data.device, data.dtype):
        check_sample_size(data)
    return _interpolate_op(
        *(data, std, float(scale), seed, ids, x0, t, slowed_t),
        *(schedule.clock, schedule.distribution.name, schedule.interval, schedule.numbers()),
        *(path, patch_size, impl),
    )
