"""Latents of captioned images, bucket by bucket: sets of their own in the usual format."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.buckets import Bucket, fit_to_bucket
from mixflow_fast.data.latents_store import LatentsInfo
from mixflow_fast.data.latents_writer import ShardWriter, classes_digest, finish_store, to_float16
from mixflow_fast.data.preparation.captioned.listing import BadItem
from mixflow_fast.data.preparation.captioned_source import CaptionedSource
from mixflow_fast.data.preparation.encode import Plan, ahead, start_encoding
from mixflow_fast.data.preparation.shard_work import ShardWork
from mixflow_fast.data.set_files import DONE
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.metrics.progress import Progress

SHARD_IMAGES = 2048  # 0.5 GB at 512 pixels, 2.1 GB at 1024
_PROBLEM = "image that cannot be decoded"


class PictureEncoder(Protocol):
    """The autoencoder of a text-to-image model, on a device.

    Attributes:
        scale: factor of the latents, which is not applied. Their shift is.
    """

    scale: float

    def __call__(self, images: Tensor) -> Moments:
        """Moments (B, C, h, w) in float32 of (B, 3, H, W) uint8 images; the mean is shifted."""
        ...


@dataclass(frozen=True)
class Autoencoder:
    """What is known of an autoencoder before its weights are read, and how they are.

    Attributes:
        channels: C of a latent.
        factor: pixels along the side of a place of the latent.
        scale: factor of the latents.
        record: what identifies it.
        load: reads the weights.
    """

    channels: int
    factor: int
    scale: float
    record: Mapping[str, object]
    load: Callable[[], PictureEncoder]


@dataclass(frozen=True)
class BucketPlan:
    """The work of one bucket.

    Attributes:
        bucket: the size.
        items: numbers of the source's items in it, (n,) int64.
        plan: their shards and batches.
        shape: of a stored row, (2 C, h, w).
    """

    bucket: Bucket
    items: np.ndarray
    plan: Plan
    shape: tuple[int, int, int]

    @property
    def shards(self) -> int:
        return -(-len(self.items) // self.plan.shard_samples)


@dataclass(frozen=True)
class _Skipped:
    """An item that was left out, as it stands in a done file."""

    item: int
    name: str
    detail: str


class BucketMaker:
    """Makes shards of one bucket.

    Args:
        work: the shards of the bucket's set.
        source: the images.
        bucket: what belongs to it.
        device: of the encoder.
        threads: that decode.
        judge: raises where so many images that cannot be decoded are too many; they are left out
            where it does not. None: their shards are not written.
    """

    def __init__(
        self,
        work: ShardWork,
        source: CaptionedSource,
        bucket: BucketPlan,
        device: torch.device,
        threads: int,
        judge: Callable[[Sequence[BadItem]], None] | None,
    ) -> None:
        self._work, self._source, self._bucket = work, source, bucket
        self._device, self._threads, self._judge = device, threads, judge
        self._bad = list[BadItem]()

    def make(
        self, numbers: list[int], encoder: PictureEncoder, rank: int, quiet: bool
    ) -> list[BadItem]:
        """Make shards, and return what is bad in those that were not written."""
        plan, name = self._bucket.plan, self._bucket.bucket.name
        label = f"latents {name}" if rank == 0 else f"latents {name} (rank {rank})"
        total = sum(len(plan.samples(n)) for n in numbers)
        with (
            Progress(total, label, "images", quiet=quiet) as progress,
            ThreadPoolExecutor(self._threads, thread_name_prefix="mixflow_fast-decode") as decoders,
            ThreadPoolExecutor(1, thread_name_prefix="mixflow_fast-shard") as finisher,
        ):
            # One stream over all shards: while one is flushed, images of the next are decoded.
            decoded = ahead(decoders, self._decoded, plan.batches(numbers), 2 * self._threads)
            pace, flushed = _Pace(progress), list[Future[None]]()
            try:
                for number in numbers:
                    self._make_shard(number, encoder, decoded, pace, finisher, flushed)
                    if len(numbers) > 1:
                        progress.log(f"{label}: shard {number + 1} of {self._work.shards}")
                for future in flushed:
                    future.result()
            except BaseException:
                decoders.shutdown(wait=False, cancel_futures=True)
                raise
        return self._bad if self._judge is None else []

    def _make_shard(
        self,
        number: int,
        encoder: PictureEncoder,
        decoded: Iterator[tuple[tuple[int, range], _Decoded]],
        pace: _Pace,
        finisher: ThreadPoolExecutor,
        flushed: list[Future[None]],
    ) -> None:
        """Write a shard, unless it has bad images that are refused."""
        plan = self._bucket.plan
        rows, skipped = plan.rows(number), list[_Skipped]()
        batches = -(-len(plan.samples(number)) // plan.batch_samples)
        waiting: tuple[range, _Decoded, Callable[[], Tensor]] | None = None
        with ShardWriter(self._work.temporary(number), rows, self._bucket.shape) as writer:
            for _ in range(batches):
                (_, samples), batch = next(decoded)
                # The batch before is written while the device is at this one.
                copied = start_encoding(encoder, batch.images, plan.mirrors, self._device)
                if waiting is not None:
                    self._write(writer, *waiting)
                waiting = samples, batch, copied
                if batch.bad:
                    skipped += batch.bad
                    writer.leave_out(plan.mirrors * len(batch.bad))
                    self._bad += _bad_items(batch.bad)
                    if self._judge is not None:
                        self._judge(self._bad)
                pace.advance(len(samples))
            self._write(writer, *waiting)
        if flushed:  # one at a time
            flushed.pop().result()
        if skipped and self._judge is None:
            self._work.discard(number)
            return
        extra = {"statistics": writer.statistics(), "skipped": [asdict(s) for s in skipped]}
        left = rows - plan.mirrors * len(skipped)
        flushed.append(finisher.submit(self._work.finish, number, left, extra))

    def _decoded(self, task: tuple[int, range]) -> _Decoded:
        """The images of a batch; rows are empty where it is short, and of images that are bad."""
        bucket, samples = self._bucket.bucket, task[1]
        images = torch.zeros(
            self._bucket.plan.batch_samples, 3, bucket.height, bucket.width, dtype=torch.uint8
        )
        bad = []
        for place, sample in enumerate(samples):
            item = int(self._bucket.items[sample])
            try:
                pixels = fit_to_bucket(self._source.image(item), bucket)
            except ValueError as error:
                bad.append(_Skipped(item, self._source.name(item), str(error)))
                continue
            images[place] = torch.from_numpy(pixels).permute(2, 0, 1)
        if self._device.type == "cuda":
            images = images.pin_memory()
        return _Decoded(images, bad)

    def _write(
        self, writer: ShardWriter, samples: range, batch: _Decoded, copied: Callable[[], Tensor]
    ) -> None:
        bucket, mirrors = self._bucket, self._bucket.plan.mirrors
        missing = {skipped.item for skipped in batch.bad}
        items = bucket.items[samples.start : samples.stop].tolist()
        places = [
            mirrors * place + m
            for place, item in enumerate(items)
            if item not in missing
            for m in range(mirrors)
        ]
        if not places:
            return

        def name_of(row: int) -> str:
            name = repr(self._source.name(items[places[row] // mirrors]))
            return f"{name}, mirrored" if places[row] % mirrors else name

        rows = copied()[places] if batch.bad else copied()[: len(places)]
        writer.write(to_float16(rows, "moments", name_of))


@dataclass(frozen=True)
class _Decoded:
    images: Tensor
    bad: list[_Skipped]


class _Pace:
    """A progress with images per second behind it."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._begun, self._done = progress, time.monotonic(), 0

    def advance(self, count: int) -> None:
        self._done += count
        self._progress.advance(count)
        self._progress.show(f"{self._done / (time.monotonic() - self._begun):.3g} images/s")


def _bad_items(skipped: Sequence[_Skipped]) -> list[BadItem]:
    return [BadItem(s.name, _PROBLEM, s.detail) for s in skipped]


def known_bad(root: Path) -> list[BadItem]:
    """What was left out of the shards of a set that are done, whoever made them."""
    found = list[_Skipped]()
    for path in sorted((root / DONE).glob("*.done.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # the next start makes it again
            continue
        found += [_Skipped(**skipped) for skipped in record.get("skipped", ())]
    return _bad_items(found)


def finish_bucket(
    root: Path,
    records: Sequence[Mapping[str, object]],
    bucket: BucketPlan,
    autoencoder: Autoencoder,
    precision: Mapping[str, object],
    source: Mapping[str, object],
) -> None:
    """Write numbers, labels and manifest of a bucket's set; nothing where no image is left."""
    missing = {s["item"] for record in records for s in record["skipped"]}
    kept = bucket.items[[item not in missing for item in bucket.items.tolist()]]
    if not len(kept):
        return
    width, height = bucket.bucket.width, bucket.bucket.height
    info = LatentsInfo(
        kind="moments",
        shape=bucket.shape,
        dtype="float16",
        mirrors=bucket.plan.mirrors,
        count=len(kept),
        num_classes=1,
        scale=autoencoder.scale,
        size=width if width == height else None,
        encoder=autoencoder.record,
        precision=precision,
        preprocessing=preprocessing(),
        source={**source, "bucket": bucket.bucket.name, "skipped": len(missing)},
        classes=classes_digest(()),
    )
    whole = [record for record in records if record["rows"]]
    finish_store(root, info, whole, np.zeros(len(kept), np.int32), kept)


def preprocessing() -> str:
    """How the pixels are made, with the version of the library that makes them."""
    import PIL

    return f"cover-center-crop/pil/{PIL.__version__}"
