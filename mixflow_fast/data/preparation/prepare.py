"""Makes a set of prepared images, `mixflow-images/1`: ADM's crops, decoded and resized once.

```
manifest.json       what the set is, and every file with its SHA-256
shards/00000.tar    the images (`preparation/formats.py`)
index.npy           int64 (N, 4): shard, offset in its file, bytes, label
source.npy          int64 (N,): number of the image in the sorted list of the source
names.txt           the source's files, a line an image
skipped.jsonl       {source, file, reason} of images that were left out, if any were
```
Shard k holds the images with the source's numbers [k R, (k + 1) R) that can be used, and is a
function of these and of the settings alone. Ids are places in index.npy, without gaps.
"""

from __future__ import annotations

import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import features

from mixflow_fast import __version__
from mixflow_fast.data.preparation.formats import (
    EXACT,
    Format,
    Shard,
    encode,
    payload_offsets,
)
from mixflow_fast.data.preparation.scan import BadImage, core_count, quiet_pillow
from mixflow_fast.data.preparation.shard_work import ShardWork, named_errors
from mixflow_fast.data.preparation.source import Source, read_crop
from mixflow_fast.data.prepared_images import IMAGES_FORMAT
from mixflow_fast.data.set_files import file_record, write_manifest
from mixflow_fast.files import write_bytes
from mixflow_fast.metrics.progress import Progress

SHARD_ROWS, MAX_BAD = 4096, 100
_REPA_FORMAT, _REPA_ROWS = "repa-images/1", 1000  # images/{number:08d}[:5]/
_AHEAD = 4  # images in work or waiting, for each thread

OnBad = Literal["refuse", "skip"]
Layout = Literal["shards", "repa"]


class BadImages(ValueError):
    """Images that cannot be used, where that is not accepted.

    Attributes:
        bad: all of them, by number.
    """

    def __init__(self, bad: list[BadImage], total: int, way_out: str) -> None:
        self.bad = bad
        lines = "".join(f"\n  {image.describe()}" for image in bad)
        super().__init__(f"{len(bad):,} of {total:,} images cannot be used. {way_out}:{lines}")


@dataclass(frozen=True)
class Settings:
    """What decides about the content of a set.

    Attributes:
        size: side in pixels.
        image_format: webp, raw or jpeg; png for REPA's layout.
        layout: "shards", or "repa": `images/00000/img00000000.png` and `images/dataset.json`.
        shard_rows: images of the source a shard; a thousand in REPA's layout.
    """

    size: int
    image_format: Format = "webp"
    layout: Layout = "shards"
    shard_rows: int = SHARD_ROWS

    def __post_init__(self) -> None:
        if self.size < 1 or self.shard_rows < 1:
            raise ValueError(
                f"size and shard_rows must be >= 1, got {self.size} and {self.shard_rows}"
            )
        if (self.layout == "repa") != (self.image_format == "png"):
            raise ValueError(
                f"the layout {self.layout} has no images of format {self.image_format}: repa has "
                "png alone, shards have webp, raw or jpeg"
            )

    def record(self, source: Source) -> dict[str, object]:
        """Plain values that all parts of a set must agree on."""
        return {
            "format": _REPA_FORMAT if self.layout == "repa" else IMAGES_FORMAT,
            "size": self.size,
            "image_format": self.image_format,
            "shard_rows": self.rows,
            "classes": source.scheme,
            "preprocessing": preprocessing(),
            "source": {"images": len(source), "names_sha256": source.digest()},
        }

    @property
    def rows(self) -> int:
        """Images of the source a shard."""
        return _REPA_ROWS if self.layout == "repa" else self.shard_rows


@dataclass(frozen=True)
class Prepared:
    """What a process has done.

    Attributes:
        complete: the set is whole.
        shards, unfinished: in all, and those that are not done.
        made: shards that this process made.
        skipped: images left out, of the whole set; None while it is not whole.
    """

    complete: bool
    shards: int
    unfinished: int
    made: int
    skipped: int | None


def preprocessing() -> str:
    """How the pixels are made, with the version of the library that makes them."""
    import PIL

    return f"adm-center-crop/pil/{PIL.__version__}"


def prepare(
    source: Source,
    out: Path,
    settings: Settings,
    *,
    on_bad: OnBad = "refuse",
    max_bad: int = MAX_BAD,
    threads: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Prepared:
    """Make a set, or this process's part of it; goes on where an earlier start has ended.

    A shard with an image that cannot be used is not written under "refuse", all others are, so
    that the whole list is known at the end and only these shards are left to be made.

    Args:
        source: the images.
        out: folder of the set.
        settings: what decides about its content.
        on_bad: "skip" leaves out images that cannot be used.
        max_bad: how many may be left out.
        threads: 0: one a core.
        rank, world: this process among those that were started together.

    Raises:
        BadImages: images cannot be used.
        ValueError: as `ShardWork`; no image is left.
        OSError: a file cannot be read or written.
    """
    if settings.image_format == "webp" and not features.check("webp"):
        raise ValueError(
            "this build of Pillow cannot write WebP: install Pillow's wheel (pip install "
            "--force-reinstall pillow), or choose another format"
        )
    count = -(-len(source) // settings.rows)
    folder = "images" if settings.layout == "repa" else "shards"
    suffix = {"raw": ".npy", "png": ""}.get(settings.image_format, ".tar")
    record = settings.record(source)
    with ShardWork(out, record, count, suffix, rank, world, folder=folder) as work:
        if work.complete:
            return Prepared(True, count, 0, 0, len(_known_bad(work)))
        if on_bad == "refuse":  # an earlier start left out what may be a good file by now
            work.make_again(lambda record: bool(_Done.of(record).skipped))
        mine = work.remaining()
        maker = _Maker(work, source, settings, on_bad, max_bad, threads or core_count())
        with (
            quiet_pillow(),
            Progress(
                sum(len(maker.numbers(k)) for k in mine), "prepare", "images", quiet=rank != 0
            ) as progress,
        ):
            found = maker.make(mine, progress)
        skipped = sorted([*_known_bad(work), *found], key=lambda image: image.source)
        _judge(skipped, len(source), on_bad, max_bad)
        complete = work.complete_with(lambda records: _finish(out, records, source, settings))
        unfinished = work.unfinished()
    return Prepared(complete, count, unfinished, len(mine), len(skipped) if complete else None)


@dataclass(frozen=True)
class _Maker:
    """Writes shards of a set."""

    work: ShardWork
    source: Source
    settings: Settings
    on_bad: OnBad
    max_bad: int
    threads: int

    def numbers(self, shard: int) -> range:
        """The source's numbers of a shard."""
        rows = self.settings.rows
        return range(shard * rows, min((shard + 1) * rows, len(self.source)))

    def make(self, shards: list[int], progress: Progress) -> list[BadImage]:
        """Write shards, and return what is bad in those that were not written."""
        found: list[BadImage] = []
        before = len(_known_bad(self.work))
        # One stream over all shards: while one is flushed, images of the next are made.
        numbers = (number for shard in shards for number in self.numbers(shard))
        with ThreadPoolExecutor(self.threads) as pool:
            crops = _in_order(pool, self._crop, numbers, _AHEAD * self.threads)
            try:
                for shard in shards:
                    bad = self._make_shard(shard, crops, progress, before)
                    if self.on_bad == "refuse":
                        found += bad
                    before += len(bad)
            finally:
                pool.shutdown(cancel_futures=True)
        return found

    def _make_shard(
        self, number: int, crops: Iterator[_Crop | BadImage], progress: Progress, before: int
    ) -> list[BadImage]:
        """Write a shard, unless it has bad images that are refused; returns its bad images."""
        work, settings = self.work, self.settings
        bad, sums = list[BadImage](), np.zeros((2, 3), np.int64)
        path = work.temporary(number)
        with named_errors(path), Shard(path, settings.image_format, settings.size) as shard:
            for image in self.numbers(number):
                crop = next(crops)
                progress.advance()
                if isinstance(crop, BadImage):
                    bad.append(crop)
                    progress.log(f"bad image: {crop.describe()}")
                    if self.on_bad == "skip" and before + len(bad) > self.max_bad:
                        known = [*_known_bad(work), *bad]
                        _judge(known, len(self.source), self.on_bad, self.max_bad)
                elif not bad or self.on_bad == "skip":
                    shard.add(image, int(self.source.labels[image]), crop.payload)
                    sums += crop.sums
        if bad and self.on_bad == "refuse":
            work.discard(number)
            return bad
        done = _Done(shard.sizes, [asdict(b) for b in bad], sums[0].tolist(), sums[1].tolist())
        work.finish(number, shard.rows, asdict(done))
        return bad

    def _crop(self, number: int) -> _Crop | BadImage:
        name = self.source.files[number]
        try:
            pixels = read_crop(self.source.read(number), self.settings.size)
        except ValueError as error:
            return BadImage(number, name, str(error))
        return _Crop(encode(pixels, self.settings.image_format), _sums(pixels))


@dataclass(frozen=True)
class _Done:
    """What is noted of a shard for the manifest, beside its rows, bytes and SHA-256.

    Attributes:
        sizes: bytes of each image.
        skipped: `BadImage`s as plain values.
        sum, sum_of_squares: of each channel over all pixels.
    """

    sizes: list[int]
    skipped: list[dict[str, object]]
    sum: list[int]
    sum_of_squares: list[int]

    @classmethod
    def of(cls, record: Mapping[str, object]) -> _Done:
        """From what a done file holds."""
        return cls(**{field.name: record[field.name] for field in fields(cls)})


@dataclass(frozen=True)
class _Crop:
    """An image as it is stored, and the sums over its pixels and their squares, (2, 3) int64."""

    payload: bytes
    sums: np.ndarray


def _sums(pixels: np.ndarray) -> np.ndarray:
    """Sums over pixels and their squares of each channel, (2, 3) int64; exact."""
    from PIL import Image

    counts = np.array(Image.fromarray(pixels).histogram(), np.int64).reshape(3, 256)
    values = np.arange(256)
    return np.stack([counts @ values, counts @ values**2])


def _in_order(
    pool: ThreadPoolExecutor,
    function: Callable[[int], _Crop | BadImage],
    numbers: Iterable[int],
    most: int,
) -> Iterator[_Crop | BadImage]:
    """Results in the order of the numbers, of which at most `most` are in memory at a time."""
    waiting: deque[Future[_Crop | BadImage]] = deque()
    for number in numbers:
        waiting.append(pool.submit(function, number))
        if len(waiting) >= most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _known_bad(work: ShardWork) -> list[BadImage]:
    """Images that were left out of shards that are done, whoever made them."""
    return [BadImage(**image) for r in work.finished() for image in _Done.of(r).skipped]


def _judge(bad: list[BadImage], total: int, on_bad: OnBad, max_bad: int) -> None:
    """Refuse bad images, or too many of them."""
    if bad and on_bad == "refuse":
        raise BadImages(
            bad,
            total,
            "The published ImageNet has none, so a copy of it is damaged: put good files in their "
            "place and run the command again, which makes only the shards that are left; or leave "
            "them out by --on-bad skip",
        )
    if len(bad) > max_bad:
        raise BadImages(
            bad, total, f"More than --max-bad {max_bad}: look at them, or allow more of them"
        )


def _finish(
    out: Path, records: list[dict[str, object]], source: Source, settings: Settings
) -> None:
    """Write what stands beside the shards, and the manifest."""
    done = [_Done.of(record) for record in records]
    skipped = [BadImage(**image) for d in done for image in d.skipped]
    missing = {image.source for image in skipped}
    kept = np.array([n for n in range(len(source)) if n not in missing], np.int64)
    if not len(kept):
        raise ValueError(f"no image of {source.root} can be used: nothing is left for {out}")
    files = []
    contents = _repa_files if settings.layout == "repa" else _index_files
    for name, content in (
        *contents(done, source, settings, kept),
        ("source.npy", _npy(kept)),
        ("names.txt", b"".join(_line(source.files[n]) for n in kept.tolist())),
        ("skipped.jsonl", b"".join(json.dumps(asdict(b)).encode() + b"\n" for b in skipped)),
    ):
        if content:
            write_bytes(out / name, content)
            files.append(file_record(out, name))
    write_manifest(
        out,
        {
            **settings.record(source),
            "version": __version__,
            "kind": "images",
            "layout": settings.layout,
            "exact": settings.image_format in EXACT,
            "count": len(kept),
            "skipped": len(skipped),
            "num_classes": len(source.classes),
            "class_names": list(source.classes),
            "statistics": _statistics(done, len(kept) * settings.size**2),
            "shards": [{k: r[k] for k in ("file", "rows", "bytes", "sha256")} for r in records],
            "files": files,
        },
    )


def _index_files(
    done: list[_Done], source: Source, settings: Settings, kept: np.ndarray
) -> list[tuple[str, bytes]]:
    """Where each image is."""
    index = np.empty((len(kept), 4), np.int64)
    first = 0
    for number, shard in enumerate(done):
        rows = slice(first, first + len(shard.sizes))
        labels = source.labels[kept[rows]]
        offsets = payload_offsets(settings.image_format, shard.sizes, labels.tolist())
        index[rows, 0], index[rows, 3] = number, labels
        index[rows, 1], index[rows, 2] = offsets, shard.sizes
        first = rows.stop
    return [("index.npy", _npy(index))]


def _repa_files(
    done: list[_Done], source: Source, settings: Settings, kept: np.ndarray
) -> list[tuple[str, bytes]]:
    """REPA's list of names and labels."""
    rows = zip(kept.tolist(), source.labels[kept].tolist(), strict=True)
    listed = [[f"{n:08d}"[:5] + f"/img{n:08d}.png", label] for n, label in rows]
    return [("images/dataset.json", json.dumps({"labels": listed}).encode())]


def _statistics(done: list[_Done], pixels: int) -> dict[str, list[float]]:
    """Mean and standard deviation of each channel, of values from 0 to 255."""
    mean = [sum(d.sum[c] for d in done) / pixels for c in range(3)]
    squares = [sum(d.sum_of_squares[c] for d in done) / pixels for c in range(3)]
    return {
        "mean": mean,
        "std": [max(0.0, s - m * m) ** 0.5 for s, m in zip(squares, mean, strict=True)],
    }


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _line(name: str) -> bytes:
    """A file's name as a line of names.txt, which is for people."""
    return os.fsencode(name).replace(b"\\", b"\\\\").replace(b"\n", b"\\n") + b"\n"
