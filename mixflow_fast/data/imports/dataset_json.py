"""Latents of REPA's and EDM2's preprocessing: one .npy an image, in a folder or a stored zip.

    {idx[:5]}/img-mean-std-{idx}.npy     float32 [8, h, w] = mean | std, unscaled
    dataset.json                         {"labels": [[name, label], ...]} or {"labels": null}

`idx` has 8 digits: the place of the image in the sorted list of full paths. REPA and EDM2 use the
same names and shapes for other content: REPA's VAE saw images in [-1, 1], EDM2's in [0, 1].
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.imports.archive import INDEX, Archive, StoredZip, list_files, read_index
from mixflow_fast.data.imports.foreign_latents import SD_VAE_SCALE, Place
from mixflow_fast.data.latents_store import LatentsInfo
from mixflow_fast.data.paired_images import numbered

_THREADS = 8  # they wait for the disk


class DatasetJsonLatents:
    """As `ForeignLatents`.

    Args:
        archive: the folder or the zip.
        input_range: of the pixels that the VAE saw.
        no_labels: take images without classes, as one class.

    Raises:
        ValueError: no labels; files that are missing or are not (2 C, h, w) float.
    """

    def __init__(
        self, archive: Archive, input_range: tuple[float, float], no_labels: bool = False
    ) -> None:
        where = f"{INDEX} of {str(archive.path)!r}"
        labels = list_files(archive, no_labels, ".npy")
        # By number: the order of two lists, which REPA pairs by, need not be the same.
        by_number = dict(sorted(numbered(labels, where).items()))
        self._archive, self._names = archive, list(by_number.values())
        self.labels = np.array([labels[name] for name in self._names], np.int64)
        self.source = np.array(list(by_number), np.int64)
        first = self._load(self._names[0])
        if first.ndim != 3 or first.shape[0] % 2 or first.dtype.name not in ("float16", "float32"):
            raise ValueError(
                f"{self._names[0]!r} of {str(archive.path)!r} must be (2 C, h, w) float32, mean | "
                f"std, got {first.shape} {first.dtype}"
            )
        self._like = first.shape, first.dtype
        self.info = LatentsInfo(
            kind="moments",
            shape=first.shape,
            dtype=first.dtype.name,
            mirrors=1,
            count=len(self._names),
            num_classes=int(self.labels.max()) + 1,
            scale=SD_VAE_SCALE,
            size=8 * first.shape[1],
            input_range=input_range,
            source={"imported": "dataset.json, one .npy an image"},
        )
        self.notes: tuple[str, ...] = ()

    def read(self, samples: range) -> Tensor:
        """As `ForeignLatents.read`."""
        names = [self._names[sample] for sample in samples]
        if len(names) == 1:
            return torch.from_numpy(self._checked(names[0])[None])
        with ThreadPoolExecutor(_THREADS) as pool:
            return torch.from_numpy(np.stack(list(pool.map(self._checked, names))))

    def name_of(self, sample: int) -> str:
        """As `ForeignLatents.name_of`."""
        return self._names[sample]

    def places(self) -> list[Place]:
        """As `ForeignLatents.places`."""
        if not isinstance(self._archive, StoredZip):
            raise ValueError(
                "--in-place cannot map a file for each sample: leave it out, or train on the "
                f"folder itself (data.path={self._archive.path} data.moments=true)"
            )
        offsets = np.empty(len(self._names), np.int64)
        for place, name in enumerate(self._names):
            self._checked(name)
            offsets[place] = self._archive.offset(name) + _header_bytes(self._archive.read(name))
        return [Place(self._archive.path, len(self._names), offsets)]

    def _checked(self, name: str) -> np.ndarray:
        array = self._load(name)
        if (array.shape, array.dtype) != self._like:
            raise ValueError(
                f"{name!r} of {str(self._archive.path)!r} must be {self._like[0]} {self._like[1]} "
                f"like the first, got {array.shape} {array.dtype}"
            )
        return array

    def _load(self, name: str) -> np.ndarray:
        try:
            array = np.load(io.BytesIO(self._archive.read(name)), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"cannot read {name!r} of {str(self._archive.path)!r}: {error}"
            ) from error
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name!r} of {str(self._archive.path)!r} is no .npy")
        return np.ascontiguousarray(array)


def _header_bytes(content: bytes) -> int:
    """The byte of a .npy at which its values begin; ValueError for an order other than C."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    _, fortran, _ = read(stream)
    if fortran:
        raise ValueError("--in-place needs arrays in C order, got Fortran order: leave it out")
    return stream.tell()


def holds_latents(archive: Archive) -> bool:
    """Whether an archive's dataset.json, or what lies beside it, names .npy files."""
    labels = read_index(archive)
    names = archive.names() if labels is None else list(labels)
    return any(os.path.splitext(name)[1] == ".npy" for name in names)
