"""LightningDiT's latents: shards of safetensors with samples of the posterior of both mirrors.

    latents_rank{rr}_shard{sss}.safetensors   latents, latents_flip [n, C, h, w]; labels int64 [n]
    latents_stats.pt                          {"mean", "std"} of [1, C, 1, 1]

They are not normalised; training does it, (z - mean) / std * multiplier. Which image a row is of,
no file says: rank r of the extraction holds the images r, r + W, ..., and its sampler repeats up to
W - 1 images so that all ranks have as many.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.imports.foreign_latents import Place
from mixflow_fast.data.latents_store import LatentsInfo, Normalisation

STATISTICS = "latents_stats.pt"
_NAME = re.compile(r"latents_rank(\d+)_shard(\d+)\.safetensors")
_DTYPES = {"F32": "float32", "F16": "float16"}


@dataclass(frozen=True)
class _File:
    """A shard.

    Attributes:
        path: of the file.
        samples: rows of each tensor.
        shape: (C, h, w).
        dtype: "float32" or "float16".
        offsets: the byte at which `latents` lies, and `latents_flip` where it is there.
        labels: the byte at which they lie.
    """

    path: Path
    samples: int
    shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    labels: int


def is_lightningdit(root: Path) -> bool:
    """Whether a folder holds such shards."""
    return root.is_dir() and any(_NAME.fullmatch(path.name) for path in root.iterdir())


class LightningDiTLatents:
    """As `ForeignLatents`.

    Args:
        root: the folder.
        multiplier: of the normalised latents (`latent_multiplier` of LightningDiT's configuration).
        scale: in place of the normalisation by the folder's statistics; None: normalise.

    Raises:
        ValueError: damaged files, tensors of other names or shapes, no statistics.
    """

    def __init__(self, root: Path, multiplier: float = 1.0, scale: float | None = None) -> None:
        paths = sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))
        self._files = [_open(path) for path in paths]
        first = self._files[0]
        for file in self._files:
            alike = (file.shape, file.dtype, len(file.offsets))
            if alike != (first.shape, first.dtype, len(first.offsets)):
                raise ValueError(
                    f"{str(file.path)!r} must have the tensors of the first shard, "
                    f"{first.shape} {first.dtype}, got {file.shape} {file.dtype}"
                )
        self._starts = np.cumsum([0, *(file.samples for file in self._files)])
        self.labels = np.concatenate([_labels(file) for file in self._files])
        # -1 pairs with no image: the files do not say which one a row is of.
        self.source = np.full(len(self.labels), -1, np.int64)
        if self.labels.min() < 0:
            raise ValueError(f"labels of {str(root)!r} must be >= 0, got {self.labels.min()}")
        ranks = len({_NAME.fullmatch(path.name)[1] for path in paths})
        self.info = LatentsInfo(
            kind="sample",
            shape=first.shape,
            dtype=first.dtype,
            mirrors=len(first.offsets),
            count=len(self.labels),
            num_classes=int(self.labels.max()) + 1,
            scale=1.0 if scale is None else scale,
            normalisation=_statistics(root, first.shape[0], multiplier) if scale is None else None,
            source={"imported": "LightningDiT's shards", "ranks": ranks},
        )
        self.notes = (
            "rows cannot be paired with images: the files do not say which one each is of",
            *([f"{ranks} ranks extracted: up to {ranks - 1} images may occur twice"] * (ranks > 1)),
        )

    def read(self, samples: range) -> Tensor:
        """As `ForeignLatents.read`."""
        number = int(np.searchsorted(self._starts, samples.start, side="right")) - 1
        parts, place = [], samples.start
        while place < samples.stop:
            file, first = self._files[number], int(self._starts[number])
            stop = min(samples.stop, first + file.samples)
            parts.append(_rows(file, place - first, stop - first))
            place, number = stop, number + 1
        return torch.from_numpy(np.concatenate(parts))

    def name_of(self, sample: int) -> str:
        """As `ForeignLatents.name_of`."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return f"row {sample - self._starts[number]} of {str(self._files[number].path)!r}"

    def places(self) -> list[Place]:
        """As `ForeignLatents.places`."""
        mirrors = self.info.mirrors
        return [Place(file.path, mirrors * file.samples, file.offsets) for file in self._files]


def _open(path: Path) -> _File:
    """Where the tensors of a shard lie."""
    try:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > path.stat().st_size:  # damaged: so much memory may not be there
                raise ValueError(f"a header of {size:,} bytes")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        names = [name for name in ("latents", "latents_flip") if name in header]
        shapes = {tuple(header[name]["shape"]) for name in names}
        dtypes = {header[name]["dtype"] for name in names}
        (shape,), (dtype,) = shapes, dtypes
        offsets = tuple(8 + size + header[name]["data_offsets"][0] for name in names)
        label = header["labels"]
        end = max(entry["data_offsets"][1] for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(
            f"{str(path)!r} must be a safetensors file with latents, latents_flip and labels, got "
            f"{error!r}"
        ) from error
    if names[:1] != ["latents"] or len(shape) != 4 or dtype not in _DTYPES:
        raise ValueError(
            f"latents of {str(path)!r} must be (n, C, h, w) F32 or F16, got {shape} {dtype}"
        )
    if label["dtype"] != "I64" or label["shape"] != [shape[0]]:
        raise ValueError(
            f"labels of {str(path)!r} must be I64 ({shape[0]},), got {label['dtype']} "
            f"{label['shape']}"
        )
    if 8 + size + end > path.stat().st_size:
        raise ValueError(f"{str(path)!r} is cut off: copy it again")
    first_label = 8 + size + label["data_offsets"][0]
    return _File(path, shape[0], shape[1:], _DTYPES[dtype], offsets, first_label)


def _labels(file: _File) -> np.ndarray:
    return np.fromfile(file.path, "<i8", file.samples, offset=file.labels)


def _rows(file: _File, start: int, stop: int) -> np.ndarray:
    """(mirrors * n, C, h, w), sample by sample."""
    dtype = np.dtype(file.dtype)
    values = math.prod(file.shape)
    mirrors = [
        np.fromfile(
            file.path,
            dtype,
            (stop - start) * values,
            offset=offset + start * values * dtype.itemsize,
        ).reshape(-1, *file.shape)
        for offset in file.offsets
    ]
    return np.stack(mirrors, axis=1).reshape(-1, *file.shape)


def _statistics(root: Path, channels: int, multiplier: float) -> Normalisation:
    """Of latents_stats.pt, which nobody can compute again: 10,000 random rows."""
    path = root / STATISTICS
    if not path.is_file():
        raise ValueError(
            f"{str(root)!r} holds no {STATISTICS}, by which LightningDiT normalises: copy it "
            "there, or give --scale X to multiply the latents by X instead"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (found[name].double().flatten().tolist() for name in ("mean", "std"))
    except Exception as error:  # whatever a damaged pickle raises
        raise ValueError(
            f'{str(path)!r} must hold {{"mean", "std"}}, got {type(error).__name__}: {error}'
        ) from error
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise ValueError(
            f"{str(path)!r} must have {channels} means and stds > 0, got {len(mean)} and {len(std)}"
        )
    return Normalisation(tuple(mean), tuple(std), multiplier)
