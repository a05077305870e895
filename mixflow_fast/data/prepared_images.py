"""Sets that `mixflow-fast data prepare` has made (`mixflow-images/1`), as training data.

Their images are the training crops themselves: reading is decoding at most, and no resize.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, random_flip
from mixflow_fast.data.decoding import read_rgb
from mixflow_fast.data.npy_files import HEADER_BYTES, load_npy
from mixflow_fast.data.set_files import check_sizes, read_manifest, set_format
from mixflow_fast.data.shard_files import Names, ShardFiles
from mixflow_fast.data.summary import DataSummary, digest_of
from mixflow_fast.files import existing_path

if TYPE_CHECKING:
    import numpy as np

IMAGES_FORMAT = "mixflow-images/1"
_SHARD, _OFFSET, _BYTES, _LABEL = range(4)  # columns of index.npy


class PreparedImages:
    """The images of a prepared set, by id.

    Args:
        path: folder of the set; `~` is expanded.
        size: what the images must measure in pixels; None: whatever the set has.
        flip: mirrors left-right with probability 1/2, a function of (seed, position).

    Attributes:
        classes: names of the classes, in the order of the labels.
        files: what each image was made of, relative to its source's folder.
        source: (N,) int64 number of each image in its source's list: what latents and features
            of the same images are paired by, whatever each set has left out.
        exact: the stored pixels are those of the crop; False for JPEG.
        preprocessing: how the pixels were made.
        skipped: images of the source that are not in the set.
        manifest_sha256: the manifest's checksum, which stands for the whole content.
        size, flip, encoded, crops: as `ImageDataset`.

    Raises:
        ValueError: no set, an incomplete one, one of another format or size, a file that is
            missing or has another size; in `get`, an image that cannot be decoded (with its name).
    """

    def __init__(
        self, path: str | os.PathLike[str], size: int | None = None, flip: bool = True
    ) -> None:
        root = existing_path(path)
        manifest = _read(root)
        check_sizes(root, manifest)
        self.size = int(str(manifest["size"]))
        if size is not None and size != self.size:
            raise ValueError(
                f"{root} was prepared at {self.size} pixels, asked for are {size}: prepare the "
                f"images at {size} (`mixflow-fast data prepare IMAGES --size {size} --out DIR`), "
                f"or train at {self.size}"
            )
        self.num_classes = int(str(manifest["num_classes"]))
        self.classes = [str(name) for name in _list(manifest, "class_names")]
        shards = _list(manifest, "shards")
        self._index = _checked_index(root, manifest, shards, self.num_classes)
        self.source = load_npy(root / "source.npy")
        self._y = torch.from_numpy(self._index[:, _LABEL].copy())
        paths = [root / str(shard["file"]) for shard in shards]
        self._shards = ShardFiles(paths)
        self.encoded, self.crops = manifest["image_format"] != "raw", False
        self._maps = None if self.encoded else _Maps(paths, self.size)
        self.files = Names(root / "names.txt", len(self._y))
        self.exact = bool(manifest["exact"])
        self.preprocessing = str(manifest["preprocessing"])
        self.skipped = int(str(manifest["skipped"]))
        self.manifest_sha256 = str(manifest["checksum"])
        self._image_format = str(manifest["image_format"])
        self._root, self.flip = root, flip
        self.shape = (3, self.size, self.size)
        self.name = f"images-{root.resolve().name}-{self.size}"

    def __len__(self) -> int:
        return len(self._y)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: images (B, 3, size, size), and no x."""
        check_indices(indices, positions, len(self))
        images = self.pixels(indices)
        if self.flip:
            images = random_flip(images, positions, seed)
        return Batch(None, self._y[indices], positions, images=images)

    def pixels(self, indices: Tensor) -> Tensor:
        """(B, 3, size, size) uint8, as they are stored."""
        rows = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            if self._maps is not None:
                shard, offset = self._index[index, :2].tolist()
                rows[row] = torch.from_numpy(self._maps.row(shard, offset))
            else:
                rows[row] = self._decode(index)
        return rows.permute(0, 3, 1, 2).contiguous()

    def labels(self, indices: Tensor) -> Tensor:
        """As `ImageDataset.labels`."""
        return self._y[indices]

    def payload(self, index: int) -> bytes:
        """As `ImageDataset.payload`."""
        if not self.encoded:
            raise ValueError(f"{self._root} holds raw pixels, and no encoded images")
        shard, offset, count = self._index[index, :3].tolist()
        return self._shards.read(shard, offset, count)

    def name_of(self, index: int) -> str:
        """As `ImageDataset.name_of`: where the image is stored, and what it was made of."""
        shard = int(self._index[index, _SHARD])
        return f"image {index} ({self.files[index]}) in shard {shard:05d} of {self._root}"

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of the manifest, and so of every file's SHA-256."""
        notes = [f"prepared as {self._image_format}, {self.preprocessing}"]
        if self.skipped:
            notes.append(f"{self.skipped:,} images of the source were left out (skipped.jsonl)")
        if not self.exact:
            notes.append("JPEG: the pixels are not exactly those of the crop")
        return DataSummary(
            unit="images",
            examples=len(self),
            classes=self.num_classes,
            shape=self.shape,
            digest=digest_of([self.manifest_sha256.encode()]),
            class_names=tuple(self.classes),
            notes=tuple(notes),
        )

    def _decode(self, index: int) -> Tensor:
        """(size, size, 3) uint8."""
        import numpy as np

        content = self.payload(index)
        try:
            pixels = np.array(read_rgb(io.BytesIO(content)))
            if pixels.shape != (self.size, self.size, 3):
                height, width = pixels.shape[:2]
                raise ValueError(f"it has {width} x {height} pixels, expected {self.size}")
        except ValueError as error:
            raise ValueError(
                f"cannot read {self.name_of(index)}: {error}. "
                f"`mixflow-fast data verify {self._root}` tells what is damaged"
            ) from error
        return torch.from_numpy(pixels)


class _Maps:
    """Shards of raw pixels, mapped when they are first read.

    Args:
        paths: of the .npy files.
        size: side of the images.
    """

    def __init__(self, paths: list[Path], size: int) -> None:
        self._paths, self._shape = paths, (size, size, 3)
        self._maps: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def row(self, shard: int, offset: int) -> np.ndarray:
        """(S, S, 3) uint8, the image that begins at a place in the file."""
        import numpy as np

        with self._lock:
            if shard not in self._maps:
                # Copy on write: a tensor of what is mapped for reading only would warn.
                mapped = np.memmap(self._paths[shard], np.uint8, mode="c", offset=HEADER_BYTES)
                self._maps[shard] = mapped.reshape(-1, *self._shape)
            found = self._maps[shard]
        return found[(offset - HEADER_BYTES) // found[0].nbytes]


def _read(root: Path) -> dict[str, object]:
    try:
        return read_manifest(root, IMAGES_FORMAT)
    except ValueError as error:
        hint = ""
        found = set_format(root) if root.is_dir() else None
        if found is None:
            hint = (
                ". Class folders of images are read with data.kind=folder, and made into such a "
                "set by `mixflow-fast data prepare`"
            )
        elif found.startswith("mixflow-latents/"):
            hint = ". Latents are read with data.kind=latents"
        raise ValueError(f"{error}{hint}") from error


def _checked_index(
    root: Path, manifest: dict[str, object], shards: list[dict[str, object]], classes: int
) -> np.ndarray:
    """(N, 4) int64; ValueError where it points outside of the shards or the classes."""
    import numpy as np

    index = np.array(load_npy(root / "index.npy"))
    count = manifest["count"]
    if index.dtype != np.int64 or index.shape != (count, 4):
        raise ValueError(
            f"{root / 'index.npy'} must be int64 ({count}, 4), got {index.dtype} {index.shape}"
        )
    sizes = np.array([shard["bytes"] for shard in shards], np.int64)
    ends = index[:, _OFFSET] + index[:, _BYTES]
    inside = (index >= 0).all() and (index[:, _SHARD] < len(sizes)).all()
    if not inside or (ends > sizes[index[:, _SHARD]]).any():
        raise ValueError(f"{root / 'index.npy'} points outside of the shards: it is damaged")
    if (index[:, _LABEL] >= classes).any():
        raise ValueError(
            f"{root / 'index.npy'} has the label {index[:, _LABEL].max()}, expected labels below "
            f"the {classes} classes of the manifest"
        )
    return index


def _list(manifest: dict[str, object], key: str) -> list[dict[str, object]]:
    found = manifest.get(key)
    if not isinstance(found, list):
        raise ValueError(f"the manifest must hold a list {key!r}, got {found!r:.80}")
    return found
