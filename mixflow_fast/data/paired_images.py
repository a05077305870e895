"""The images of precomputed latents, for a teacher that looks at pixels while the model does not.

REPA's preprocessing writes images/00000/img00000012.png beside vae-sd/00000/img-mean-std-00000012
.npy. A latent and its image are paired by this number, never by their order in two lists: one file
that is missing in one of them would shift all that follow.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.decoding import decode_rgb
from mixflow_fast.data.npy_files import check_listed, load_npy, open_npz, read_dataset_json
from mixflow_fast.data.prepared_images import PreparedImages
from mixflow_fast.data.set_files import how_far, set_format
from mixflow_fast.data.summary import sample_rows
from mixflow_fast.files import existing_path

if TYPE_CHECKING:
    import numpy as np


def numbered(names: Iterable[str], where: str) -> dict[int, str]:
    """{number: name}; the number of a file is the last group of digits in its name.

    Raises:
        ValueError: a name without digits, or two names with one number.
    """
    found: dict[int, str] = {}
    for name in names:
        digits = re.findall(r"\d+", Path(name).stem)
        if not digits:
            raise ValueError(
                f"{where} lists {name!r}, whose name has no number: latents and images are paired "
                "by it (img-mean-std-00000012.npy, img00000012.png)"
            )
        number = int(digits[-1])
        if found.setdefault(number, name) != name:
            raise ValueError(
                f"{where} lists two files with the number {number}: {found[number]!r} and {name!r}"
            )
    return found


class PairedImages:
    """One square RGB image per latent.

    * a prepared set (`PreparedImages`): the image with the latent's number in the set's source, or,
      of latents in one array, the image with the row's number as its id.
    * a folder with REPA's `dataset.json` ({"labels": [[file, label], ...]}): the image with the
      latent's number. Images without a latent are never read.
    * `set.npy` (memory-mapped) or `set.npz` (its array `images`, or its only one; held in memory),
      uint8 (N, 3, H, H) or (N, H, H, 3): row n is the image of latent number n.

    Files become RGB by the rule of `data/decoding.py`, that of training images.

    Args:
        path: one of the layouts above; `~` is expanded.
        numbers: the latents' numbers, in their order: digits of the file names, or row numbers.
        labels: (N,) the latents' classes; one that `dataset.json` gives otherwise shows that the
            images are of another set.
        rows: the latents are one array, of which row n is number n: an array or a prepared set of
            images must then have as many.

    Raises:
        ValueError: a latent without an image, another label, shape or dtype; in `get`, an image
            that cannot be read or has another size than the first.
    """

    def __init__(
        self, path: str | os.PathLike[str], numbers: list[int], labels: Tensor, rows: bool
    ) -> None:
        root = existing_path(path, "images")
        if not (root / "dataset.json").exists() and (root / "images/dataset.json").is_file():
            root = root / "images"  # the folder that holds REPA's
        self._name, self._root = str(path), root
        self._files: list[str] = []
        self._array: np.ndarray | None = None
        self._prepared: PreparedImages | None = None
        if root.is_dir() and (set_format(root) or how_far(root)):
            self._prepared = PreparedImages(root, flip=False)
            self._ids = _pair_prepared(self._prepared, root, numbers, labels, rows)
            self.size = self._prepared.size
        elif (root / "dataset.json").is_file():
            self._files = _pair_files(root, numbers, labels)
            self.size = _decode(self._files[0]).shape[0]  # the others are checked when read
        elif root.suffix in (".npy", ".npz") and root.is_file():
            self._array, self._last = _open_array(root)
            count, self._numbers = len(self._array), numbers
            if rows and count != len(numbers):
                raise ValueError(
                    f"images of {self._name!r} must have one row per latent, {len(numbers)}, got "
                    f"{count}"
                )
            if max(numbers) >= count:
                raise ValueError(
                    f"the latent with the number {max(numbers)} has no image: {self._name!r} has "
                    f"the rows 0 to {count - 1}"
                )
            self.size = self._array.shape[2]
        else:
            raise ValueError(
                "images must be a prepared set, a folder with dataset.json, a .npy or a .npz of "
                f"uint8, got {self._name!r}"
            )

    def get(self, rows: list[int]) -> Tensor:
        """(B, 3, H, H) uint8 images of the latents at `rows`."""
        import numpy as np

        if self._prepared is not None:
            return self._prepared.pixels(self._ids[rows])
        if self._array is not None:
            picked = torch.from_numpy(np.array(self._array[[self._numbers[row] for row in rows]]))
            return picked.permute(0, 3, 1, 2).contiguous() if self._last else picked
        out = torch.empty(len(rows), self.size, self.size, 3, dtype=torch.uint8)
        for place, row in enumerate(rows):
            image = _decode(self._files[row])
            if image.shape != out.shape[1:]:
                raise ValueError(
                    f"{self._files[row]!r} must be {self.size} x {self.size} pixels like the first "
                    f"image, got {image.shape[1]} x {image.shape[0]}"
                )
            out[place] = image
        return out.permute(0, 3, 1, 2).contiguous()

    def identity(self, most: int) -> list[bytes]:
        """What tells these images from others, for a fingerprint.

        Args:
            most: rows of an array that are looked into.
        """
        if self._prepared is not None:
            return [self._prepared.manifest_sha256.encode()]
        if self._array is None:
            start = len(os.path.join(self._root, ""))  # of the names that `_pair_files` gave
            return [b"\0".join(os.fsencode(file[start:]) for file in self._files)]
        rows = sample_rows(len(self._array), most)
        return [repr(self._array.shape).encode(), self._array[rows].tobytes()]


def _pair_prepared(
    images: PreparedImages, root: Path, numbers: list[int], labels: Tensor, rows: bool
) -> Tensor:
    """(N,) int64 the id of each latent's image."""
    wanted = torch.tensor(numbers, dtype=torch.int64)
    if rows:
        if len(images) != len(wanted):
            raise ValueError(
                f"images of {str(root)!r} must be one per latent, {len(wanted)}, got {len(images)}"
            )
        ids = wanted
    else:
        source = torch.from_numpy(images.source.copy())
        ids = torch.searchsorted(source, wanted).clamp(max=len(source) - 1)
        missing = wanted[source[ids] != wanted]
        if len(missing):
            raise ValueError(
                f"{len(missing)} of {len(wanted)} latents have no image in {str(root)!r}, the "
                f"first is number {int(missing[0])}: latents and images must come from one data set"
            )
    other = (images.labels(ids) != labels).nonzero()[:, 0]
    if len(other):
        row = int(other[0])
        raise ValueError(
            f"{images.name_of(int(ids[row]))} has the label {int(images.labels(ids)[row])}, its "
            f"latent has {int(labels[row])}: latents and images must come from one data set"
        )
    return ids


def _pair_files(root: Path, numbers: list[int], labels: Tensor) -> list[str]:
    """The image file of each latent."""
    listed = read_dataset_json(root)
    index = str(root / "dataset.json")
    by_number = numbered(listed, index)
    missing = [number for number in numbers if number not in by_number]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(numbers)} latents have no image in {index!r}, the first is "
            f"number {missing[0]}: latents and images must come from one data set"
        )
    files = []
    for number, label in zip(numbers, labels.tolist(), strict=True):
        name = by_number[number]
        if listed[name] != label:
            raise ValueError(
                f"{index!r} gives {name!r} the label {listed[name]!r}, its latent has {label}: "
                "latents and images must come from one data set"
            )
        files.append(name)
    check_listed(root, files)
    return [os.path.join(root, name) for name in files]


def _open_array(path: Path) -> tuple[np.ndarray, bool]:
    """(N, 3, H, H) or (N, H, H, 3) uint8, and whether the channels are last."""
    if path.suffix == ".npy":
        array = load_npy(path)
    else:
        with open_npz(path) as archive:
            names = archive.files
            if "images" not in names and len(names) != 1:
                raise ValueError(
                    f"{str(path)!r} must hold the array images, got only {', '.join(names)}"
                )
            array = archive["images" if "images" in names else names[0]]
    shape = array.shape
    first, last = shape[1:2] == (3,), shape[3:] == (3,)
    square = len(shape) == 4 and (shape[2] == shape[3] if first else shape[1] == shape[2])
    if not square or not (first or last) or array.dtype.name != "uint8" or not shape[0]:
        raise ValueError(
            f"images of {str(path)!r} must be uint8 (N, 3, H, H) or (N, H, H, 3) with N >= 1, got "
            f"{array.dtype} {shape}"
        )
    return array, not first


def _decode(file: str) -> Tensor:
    """(H, H, 3) uint8."""
    import numpy as np

    pixels = torch.from_numpy(np.array(decode_rgb(file)))
    if pixels.shape[0] != pixels.shape[1]:
        raise ValueError(
            f"{file!r} must be square, as it was cropped for its latent, got {pixels.shape[1]} x "
            f"{pixels.shape[0]} pixels"
        )
    return pixels
