"""Latents that other programs wrote: what they are, sample by sample, and a set of ours of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from mixflow_fast.data.latents_store import LatentsInfo, Shard
from mixflow_fast.data.latents_writer import (
    SHARD_SAMPLES,
    ShardWriter,
    finish_store,
    to_float16,
)
from mixflow_fast.data.preparation.shard_work import ShardWork
from mixflow_fast.data.set_files import sha256_of
from mixflow_fast.data.summary import digest_of, sample_rows

if TYPE_CHECKING:
    import numpy as np

_LOOKED_INTO = 64
# Channels' means of EDM2's latents: sd-vae-ft-mse of images in [0, 1] (Karras et al., 2024).
_EDM2_MEANS = (5.81, 3.25, 0.12, -2.15)
_EDM2_NEAR = 0.5
SD_VAE_SCALE = 0.18215

Progress = Callable[[int], None]


class ForeignLatents(Protocol):
    """Samples of latents in the files of another program.

    Attributes:
        info: what is known of them; `dtype` is that of the files. It has no shards.
        labels: (N,) int64.
        source: (N,) int64 numbers of the images that they were made of; -1 where nobody knows.
        notes: lines for people.
    """

    info: LatentsInfo
    labels: np.ndarray
    source: np.ndarray
    notes: tuple[str, ...]

    def read(self, samples: range) -> Tensor:
        """(mirrors * n, ...) rows of consecutive samples, sample by sample, floating."""
        ...

    def name_of(self, sample: int) -> str:
        """What a sample is called, for errors."""
        ...

    def places(self) -> list[Place]:
        """The files in which rows lie as they are needed.

        Raises:
            ValueError: rows do not lie in files as they are, and what to do.
        """
        ...


@dataclass(frozen=True)
class Place:
    """A file that holds the rows of consecutive samples.

    Attributes:
        path: of the file.
        rows: mirrors * samples.
        offsets: the byte at which the first row of each mirror lies, the others behind it; or
            (rows,) int64, the byte of every row.
    """

    path: Path
    rows: int
    offsets: tuple[int, ...] | np.ndarray


def copy_latents(
    latents: ForeignLatents,
    out: Path,
    progress: Progress,
    rank: int = 0,
    world: int = 1,
    shard_samples: int = SHARD_SAMPLES,
) -> bool:
    """Write samples as float16 into a set, `mixflow-latents/1`.

    A run that was interrupted goes on where it was, with any number of ranks.

    Args:
        latents: the samples.
        out: folder of the set.
        progress: called with how many samples were written since its last call.
        rank, world: this process among those that were started together.
        shard_samples: samples of a shard.

    Returns:
        whether the set is whole now; False where other ranks still write.

    Raises:
        ValueError: files that are damaged, values that cannot be stored, or a folder that holds
            something else.
        OSError: a full disk. What is done stays.
    """
    info = replace(latents.info, dtype="float16")
    count = info.count
    settings = {
        "format": "mixflow-latents/1",
        "kind": info.kind,
        "source": _digest(latents),
        "scale": info.scale,
        "normalisation": None if info.normalisation is None else asdict(info.normalisation),
        "input_range": list(info.input_range),
        "shard_samples": shard_samples,
    }
    shards = -(-count // shard_samples)
    with ShardWork(out, settings, shards, ".npy", rank, world, folder="moments") as work:
        if work.complete:
            return True
        remaining = work.remaining()
        _check_space(out, info, len(remaining) * shard_samples)
        for number in remaining:
            first = number * shard_samples
            samples = range(first, min(first + shard_samples, count))
            rows = info.mirrors * len(samples)
            with ShardWriter(work.temporary(number), rows, info.shape) as writer:
                for part in _parts(samples):
                    writer.write(_stored(latents, part))
                    progress(len(part))
            work.finish(number, rows, {"statistics": writer.statistics()})
        return work.complete_with(
            lambda records: finish_store(out, info, records, latents.labels, latents.source)
        )


def map_latents(
    latents: ForeignLatents, places: Sequence[Place], out: Path, progress: Progress
) -> None:
    """Write a manifest only: the rows stay where they are, by links from `out/files`.

    Args:
        latents: the samples.
        places: theirs.
        out: folder of the set; new or empty.
        progress: called with the bytes that were hashed since its last call.

    Raises:
        ValueError: values that no run could use, or `out` holds something.
    """
    import numpy as np

    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose another --out, or delete it")
    for number in sample_rows(latents.info.count, _LOOKED_INTO):  # before anything is written
        _stored(latents, range(number, number + 1))
    hashes = [sha256_of(place.path, progress) for place in places]
    links = out / "files"
    links.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (place, digest) in enumerate(zip(places, hashes, strict=True)):
        link, offsets = links / place.path.name, place.offsets
        link.symlink_to(place.path.resolve())
        if isinstance(offsets, np.ndarray):
            table = f"offsets-{number:05d}.npy"
            np.save(out / table, offsets)
            offsets = table
        shard = Shard(
            file=link.relative_to(out).as_posix(),
            rows=place.rows,
            bytes=place.path.stat().st_size,
            sha256=digest,
            offsets=offsets,
        )
        records.append(shard.to_record())
    finish_store(out, latents.info, records, latents.labels, latents.source)


def channel_means(latents: ForeignLatents) -> list[float]:
    """Mean of each channel over a fixed sample; of moments, of their means."""
    rows = [latents.read(range(n, n + 1)) for n in sample_rows(latents.info.count, _LOOKED_INTO)]
    values = torch.cat(rows).double()
    if latents.info.kind == "moments":
        values = values[:, : values.shape[1] // 2]
    return values.mean((0, *range(2, values.ndim))).tolist()


def like_edm2(means: Sequence[float]) -> bool:
    """Whether means of channels are those of EDM2's latents, whose VAE saw images in [0, 1]."""
    return len(means) == len(_EDM2_MEANS) and all(
        abs(mean - known) < _EDM2_NEAR for mean, known in zip(means, _EDM2_MEANS, strict=True)
    )


def _stored(latents: ForeignLatents, samples: range) -> Tensor:
    """Rows as they are stored; ValueError for those that cannot be."""
    mirrors = latents.info.mirrors

    def name_of(row: int) -> str:
        return latents.name_of(samples[row // mirrors])

    return to_float16(latents.read(samples), latents.info.kind, name_of)


def _parts(samples: range, size: int = 256) -> list[range]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def _digest(latents: ForeignLatents) -> str:
    """What tells the samples from others, in work.json."""
    rows = [latents.read(range(n, n + 1)) for n in sample_rows(latents.info.count, 8)]
    content = torch.cat(rows).numpy().tobytes()
    shape = repr((latents.info.count, latents.info.mirrors, latents.info.shape))
    return digest_of([shape.encode(), latents.labels.tobytes(), latents.source.tobytes(), content])


def _check_space(out: Path, info: LatentsInfo, samples: int) -> None:
    """Refuse a disk that cannot hold what is to be written."""
    row = 2
    for side in info.shape:
        row *= side
    needed, free = min(samples, info.count) * info.mirrors * row, shutil.disk_usage(out).free
    if needed > free:
        raise ValueError(
            f"{needed / 1e9:,.1f} GB are to be written to {out}, which has {free / 1e9:,.1f} GB "
            "free: choose another --out, or --in-place where the files can be mapped"
        )
