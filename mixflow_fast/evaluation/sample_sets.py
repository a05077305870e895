"""Sets of generated pictures: made in shards by any number of ranks, then one file of all.

    FOLDER/work.json       what the set is to be: protocol, weights, size; written first
    FOLDER/shards/, done/  1,000 ids each, and a note on each that is finished
    FOLDER/set.json        the whole set: protocol, hash, n, shards, and where the .npz is; last
    FOLDER.npz             the pictures as ADM's evaluator reads them: arr_0 (n, H, W, 3) uint8
    FOLDER.labels.npy      (n,) int64, for a network with classes
    FOLDER/latents/        if they are kept: (at most 1,000, C, h, w) float16 of each shard

A shard is a function of its ids, the protocol and the weights alone, so what a kill leaves is gone
on with by any number of ranks, to the same bytes (on one kind of device, at one batch size). The
.npz is a stored ZIP whose one member is streamed shard by shard; it is read again from the disk
before `set.json` names it and before the shards are deleted.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.preparation.shard_work import ShardWork, named_errors
from mixflow_fast.data.set_files import WORK, file_record, how_far
from mixflow_fast.evaluation.pictures_npz import map_npz
from mixflow_fast.evaluation.protocol import Protocol, differences
from mixflow_fast.evaluation.whole_set import (
    FORMAT,
    SET,
    DamagedShard,
    finish_renaming,
    labels_of,
    npz_of,
    partial_of,
    read_set_json,
    write_whole,
)
from mixflow_fast.files import existing_path, replacing
from mixflow_fast.metrics.progress import Progress

SHARD = 1000
_HEADROOM = 1 << 20  # of the disk, for the small files


@dataclass(frozen=True)
class Made:
    """Pictures of some ids.

    Attributes:
        pictures: (B, C, H, W) uint8 on any device, C = 1 or 3.
        labels: (B,) int64 on the CPU; None for a network without classes.
        latents: (B, C, h, w) that the pictures were decoded from; None where there are none.
    """

    pictures: Tensor
    labels: Tensor | None
    latents: Tensor | None = None


Maker = Callable[[Tensor], Made]
# Number and pictures, (at most `shard`, H, W, C) uint8, of a shard.
OnShard = Callable[[int, np.ndarray], None]


@dataclass(frozen=True, kw_only=True)
class SetPlan:
    """What a set is to be.

    Attributes:
        protocol: how its pictures come about; `set.n` is how many, with ids 0 .. n - 1.
        shape: (C, H, W) of a picture, C = 1 or 3.
        origin: what is compared and not hashed: which weights, by plain values. A set that was
            begun with others is refused.
        shard: ids in a shard.
        step: optimizer steps of the weights, where their file says it. It is noted beside the
            origin and not compared: an export of the same weights may not know it.
        latents: (C, h, w) of the latents that are kept, in float16; None: they are not.
    """

    protocol: Protocol
    shape: tuple[int, int, int]
    origin: Mapping[str, object]
    shard: int = SHARD
    step: int | None = None
    latents: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        channels, height, width = self.shape
        if channels not in (1, 3) or min(height, width) < 1 or self.shard < 1 or self.n < 1:
            raise ValueError(
                "a set holds n >= 1 pictures of shape (1 or 3, H, W) in shards of >= 1, got "
                f"n = {self.n}, {self.shape} and {self.shard}"
            )

    @property
    def n(self) -> int:
        """How many pictures."""
        section = self.protocol.record.get("set")
        n = section.get("n") if isinstance(section, Mapping) else None
        if not isinstance(n, int) or isinstance(n, bool):
            raise ValueError(f"the protocol of a set must say how many, set.n, got {n!r}")
        return n

    @property
    def shards(self) -> int:
        """How many shards."""
        return -(-self.n // self.shard)

    @property
    def stored(self) -> tuple[int, int, int, int]:
        """Of all pictures, as the file holds them: (n, H, W, C)."""
        channels, height, width = self.shape
        return self.n, height, width, channels

    @property
    def bytes(self) -> int:
        """Of all pictures."""
        return int(np.prod(self.stored, dtype=np.int64))

    def ids(self, shard: int) -> Tensor:
        """(at most `shard`,) int64."""
        return torch.arange(shard * self.shard, min((shard + 1) * self.shard, self.n))

    def settings(self) -> dict[str, object]:
        """What decides about the bytes of a shard."""
        return {
            "format": FORMAT,
            "protocol": self.protocol.record,
            "hash": self.protocol.sha256,
            "origin": dict(self.origin),
            "n": self.n,
            "picture": list(self.shape),
            "shard": self.shard,
            **({} if self.latents is None else {"latents": list(self.latents)}),
        }


def write_set(
    make: Maker,
    plan: SetPlan,
    folder: Path,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 64,
    keep_shards: bool = False,
    quiet: bool = True,
    begins: Callable[[int], None] | None = None,
    on_shard: OnShard | None = None,
    on_shard_bytes: int = 0,
) -> bool:
    """Make this process's shards of a set, and the whole set where all of them are done.

    Nothing that is finished is made again, and nothing is ever replaced: a set of another protocol
    or of other weights at the same place is an error, and so is a file that is not the set's.

    Args:
        make: pictures of ids, (B,) int64 in [0, n): a function of the ids and not of the order.
        plan: what is to be made.
        folder: of the set; it is made. The .npz lies beside it.
        rank, world: this process among those that were started together.
        batch_size: ids in one call of `make`, which do not cross shards.
        keep_shards: do not delete the shards when the .npz holds all.
        quiet: print no progress.
        begins: called with the number of this process's pictures before the first is made.
        on_shard: called with each shard that this process makes, before it counts as done.
        on_shard_bytes: that it writes at most for a picture, for the check of the free space.

    Returns:
        whether the set is whole now, by this process or another.

    Raises:
        ValueError: the folder holds another set, or something else; its names are taken; `make`
            gave something else than pictures.
        OSError: the disk is full, before anything is made where that can be seen.
    """
    _check_same(folder, plan)
    if (folder / SET).is_file():
        finish_renaming(folder)
        _delete_shards(folder, keep_shards)
        return True
    for path in (npz_of(folder), labels_of(folder)):
        # In this order: another rank may have finished the set just now.
        if path.exists() and not (folder / SET).is_file():
            raise ValueError(
                f"{path} exists and does not belong to a set in {folder}: it is never replaced, "
                "choose another --out"
            )
    settings = plan.settings()
    header = settings if plan.step is None else {**settings, "step": plan.step}
    with ShardWork(
        folder, settings, plan.shards, ".npy", rank, world, manifest=SET, kept=False
    ) as work:
        if plan.latents is not None:
            work.make_again(lambda record: not _has_latents(folder, record))
        mine = work.remaining()
        _check_space(folder, plan, work.unfinished(), on_shard_bytes)
        if begins is not None:
            begins(sum(len(plan.ids(number)) for number in mine))
        total = sum(len(plan.ids(number)) for number in mine)
        with Progress(total, folder.name, "pictures", quiet=quiet or not total) as counted:
            for number in mine:
                if number in work.remaining():  # else another start, with other ranks, made it
                    _make_shard(make, plan, work, number, batch_size, counted, on_shard)
            while True:
                try:
                    done = work.complete_with(
                        lambda records: write_whole(folder, plan.stored, header, records)
                    )
                    break
                except DamagedShard as damaged:
                    counted.log(f"shard {damaged.number} is damaged: made again")
                    work.forget(damaged.number)
                    _make_shard(make, plan, work, damaged.number, batch_size, counted, on_shard)
    if done:
        finish_renaming(folder)
        _delete_shards(folder, keep_shards)
    return done


def _check_same(folder: Path, plan: SetPlan) -> None:
    """Refuse a folder that was begun or made as another set, by the fields that differ."""
    said = folder / WORK
    try:
        begun = json.loads((said if said.exists() else folder / SET).read_text(encoding="utf-8"))
        other = Protocol(begun["protocol"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError):
        return  # nothing was begun, or `ShardWork` says what is there
    way_out = (
        "go on with what it was begun with, choose another --out, or delete the folder and what "
        "lies beside it under its name"
    )
    if found := differences([other, plan.protocol]):
        raise ValueError(
            f"{folder} was begun with another protocol, {other.short}, now it is "
            f"{plan.protocol.short}: {'; '.join(map(str, found))}: {way_out}"
        )
    # Some values are written otherwise than they are (tuples as lists).
    for name, now in json.loads(json.dumps(plan.settings())).items():
        if begun.get(name) != now:
            raise ValueError(
                f"{folder} was begun with {name} = {begun.get(name)!r}, now it is {now!r}: "
                f"{way_out}"
            )


def _check_space(folder: Path, plan: SetPlan, unfinished: int, beside: int) -> None:
    """Refuse to begin what cannot end: shards that are not there yet, and the file of all."""
    latents = 0 if plan.latents is None else 2 * math.prod(plan.latents)
    each = plan.bytes // plan.n + latents + beside
    need = min(plan.n, unfinished * plan.shard) * each + _HEADROOM
    partial = partial_of(npz_of(folder))
    if not (folder / SET).is_file():
        need += plan.bytes - (partial.stat().st_size if partial.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if free < need:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {need / 1e9:,.1f} GB more (shards, and one file of all pictures), and "
            f"{free / 1e9:,.1f} GB are free: free some, or choose another --out",
        )


def _make_shard(
    make: Maker,
    plan: SetPlan,
    work: ShardWork,
    number: int,
    batch_size: int,
    counted: Progress,
    on_shard: OnShard | None,
) -> None:
    """One shard, whole or not at all."""
    ids, path = plan.ids(number), work.temporary(number)
    labels: list[int] = []
    latents: list[Tensor] = []
    with named_errors(path), path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False}
        np.lib.format.write_array_header_1_0(
            file, {**header, "shape": (len(ids), *plan.stored[1:])}
        )
        for start in range(0, len(ids), batch_size):
            own = ids[start : start + batch_size]
            made = make(own)
            pictures = made.pictures
            if pictures.dtype != torch.uint8 or tuple(pictures.shape) != (len(own), *plan.shape):
                raise ValueError(
                    f"pictures must be uint8 ({len(own)}, *{plan.shape}), got {pictures.dtype} "
                    f"{tuple(pictures.shape)}"
                )
            file.write(memoryview(pictures.cpu().movedim(1, -1).contiguous().numpy()).cast("B"))
            labels += [] if made.labels is None else made.labels.tolist()
            if plan.latents is not None:
                latents.append(_halved(made.latents, (len(own), *plan.latents)))
            counted.advance(len(own))
    extra: dict[str, object] = {"labels": labels}
    if plan.latents is not None:
        extra["latents"] = _write_latents(work.out, number, torch.cat(latents))
    if on_shard is not None:
        on_shard(number, np.load(path, mmap_mode="r"))
    work.finish(number, rows=len(ids), extra=extra)


def _halved(latents: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Latents as they are kept.

    Raises:
        ValueError: none, or of another shape; values that float16 cannot hold.
    """
    if latents is None or tuple(latents.shape) != shape:
        got = None if latents is None else tuple(latents.shape)
        raise ValueError(f"latents to be kept must be {shape}, got {got}")
    halved = latents.detach().cpu().half()
    if not bool(halved.isfinite().all()):
        raise ValueError(
            f"latents reach {float(latents.abs().max()):.3g}, which float16 cannot hold: do not "
            "keep them"
        )
    return halved


def _write_latents(folder: Path, number: int, latents: Tensor) -> dict[str, object]:
    """The latents of a shard beside it, and what is noted of their file."""
    name = f"latents/{number:05d}.npy"
    with replacing(folder / name) as partial, partial.open("wb") as file:
        np.save(file, latents.numpy())
    return file_record(folder, name)


def _has_latents(folder: Path, record: Mapping[str, object]) -> bool:
    """Whether the latents that a done shard noted are there, with the size that was noted."""
    noted = record.get("latents")
    if not isinstance(noted, Mapping):
        return False
    path = folder / str(noted["file"])
    return path.is_file() and path.stat().st_size == noted["bytes"]


def _delete_shards(folder: Path, keep: bool) -> None:
    if not keep:
        shutil.rmtree(folder / "shards", ignore_errors=True)


@dataclass(frozen=True)
class SampleSet:
    """Pictures of a set, mapped from its file.

    Attributes:
        path: the .npz.
        pictures: (n, H, W, C) uint8, C = 1 or 3, mapped read-only; the id is the row.
        labels: (n,) int64; None where there are none.
        protocol: how they came about; None for a file that does not say it.
        origin: which weights, as plain values, with "step" where it is known; empty for such a
            file.
    """

    path: Path
    pictures: np.ndarray
    labels: np.ndarray | None
    protocol: Protocol | None
    origin: Mapping[str, object]

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, size: int) -> Iterator[Tensor]:
        """(at most `size`, C, H, W) uint8 in the order of the ids, copied out of the file."""
        for start in range(0, len(self), size):
            rows = torch.from_numpy(np.array(self.pictures[start : start + size]))
            yield rows.movedim(-1, 1)


def read_set(path: str | os.PathLike[str]) -> SampleSet:
    """A set of samples by its folder, or a .npz with `arr_0` of anyone's.

    A .npz beside the folder of a set made here has the set's protocol and labels.

    Raises:
        ValueError: nothing is there, it is not finished, or holds something else than pictures.
    """
    found = existing_path(path, "the set of samples")
    folder = found if found.is_dir() else found.with_suffix("")
    if found.is_dir() and not (folder / SET).is_file():
        far = how_far(folder)
        how = f"{far[0]} of {far[1]} shards are done; run its command once more" if far else ""
        raise ValueError(
            f"{folder} holds no finished set of samples ({how or f'no {SET}'}), of "
            "`mixflow-fast sample --out FOLDER`"
        )
    ours = (folder / SET).is_file() and (found.is_dir() or found == npz_of(folder))
    if not ours:
        return SampleSet(found, _pictures(found), None, None, {})
    finish_renaming(folder)
    content = read_set_json(folder / SET)
    # Beside the folder, whatever the file of a stranger says.
    npz = folder.parent / Path(str(content["npz"]["path"])).name
    labels = np.load(labels_of(folder), allow_pickle=False) if "labels" in content else None
    step = {"step": content["step"]} if "step" in content else {}
    origin = {**content["origin"], **step}
    return SampleSet(npz, _pictures(npz), labels, Protocol(content["protocol"]), origin)


def _pictures(path: Path) -> np.ndarray:
    pictures = map_npz(path)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] not in (1, 3):
        raise ValueError(
            f"{path} must hold pictures, arr_0 of uint8 (n, H, W, 1 or 3), got {pictures.dtype} "
            f"{pictures.shape}"
        )
    return pictures
