"""Sets of latents on the disk, format `mixflow-latents/1`: what their manifest says, and reading.

    manifest.json           written last: a folder without one is not complete
    moments/00000.npy ...   float16 (rows, 8, h, w), channels mean | std; data begin at byte 4096
    labels.npy              int32 (N,)
    source.npy              int64 (N,): the sample's number in the list that all was made from

Sample i has the rows `mirrors * i + m`; m = 1 is the encoding of the mirrored image, because a
mirrored latent is not that. Latents are stored as the encoder gives them, without `scale`.

Rows may also lie in files of another program, where they are (`Shard.offsets`). Files are mapped by
hand and not as numpy.memmap, for the advice that a mapping takes: without MADV_RANDOM each cold row
reads 128 KiB around itself, and without MADV_WILLNEED the next one waits for it.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from mixflow_fast import __version__
from mixflow_fast.data.npy_files import load_npy
from mixflow_fast.data.set_files import MANIFEST, check_sizes, read_manifest
from mixflow_fast.data.summary import sample_rows
from mixflow_fast.files import check_inside

if TYPE_CHECKING:
    import numpy as np

FORMAT = "mixflow-latents/1"
LABELS, SOURCE = "labels.npy", "source.npy"
Kind = Literal["moments", "sample", "features"]
_DTYPES = ("float16", "float32")
_LOOKED_INTO = 32  # rows that are read when a set is opened


@dataclass(frozen=True)
class Shard:
    """A file with rows of consecutive samples.

    Attributes:
        file: relative to the folder of the manifest; another program's may be a link there.
        rows: mirrors * samples.
        bytes, sha256: of the whole file.
        offsets: None for a .npy of this format. Of another program's file: the byte at which the
            first row of each mirror lies, the others behind it without gaps (a tensor of a
            safetensors file per mirror); or the name of an int64 .npy (rows,) with the byte of
            every row (members of a zip that are stored without compression).
    """

    file: str
    rows: int
    bytes: int
    sha256: str
    offsets: tuple[int, ...] | str | None = None

    def to_record(self) -> dict[str, object]:
        """As it stands in the manifest."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> Shard:
        """Of an entry of the manifest; KeyError and TypeError for one that is none."""
        offsets = record.get("offsets")
        offsets = tuple(map(int, offsets)) if isinstance(offsets, list) else offsets
        return cls(record["file"], record["rows"], record["bytes"], record["sha256"], offsets)


@dataclass(frozen=True)
class Normalisation:
    """z' = (z - mean) / std * multiplier, what a set of samples is trained with.

    Attributes:
        mean, std: a number per channel.
        multiplier: of all channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiplier: float = 1.0


@dataclass(frozen=True, kw_only=True)
class LatentsInfo:
    """What the manifest of a set of latents says.

    Attributes:
        kind: moments (channels mean | std), sample (one of the posterior) or features (T, z).
        shape: of a stored row: (C, h, w), with both halves of moments; (T, z) of features.
        dtype: of the stored rows, float16 or float32.
        mirrors: rows of a sample: 1, or 2 with the mirrored image's.
        count: samples N.
        num_classes: labels lie in [0, num_classes).
        scale: what the latents are to be multiplied by, 0.18215 for Stable Diffusion's VAE.
        normalisation: in place of `scale`, per channel; None for most.
        size: side of the images in pixels; None if unknown.
        encoder: class, library and hashes of the encoder.
        precision: dtype, tf32, device and batch size of the encoding.
        input_range: of the pixels that the encoder saw.
        preprocessing: how the images were cropped.
        source: what was encoded.
        classes: SHA-256 of the class names; "" if they are not known.
        statistics: {"mean": [...], "std": [...]} of the stored rows, a number per channel.
        shards: the files, in the order of the samples.
    """

    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    mirrors: int
    count: int
    num_classes: int
    scale: float = 1.0
    normalisation: Normalisation | None = None
    size: int | None = None
    encoder: Mapping[str, object] = field(default_factory=dict)
    precision: Mapping[str, object] = field(default_factory=dict)
    input_range: tuple[float, float] = (-1.0, 1.0)
    preprocessing: str = ""
    source: Mapping[str, object] = field(default_factory=dict)
    classes: str = ""
    statistics: Mapping[str, Sequence[float]] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    def to_record(self) -> dict[str, object]:
        """The manifest but for its `files`."""
        record = asdict(self) | {"shards": [shard.to_record() for shard in self.shards]}
        return {"format": FORMAT, "version": __version__} | record

    @classmethod
    def read(cls, root: Path) -> LatentsInfo:
        """Of a folder.

        Raises:
            ValueError: no manifest, one of another format, or one that does not describe a set.
        """
        record = read_manifest(root, FORMAT)
        names = cls.__dataclass_fields__
        try:
            known = {name: record[name] for name in names if name in record}
            known["shape"] = tuple(map(int, known["shape"]))
            known["shards"] = tuple(map(Shard.from_record, known["shards"]))
            if known.get("normalisation") is not None:
                n = known["normalisation"]
                known["normalisation"] = Normalisation(
                    tuple(map(float, n["mean"])), tuple(map(float, n["std"])), n["multiplier"]
                )
            info = cls(**known)
            info.check()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(root / 'manifest.json')!r} does not describe a set of latents ({error}): "
                "make the set again"
            ) from error
        return info

    def check(self) -> None:
        """ValueError for values that contradict each other."""
        moments_of_half = self.kind == "moments" and self.shape[0] % 2
        if self.kind not in get_args(Kind) or self.dtype not in _DTYPES or moments_of_half:
            raise ValueError(f"kind {self.kind!r}, dtype {self.dtype!r}, shape {self.shape}")
        if len(self.shape) != (2 if self.kind == "features" else 3) or min(self.shape) < 1:
            raise ValueError(f"kind {self.kind!r} with rows of shape {self.shape}")
        rows = [shard.rows for shard in self.shards]
        if self.mirrors not in (1, 2) or any(count % self.mirrors for count in rows):
            raise ValueError(f"{self.mirrors} mirrors, shards of {rows[:3]} rows")
        if sum(rows) != self.count * self.mirrors or self.count < 1:
            raise ValueError(f"{self.count} samples of {self.mirrors} rows, {sum(rows)} rows")


class LatentsStore:
    """A set of latents, mapped and read row by row; safe to read from several threads.

    Args:
        root: folder of the manifest.

    Attributes:
        info: what the manifest says.
        labels: (N,) int64 classes.
        source: (N,) int64 numbers of the samples in the list that they were made from.
        shape: (rows, ...), as of one array of all.
        dtype: of the rows that `fill` and `take` give.

    Raises:
        ValueError: files that are missing, cut off, or other than the manifest says; labels out of
            range; among 32 rows over the whole set, one that is not finite or has a negative std.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.info = root, LatentsInfo.read(root)
        check_sizes(root, read_manifest(root, FORMAT))
        info = self.info
        tables = (shard.offsets for shard in info.shards if isinstance(shard.offsets, str))
        check_inside(tables, root / MANIFEST)
        self.shape = (info.count * info.mirrors, *info.shape)
        self.dtype: torch.dtype = getattr(torch, info.dtype)
        self.labels = self._per_sample(LABELS)
        self.source = self._per_sample(SOURCE)
        low, high = map(int, self.labels.aminmax())
        if low < 0 or high >= info.num_classes:
            raise ValueError(
                f"labels of {str(root)!r} must lie in [0, {info.num_classes}), as its manifest "
                f"says, got {low} to {high}"
            )
        self._map_shards()
        self.check_rows(sample_rows(self.shape[0], _LOOKED_INTO))

    def _per_sample(self, name: str) -> Tensor:
        import numpy as np

        array = load_npy(self.root / name)
        if array.shape != (self.info.count,) or array.dtype.kind != "i":
            raise ValueError(
                f"{str(self.root / name)!r} must be ({self.info.count},) integers, got "
                f"{array.shape} {array.dtype}"
            )
        return torch.from_numpy(np.array(array, dtype=np.int64))

    def _map_shards(self) -> None:
        """Maps every shard, and notes where the rows begin."""
        import numpy as np

        info = self.info
        self._numpy_dtype = np.dtype(info.dtype)
        self._row_bytes = int(np.prod(info.shape)) * self._numpy_dtype.itemsize
        samples = [shard.rows // info.mirrors for shard in info.shards]
        self._starts = np.cumsum([0, *samples[:-1]])  # first sample of each shard
        first = np.zeros((len(samples), info.mirrors), np.int64)
        stride = np.zeros(len(samples), np.int64)
        self._maps: list[mmap.mmap] = []
        self._tables: dict[int, np.ndarray] = {}  # of shards whose rows lie anywhere
        for number, shard in enumerate(info.shards):
            file = self.root / shard.file
            mirror = np.arange(info.mirrors)
            if shard.offsets is None:
                offset = self._read_header(file, shard.rows)
                first[number] = offset + mirror * self._row_bytes
                stride[number] = info.mirrors * self._row_bytes
                end = offset + shard.rows * self._row_bytes
            elif isinstance(shard.offsets, str):
                table = np.array(load_npy(self.root / shard.offsets), dtype=np.int64)
                if table.shape != (shard.rows,) or table.min() < 0:
                    raise ValueError(
                        f"{str(self.root / shard.offsets)!r} must be ({shard.rows},) numbers of "
                        f"bytes, got {table.shape}"
                    )
                self._tables[number] = table
                end = int(table.max()) + self._row_bytes
            else:
                if len(shard.offsets) != info.mirrors or min(shard.offsets) < 0:
                    raise ValueError(
                        f"the manifest of {str(self.root)!r} must give {info.mirrors} offsets for "
                        f"{shard.file!r}, one per mirror, got {shard.offsets}"
                    )
                first[number], stride[number] = shard.offsets, self._row_bytes
                end = max(shard.offsets) + samples[number] * self._row_bytes
            if end > file.stat().st_size:
                # Reading behind the end of a mapped file kills the process.
                raise ValueError(
                    f"{str(file)!r} must have at least {end:,} bytes for its {shard.rows} rows, "
                    f"got {file.stat().st_size:,}: copy it again"
                )
            with open(file, "rb") as opened:
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            mapped.madvise(mmap.MADV_RANDOM)
            self._maps.append(mapped)
        self._first, self._stride = first, stride

    def _read_header(self, file: Path, rows: int) -> int:
        """The byte at which the data of a .npy begin; ValueError unless it is as it should be."""
        array = load_npy(file)
        shape = (rows, *self.info.shape)
        if array.shape != shape or array.dtype.name != self.info.dtype:
            raise ValueError(
                f"{str(file)!r} must be {shape} {self.info.dtype}, as the manifest says, got "
                f"{array.shape} {array.dtype}"
            )
        return array.offset

    def check_rows(self, rows: Iterable[int]) -> None:
        """ValueError that names sample and folder if a row is not finite or has a negative std."""
        for row in rows:
            values = self.take(torch.tensor([row]))[0].float()
            where = f"sample {row // self.info.mirrors} of {str(self.root)!r}"
            if not values.isfinite().all():
                raise ValueError(f"{where} holds values that are not finite: encode it again")
            if self.info.kind == "moments" and (values[len(values) // 2 :] < 0).any():
                raise ValueError(
                    f"the std channels of {where} must be >= 0, got one < 0: is it the "
                    "log-variance? Store exp(logvar / 2)"
                )

    def fill(self, out: Tensor, rows: Tensor) -> None:
        """Copy rows into memory that is there, such as a pinned slot of a ring.

        Args:
            out: (B, ...) contiguous, on the CPU, in `dtype`.
            rows: (B,) int64 in [0, mirrors * N).

        Raises:
            ValueError: another shape or dtype of `out`; rows out of range.
        """
        import numpy as np

        expected = (len(rows), *self.info.shape)
        if tuple(out.shape) != expected or out.dtype != self.dtype or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous {expected} {self.dtype}, got {tuple(out.shape)} "
                f"{out.dtype}"
            )
        target = out.numpy()
        # Row by row: of random rows each lies in a shard of its own, and for one row index_select
        # costs more than its copy.
        for place, (shard, start) in enumerate(self._addresses(rows)):
            target[place] = np.ndarray(self.info.shape, self._numpy_dtype, self._maps[shard], start)

    def take(self, rows: Tensor) -> Tensor:
        """(B, ...) copies of rows, as stored; arguments as of `fill`."""
        out = torch.empty(len(rows), *self.info.shape, dtype=self.dtype)
        self.fill(out, rows)
        return out

    def willneed(self, rows: Tensor) -> None:
        """Have the system read rows that will be asked for, without waiting for them."""
        for shard, start in self._addresses(rows):
            page = start % mmap.PAGESIZE
            self._maps[shard].madvise(mmap.MADV_WILLNEED, start - page, self._row_bytes + page)

    def _addresses(self, rows: Tensor) -> Iterable[tuple[int, int]]:
        """(shard, byte) of each row."""
        import numpy as np

        row = rows.numpy()
        if row.ndim != 1 or row.dtype != np.int64:
            raise ValueError(f"rows must be (B,) int64, got {row.shape} {row.dtype}")
        if len(row) and not 0 <= row.min() <= row.max() < self.shape[0]:
            raise ValueError(
                f"rows must lie in [0, {self.shape[0]}), got {row.min()} to {row.max()}"
            )
        sample, mirror = np.divmod(row, self.info.mirrors)
        shard = np.searchsorted(self._starts, sample, side="right") - 1
        local = sample - self._starts[shard]
        start = self._first[shard, mirror] + local * self._stride[shard]
        for number, table in self._tables.items():
            here = shard == number
            start[here] = table[self.info.mirrors * local[here] + mirror[here]]
        return zip(shard.tolist(), start.tolist(), strict=True)

    def identity(self) -> list[bytes]:
        """What tells this set from others, for a fingerprint; not where it lies."""
        record = self.info.to_record()
        record["shards"] = [[shard.rows, shard.sha256] for shard in self.info.shards]
        return [json.dumps(record, sort_keys=True).encode(), self.labels.numpy().tobytes()]
