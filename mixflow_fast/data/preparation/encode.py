"""Latents of a prepared set's images, as a set of their own.

A shard of latents is a function of the images, the encoder and the settings: batches have a fixed
size, the last one of a shard is filled up and cut, and none crosses shards. On one model of device
its bytes do not depend on how many ranks there are and how often they were stopped.

Images are decoded in threads while the encoder runs, and a batch is checked and written while the
next one is encoded.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from mixflow_fast.data.latents_store import FORMAT, LatentsInfo
from mixflow_fast.data.latents_writer import (
    SHARD_SAMPLES,
    ShardWriter,
    classes_digest,
    finish_store,
    to_float16,
)
from mixflow_fast.data.preparation.shard_work import ShardWork
from mixflow_fast.data.prepared_images import PreparedImages
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.messages import size_text
from mixflow_fast.metrics.progress import Progress

_Task = TypeVar("_Task")
_Made = TypeVar("_Made")
_PIXELS_OF_A_BATCH = 64 * 256 * 256  # 64 images at 256 pixels, 16 at 512


class LatentsEncoder(Protocol):
    """What encodes: the SD-VAE of `models/autoencoders/sdvae.py`.

    Attributes:
        shape: (C, h, w) of a latent.
        scale: factor of the latents, which is not applied.
        precision: "fp32" or "bf16".
    """

    shape: tuple[int, int, int]
    scale: float
    precision: str

    def __call__(self, images: Tensor) -> Moments:
        """Moments in float32 of (B, 3, S, S) uint8 images on its device."""
        ...

    def record(self) -> Mapping[str, object]:
        """What identifies it."""
        ...


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How a set is encoded.

    Attributes:
        mirrors: 2 encodes the mirrored images too.
        batch: images of one call of the encoder, mirrored ones counted; None: 64 at 256 pixels, 16
            at 512.
        threads: that decode images.
        allow_lossy: take a set whose images are not exact.
        shard_samples: samples of a shard.
    """

    mirrors: Literal[1, 2] = 2
    batch: int | None = None
    threads: int = 1
    allow_lossy: bool = False
    shard_samples: int = SHARD_SAMPLES


@dataclass(frozen=True)
class Encoded:
    """What `encode` did.

    Attributes:
        samples: of the set.
        made: samples that were encoded now, by this process.
        seconds: that it took.
        unfinished: shards that are left to other processes.
    """

    samples: int
    made: int
    seconds: float
    unfinished: int


def encode(
    prepared: Path,
    out: Path,
    encoder: LatentsEncoder,
    device: torch.device,
    options: EncodeOptions,
    rank: int = 0,
    world: int = 1,
    quiet: bool = False,
) -> Encoded:
    """Encode a prepared set, or the part of it that is left to this process.

    Args:
        prepared: folder of a set `mixflow-images/1`.
        out: folder of the latents; one that was begun with these settings is gone on with.
        encoder: on `device`.
        device: where it runs.
        options: how.
        rank, world: this process among those that were started together.
        quiet: no progress.

    Raises:
        ValueError: another set, a lossy one without `allow_lossy`, other settings than `out` was
            begun with, too little space; an image that cannot be read, a latent that is not finite
            or that float16 cannot hold (with the image's name).
        OSError: the disk is full. As with any other end only shards that were open are lost.
    """
    images = PreparedImages(prepared)
    if not images.exact and not options.allow_lossy:
        raise ValueError(
            f"the images of {prepared} are JPEG and not exact, and what was lost would be in every "
            "latent: prepare them as webp or raw, or give --allow-lossy"
        )
    batch = batch_of(options.batch, images.size**2, options.mirrors)
    precision = precision_of(encoder.precision, device, batch)
    info = _info(images, encoder, options.mirrors, precision)
    settings = {
        "format": FORMAT,
        "prepared": images.manifest_sha256,
        "encoder": info.encoder,
        "mirrors": options.mirrors,
        "precision": precision,
        "shard_samples": options.shard_samples,
    }
    plan = Plan(len(images), options.shard_samples, batch // options.mirrors, options.mirrors)
    shards = -(-plan.count // plan.shard_samples)
    start, made = time.monotonic(), 0
    with ShardWork(out, settings, shards, ".npy", rank, world, folder="moments") as work:
        _check_space(work, plan, info.shape)
        if numbers := work.remaining():
            run = _Run(images, encoder, device, plan, info.shape, options.threads)
            with deterministic_cudnn():
                made = run.encode(work, numbers, rank, quiet)

        def finish(records: list[dict[str, object]]) -> None:
            labels = images.labels(torch.arange(plan.count)).numpy()
            finish_store(out, info, records, labels, images.source)

        work.complete_with(finish)
        return Encoded(plan.count, made, time.monotonic() - start, work.unfinished())


@dataclass(frozen=True)
class Plan:
    """How samples lie in shards and batches."""

    count: int
    shard_samples: int
    batch_samples: int
    mirrors: int

    def samples(self, number: int) -> range:
        """The samples of a shard."""
        first = number * self.shard_samples
        return range(first, min(first + self.shard_samples, self.count))

    def rows(self, number: int) -> int:
        return len(self.samples(number)) * self.mirrors

    def batches(self, numbers: Iterable[int]) -> Iterator[tuple[int, range]]:
        """(shard, samples) of all batches, which never cross shards."""
        for number in numbers:
            samples = self.samples(number)
            for first in range(0, len(samples), self.batch_samples):
                yield number, samples[first : first + self.batch_samples]


class _Run:
    """Encodes shards, one after the other."""

    def __init__(
        self,
        images: PreparedImages,
        encoder: LatentsEncoder,
        device: torch.device,
        plan: Plan,
        row: Sequence[int],
        threads: int,
    ) -> None:
        self._images, self._encoder, self._device = images, encoder, device
        self._plan, self._row, self._threads = plan, row, max(1, threads)

    def encode(self, work: ShardWork, numbers: list[int], rank: int, quiet: bool) -> int:
        """Encode these shards; returns how many samples they have."""
        total = sum(len(self._plan.samples(n)) for n in numbers)
        label = "encode" if rank == 0 else f"encode (rank {rank})"
        with (
            Progress(total, label, "images", quiet=quiet) as progress,
            ThreadPoolExecutor(self._threads, thread_name_prefix="mixflow_fast-decode") as decoders,
            ThreadPoolExecutor(1, thread_name_prefix="mixflow_fast-shard") as finisher,
            _OpenShard(self._plan, self._row, work, finisher) as shard,
        ):
            begun, done = time.monotonic(), 0
            waiting: tuple[int, range, Callable[[], Tensor]] | None = None
            tasks = self._plan.batches(numbers)
            try:
                for (number, samples), images in ahead(
                    decoders, self._decoded, tasks, 2 * self._threads
                ):
                    # The batch before is written while the device is at this one.
                    copied = start_encoding(self._encoder, images, self._plan.mirrors, self._device)
                    if waiting is not None:
                        self._write(shard, *waiting)
                    waiting = number, samples, copied
                    done += len(samples)
                    progress.advance(len(samples))
                    progress.show(f"{done / (time.monotonic() - begun):.3g} images/s")
                if waiting is not None:
                    self._write(shard, *waiting)
            except BaseException:
                decoders.shutdown(wait=False, cancel_futures=True)
                raise
        return total

    def _decoded(self, task: tuple[int, range]) -> Tensor:
        """(batch, 3, S, S) uint8 images of a batch, the last rows empty where it is short."""
        samples = task[1]
        indices = torch.arange(samples.start, samples.stop)
        size = self._images.size
        images = torch.zeros(self._plan.batch_samples, 3, size, size, dtype=torch.uint8)
        images[: len(samples)] = self._images.pixels(indices)
        return images.pin_memory() if self._device.type == "cuda" else images

    def _write(
        self, shard: _OpenShard, number: int, samples: range, copied: Callable[[], Tensor]
    ) -> None:
        mirrors = self._plan.mirrors

        def name_of(row: int) -> str:
            name = repr(self._images.name_of(samples[row // mirrors]))
            return f"{name}, mirrored" if row % mirrors else name

        rows = copied()[: len(samples) * mirrors]
        shard.write(number, to_float16(rows, "moments", name_of))


class _OpenShard:
    """The shard that is being written; a full one is flushed and noted by a thread."""

    def __init__(
        self,
        plan: Plan,
        row: Sequence[int],
        work: ShardWork,
        finisher: ThreadPoolExecutor,
    ) -> None:
        self._plan, self._row, self._work, self._finisher = plan, row, work, finisher
        self._stack = contextlib.ExitStack()
        self._writer: ShardWriter | None = None
        self._left = 0
        self._finishing: Future[None] | None = None

    def write(self, number: int, rows: Tensor) -> None:
        """Append rows of a shard, whose rows come in order."""
        if self._writer is None:
            self._left = self._plan.rows(number)
            path = self._work.temporary(number)
            self._writer = self._stack.enter_context(ShardWriter(path, self._left, self._row))
        self._writer.write(rows)
        self._left -= len(rows)
        if not self._left:
            self._stack.close()
            self._wait()
            extra = {"statistics": self._writer.statistics()}
            self._writer = None
            self._finishing = self._finisher.submit(
                self._work.finish, number, self._plan.rows(number), extra
            )

    def _wait(self) -> None:
        if self._finishing is not None:
            self._finishing.result()
            self._finishing = None

    def __enter__(self) -> _OpenShard:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)
        self._wait()


def start_encoding(
    encoder: Callable[[Tensor], Moments], images: Tensor, mirrors: int, device: torch.device
) -> Callable[[], Tensor]:
    """Start to encode a batch; what is returned waits for its rows, float32 on the host.

    Args:
        encoder: on `device`.
        images: (B, 3, H, W) uint8 on the host.
        mirrors: 2 encodes the mirrored images too; row = 2 * image + mirror.
        device: where it runs.
    """
    x = images.to(device, non_blocking=True)
    if mirrors == 2:
        x = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
    rows = torch.cat(encoder(x)[:2], 1)
    if device.type != "cuda":
        return lambda: rows
    host = torch.empty(rows.shape, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


def _info(
    images: PreparedImages,
    encoder: LatentsEncoder,
    mirrors: int,
    precision: Mapping[str, object],
) -> LatentsInfo:
    """What the manifest of the latents says."""
    channels, height, width = encoder.shape
    return LatentsInfo(
        kind="moments",
        shape=(2 * channels, height, width),
        dtype="float16",
        mirrors=mirrors,
        count=len(images),
        num_classes=images.num_classes,
        scale=encoder.scale,
        size=images.size,
        encoder=encoder.record(),
        precision=precision,
        input_range=(-1.0, 1.0),
        preprocessing=images.preprocessing,
        source={
            "manifest": images.manifest_sha256,
            "exact": images.exact,
            "skipped": images.skipped,
        },
        classes=classes_digest(images.classes),
    )


def batch_of(batch: int | None, pixels: int, mirrors: int) -> int:
    """Images of one call of the encoder, mirrored ones counted.

    Args:
        batch: as a user gave it, if so.
        pixels: of an image.
        mirrors: rows of an image.

    Raises:
        ValueError: no multiple of the mirrors.
    """
    most = min(64, _PIXELS_OF_A_BATCH // pixels)
    batch = batch or max(1, most // mirrors) * mirrors
    if batch < 1 or batch % mirrors:
        raise ValueError(
            f"batch must be a multiple of the {mirrors} mirrors, got {batch}: it counts mirrored "
            "images"
        )
    return batch


def precision_of(dtype: str, device: torch.device, batch: int) -> dict[str, object]:
    """What the bits of the latents depend on beside the encoder."""
    on_gpu = device.type == "cuda"
    return {
        "dtype": dtype,
        "tf32": on_gpu and dtype == "fp32" and torch.backends.cudnn.allow_tf32,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "batch": batch,
    }


def _check_space(work: ShardWork, plan: Plan, row: Sequence[int]) -> None:
    """ValueError where the disk has too little space for the shards that nobody has done."""
    undone = [number for number in range(work.shards) if not work.path(number).exists()]
    rows = sum(plan.rows(number) for number in undone)
    needed, free = 2 * rows * math.prod(row), shutil.disk_usage(work.out).free
    if needed > free:
        raise ValueError(
            f"{work.out} needs {size_text(needed)} more, its disk has {size_text(free)} free: make "
            "room, or choose another --out"
        )


def ahead(
    pool: ThreadPoolExecutor,
    make: Callable[[_Task], _Made],
    tasks: Iterable[_Task],
    depth: int,
) -> Iterator[tuple[_Task, _Made]]:
    """(task, what is made of it) in order, up to `depth` of them made ahead by the pool."""
    pending: deque[tuple[_Task, Future[_Made]]] = deque()
    for task in tasks:
        pending.append((task, pool.submit(make, task)))
        if len(pending) > depth:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


@contextlib.contextmanager
def deterministic_cudnn() -> Iterator[None]:
    """cuDNN chooses algorithms by the shapes alone, and only deterministic ones."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
