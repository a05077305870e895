"""Seeds and positions of the draws, as tensors that stay on the device between calls; noise.

On the device because kernels read them there, and a captured CUDA graph reads them at every replay.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixflow_fast.flow.clock import engine_times
from mixflow_fast.flow.path import Path, per_sample
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.layout import to_tokens
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype

# 2^64 over the golden ratio: its multiples lie evenly and far apart.
_GOLDEN = 0x9E3779B97F4A7C15
_SEEDS: dict[tuple[int, torch.device], Tensor] = {}


def seed_on(seed: int, device: torch.device) -> Tensor:
    """The seed's bits on the device; one tensor for all calls."""
    if (seed, device) not in _SEEDS:
        _refuse_in_capture(device, "the seed")
        _SEEDS[seed, device] = _cached(lambda: philox.seed_tensor(seed, device), device)
    return _SEEDS[seed, device]


def draw_noise(seed: Tensor, ids: Tensor, like: Tensor, impl: str, stream: Stream) -> Tensor:
    """(B, ...) normal numbers for data like `like`: float32, float64 for float64 data."""
    noise = philox.normal(seed, stream, ids, like.shape[1:].numel(), impl)
    return noise.view(like.shape).to(compute_dtype(like))


def drop_weights(w: Tensor, dropout: float, seed: Tensor, ids: Tensor) -> Tensor:
    """Weights of a mixed source, (B,), some of them 0 with probability `dropout`, by position."""
    if not dropout:
        return w
    dropped = philox.uniform(seed, Stream.SOURCE_DROPOUT, ids)[:, 0] < dropout
    return torch.where(dropped, 0.0, w)


def perturbed(
    x: Tensor,
    strength: float,
    path: Path,
    clock: str,
    slowed_t: Tensor,
    noise: Tensor,
    patch_size: int,
) -> Tensor:
    """x + sigma_m g noise: as if the noise end were x0 + g noise; the target is not changed.

    Input perturbation (Ning et al. 2023, arXiv 2301.11706), which stands for a sampler's errors.

    Args:
        x: (B, ...) interpolation at `slowed_t`, or its (B, N, p p C) tokens.
        strength: g (the paper: 0.1, CIFAR-10 0.15).
        path, clock: of the interpolation; `slowed_t` (B,) is in this clock.
        noise: (B, ...) in the shape of the data.
        patch_size: p where x is tokens, 0 where it is not.

    Returns:
        in x's shape and dtype; the sum is made in the noise's.
    """
    sigma = path.coefficients(*engine_times(slowed_t, clock)).sigma
    added = strength * per_sample(sigma, noise).to(noise.dtype) * noise
    added = to_tokens(added, patch_size) if patch_size else added
    return (x.to(noise.dtype) + added).to(x.dtype)


def next_ids(counters: dict[torch.device, Tensor], x1: Tensor) -> Tensor:
    """Positions that no rank has used before, (B,) int64; no device sync but in the first call.

    The counter is advanced on the current stream: calls without ids belong on one stream.

    Args:
        counters: samples drawn so far, by device. Tensors that are advanced in place: a compiled
            step would freeze a Python number, and draw the same noise at every call.
        x1: the batch that needs them.
    """
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if x1.device not in counters:
        _refuse_in_capture(x1.device, "the counter of calls without ids")
        zero = partial(torch.zeros, (), dtype=torch.int64, device=x1.device)
        counters[x1.device] = _cached(zero, x1.device)
    counter = counters[x1.device]
    # Interleaved, so that ranks with batches of different sizes do not meet.
    ids = (counter + torch.arange(len(x1), device=x1.device)) * world + rank
    counter.add_(len(x1))
    offset = _worker_offset()
    return ids + offset if offset else ids


def _worker_offset() -> int:
    """Where the positions of a DataLoader's worker begin; 0 in any other process.

    Each worker has a copy of the counter, which is gone when the worker ends: without an offset
    all of them would draw the same numbers, in every epoch. PyTorch gives each worker of each
    epoch another seed.
    """
    if torch.compiler.is_compiling():
        return 0
    worker = torch.utils.data.get_worker_info()
    if worker is None:
        return 0
    warnings.warn(
        "MixFlow.prepare without ids in a DataLoader's worker: it draws from a counter that begins "
        "at the worker's seed, and a resumed run draws otherwise. Pass ids (the global positions "
        "of the examples), or call prepare in the training loop",
        stacklevel=4,
    )
    # A worker that was spawned has no process group, and equal seeds on all ranks are common.
    rank = os.environ.get("RANK", "0")
    seed = worker.seed + (int(rank) << 32 if rank.isdigit() else 0)
    # Multiplied, because the seeds of an epoch's workers are neighbours: far apart, no run of
    # positions meets another. Kept below 2^62, so that counting on does not overflow.
    return (seed * _GOLDEN) % (1 << 62)


def _cached(make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """A tensor that may be kept: one made under inference_mode could not be used outside of it.

    It is there when this returns. Calls on other streams read it, and would not wait for the one
    that fills it; once per device is no price.
    """
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False):
        made = make()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return made


def _refuse_in_capture(device: torch.device, what: str) -> None:
    # Memory that a capture allocates is written at its first replay, and read by others before.
    if device.type != "cuda" or torch.compiler.is_compiling():
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} must be on the device before a CUDA graph is captured: call the same "
            "MixFlow.prepare or mixflow_loss once before (a warm-up step does)"
        )
