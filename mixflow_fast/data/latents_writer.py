"""Writing sets of latents in the format of `data/latents_store.py`.

A set is made shard by shard: `ShardWriter` writes one, `finish_store` the labels and the manifest
when all are there. What is written is a function of the rows alone, so whoever writes it, and after
whatever interruption, writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.latents_store import LABELS, SOURCE, LatentsInfo, Shard
from mixflow_fast.data.npy_files import padded_header
from mixflow_fast.data.preparation.shard_work import named_errors
from mixflow_fast.data.set_files import file_record, write_manifest
from mixflow_fast.files import replacing

if TYPE_CHECKING:
    import numpy as np

SHARD_SAMPLES = 8192  # 256 MiB at 256 pixels with both mirrors, 1 GiB at 512


def to_float16(rows: Tensor, kind: str, name_of: Callable[[int], str]) -> Tensor:
    """Rows as they are stored.

    Args:
        rows: (n, C, h, w) or (n, T, z) floating.
        kind: of the set; the second half of the channels of "moments" is a std.
        name_of: what row i is of, for the error.

    Raises:
        ValueError: values that are not finite or that float16 cannot hold, a negative std.
    """
    stored = rows.to(torch.float16)
    for number in (~stored.isfinite().flatten(1).all(1)).nonzero()[:, 0].tolist():
        values = rows[number]
        if values.isfinite().all():
            raise ValueError(
                f"the latent of {name_of(number)} has a value of {float(values.abs().max()):.4g}, "
                "which float16 cannot hold (65504 at most): is it the right encoder?"
            )
        raise ValueError(
            f"the latent of {name_of(number)} has values that are not finite: look at the image, "
            "and at the encoder's weights"
        )
    if kind == "moments":
        negative = (stored[:, stored.shape[1] // 2 :] < 0).flatten(1).any(1).nonzero()[:, 0]
        if len(negative):
            raise ValueError(
                f"the latent of {name_of(int(negative[0]))} has a negative std: is it the "
                "log-variance? Give exp(logvar / 2)"
            )
    return stored


def classes_digest(names: Sequence[str]) -> str:
    """What stands for the classes in a manifest: SHA-256 of their sorted names, one a line."""
    return hashlib.sha256("".join(f"{name}\n" for name in sorted(names)).encode()).hexdigest()


class ShardWriter:
    """Writes the rows of one shard, in their order. Use it as a context manager.

    Args:
        path: the file; one that an error leaves behind is deleted.
        rows: how many there will be.
        shape: of a row.
        dtype: "float16" or "float32".
    """

    def __init__(self, path: Path, rows: int, shape: Sequence[int], dtype: str = "float16") -> None:
        import numpy as np

        self._path, self._rows, self._shape, self._dtype = path, rows, tuple(shape), dtype
        self._written, self._said = 0, rows
        # A channel is the first of (C, h, w) and the last of (T, z).
        self._axes = (0, 2, 3) if len(self._shape) == 3 else (0, 1)
        channels = self._shape[0] if len(self._shape) == 3 else self._shape[-1]
        self._sums, self._squares = np.zeros(channels), np.zeros(channels)
        with named_errors(path):
            self._file = open(path, "wb")
            self._file.write(padded_header((rows, *self._shape), dtype))

    def write(self, block: Tensor) -> None:
        """Append rows, (n, ...) in the shard's dtype, all finite; ValueError for others."""
        if block.shape[1:] != self._shape or block.dtype != getattr(torch, self._dtype):
            raise ValueError(
                f"rows must be (n, *{self._shape}) {self._dtype}, got {tuple(block.shape)} "
                f"{block.dtype}"
            )
        array = block.contiguous().numpy()
        values = array.astype("float64")  # numpy's sums do not depend on the number of threads
        squares = (values * values).sum(self._axes)
        if not bool((squares < math.inf).all()):
            raise ValueError(f"rows of {self._path} hold values that are not finite")
        with named_errors(self._path):
            self._file.write(memoryview(array).cast("B"))
        self._written += len(array)
        self._sums += values.sum(self._axes)
        self._squares += squares

    def leave_out(self, rows: int) -> None:
        """So many fewer rows will come than were said."""
        self._rows -= rows

    def statistics(self) -> dict[str, list[float]]:
        """Sums of the rows and of their squares, per channel: what `finish_store` adds up."""
        return {"sums": self._sums.tolist(), "squares": self._squares.tolist()}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            with named_errors(self._path):
                if self._rows != self._said and kind is None:
                    self._file.seek(0)
                    self._file.write(padded_header((self._rows, *self._shape), self._dtype))
                self._file.close()
            if kind is None and self._written != self._rows:
                raise ValueError(f"{self._path} needs {self._rows} rows, got {self._written}")
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise
        if kind is not None:
            self._path.unlink(missing_ok=True)


def finish_store(
    root: Path,
    info: LatentsInfo,
    records: Sequence[Mapping[str, object]],
    labels: np.ndarray,
    source: np.ndarray,
) -> None:
    """Write labels, numbers and manifest of a set whose shards are all there.

    Args:
        root: folder of the set.
        info: what the manifest is to say but for shards and statistics.
        records: of the shards in their order: file, rows, bytes, sha256, maybe offsets, and
            `statistics` as `ShardWriter.statistics` gives them, where all have them.
        labels: (N,) integers.
        source: (N,) integers: numbers of the samples in the list that they were made from.

    Raises:
        ValueError: counts that do not fit each other.
    """
    shards = tuple(map(Shard.from_record, records))
    statistics = _add_up(records, info.shape) if all("statistics" in r for r in records) else {}
    info = dataclasses.replace(info, shards=shards, statistics=statistics or info.statistics)
    info.check()
    for array in (labels, source):
        if array.shape != (info.count,):
            raise ValueError(f"labels and source must be ({info.count},), got {array.shape}")
    files = [_write_npy(root, LABELS, labels, "int32"), _write_npy(root, SOURCE, source, "int64")]
    for name in sorted({s.offsets for s in shards if isinstance(s.offsets, str)}):
        files.append(file_record(root, name))
    write_manifest(root, info.to_record() | {"files": files})


def _write_npy(root: Path, name: str, array: np.ndarray, dtype: str) -> dict[str, object]:
    import numpy as np

    with replacing(root / name) as partial, open(partial, "wb") as file:
        np.save(file, array.astype(dtype))
    return file_record(root, name)


def _add_up(
    records: Sequence[Mapping[str, object]], shape: Sequence[int]
) -> dict[str, list[float]]:
    """Mean and std of each channel over all shards."""
    import numpy as np

    of_channel = math.prod(shape[1:] if len(shape) == 3 else shape[:1])
    count = of_channel * sum(record["rows"] for record in records)
    sums = np.sum([record["statistics"]["sums"] for record in records], axis=0)
    squares = np.sum([record["statistics"]["squares"] for record in records], axis=0)
    mean = sums / count
    std = np.sqrt(np.maximum(squares / count - mean * mean, 0))
    return {"mean": mean.tolist(), "std": std.tolist()}
