"""Images in .tar shards as webdataset stores them, read at random through an index.

The headers of the archives are walked once; the index is kept beside them where that is allowed.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, random_flip
from mixflow_fast.data.decoding import read_rgb
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.shard_files import ShardFiles
from mixflow_fast.data.summary import DataSummary, digest_of
from mixflow_fast.files import existing_path

INDEX = ".mixflow-fast-index.npz"
TAR_IMAGES = ("jpg", "jpeg", "png", "webp", "bmp")
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class WebDataset:
    """Samples of webdataset's shards: an image, and its label in `.cls` or in `.json`.

    Members of an archive that have one name up to its first dot are a sample: `00042.jpg` with
    `00042.cls` (an integer as text) or `00042.json` ({"label": integer}). Images become RGB by the
    rule of `data/decoding.py`, then ADM's centre crop of side `size`. Samples are in the order of
    the shards' names, and in a shard as they are stored.

    Args:
        path: a folder with .tar files, or one of them; `~` is expanded.
        size: side in pixels.
        flip: mirrors left-right with probability 1/2, a function of (seed, position).

    Attributes:
        num_classes: the largest label and one more.
        size, flip, encoded, crops: as `ImageDataset`.

    Raises:
        ValueError: no shard, a compressed or damaged one, a sample without a label; in `get`, an
            image that cannot be read (with its name).
    """

    def __init__(self, path: str | os.PathLike[str], size: int, flip: bool = True) -> None:
        root = existing_path(path)
        self._paths = tar_shards(root)
        index = _load(root, self._paths) if root.is_dir() else None
        if index is None:
            index = _Index.of(self._paths)
            if root.is_dir():
                _save(root, self._paths, index)
        self._index = index
        self._shards = ShardFiles(self._paths)
        self._y = torch.from_numpy(index.rows[:, 3].copy())
        self.num_classes = int(self._y.max()) + 1
        self.size, self.flip, self.shape = size, flip, (3, size, size)
        self.encoded = self.crops = True
        self.name = f"webdataset-{root.resolve().name}-{size}"

    def __len__(self) -> int:
        return len(self._y)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: images (B, 3, size, size), and no x."""
        check_indices(indices, positions, len(self))
        rows = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            try:
                image = read_rgb(io.BytesIO(self.payload(index)))
            except ValueError as error:
                raise ValueError(f"cannot read the image {self.name_of(index)}: {error}") from error
            rows[row] = torch.from_numpy(np.array(adm_center_crop(image, self.size)))
        images = rows.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            images = random_flip(images, positions, seed)
        return Batch(None, self._y[indices], positions, images=images)

    def labels(self, indices: Tensor) -> Tensor:
        """As `ImageDataset.labels`."""
        return self._y[indices]

    def payload(self, index: int) -> bytes:
        """As `ImageDataset.payload`."""
        return self._shards.read(*self._index.rows[index, :3].tolist())

    def name_of(self, index: int) -> str:
        """As `ImageDataset.name_of`."""
        return f"{self._index.names[index]} in {self._paths[self._index.rows[index, 0]]}"

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of names, places and labels of all samples."""
        names = "\0".join(self._index.names)
        return DataSummary(
            unit="images",
            examples=len(self),
            classes=self.num_classes,
            shape=self.shape,
            digest=digest_of([os.fsencode(names), self._index.rows.tobytes()]),
            notes=(
                f"{len(self._paths)} shards of webdataset; labels are the numbers stored there",
            ),
        )


@dataclass(frozen=True)
class _Index:
    """Where the samples are.

    Attributes:
        rows: (N, 4) int64: shard, offset of the image, its bytes, label.
        names: of the images in their archives.
    """

    rows: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, paths: list[Path]) -> _Index:
        """By the headers of the archives."""
        rows, names = [], []
        for shard, path in enumerate(paths):
            for sample in tar_samples(path, ("cls", "json")):
                if sample.name:
                    rows.append((shard, sample.offset, sample.size, _label(sample, path)))
                    names.append(sample.name)
        if not rows:
            raise ValueError(
                f"no image ({', '.join(TAR_IMAGES)}) is in the shards of {paths[0].parent}"
            )
        return cls(np.array(rows, np.int64), names)


@dataclass
class TarSample:
    """What an archive holds of one sample.

    Attributes:
        key: its members' name up to the first dot, with the folder.
        name, offset, size: the image: name of its member, where its content begins in the archive,
            and how many bytes it has; "" and 0 where there is none.
        texts: content of the other members that were asked for, by what follows the dot.
    """

    key: str
    name: str = ""
    offset: int = 0
    size: int = 0
    texts: dict[str, bytes] = field(default_factory=dict)


def tar_samples(path: Path, kinds: Sequence[str]) -> Iterator[TarSample]:
    """The samples of an archive, in the order in which they are stored.

    Args:
        path: the archive.
        kinds: members to read beside images, such as "cls" for `00042.cls`.

    Raises:
        ValueError: a damaged or compressed archive, two images for one sample.
    """
    sample = TarSample("")
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep all
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if not member.isfile() or not stem or not kind:
                    continue
                key, kind = (f"{folder}/{stem}" if folder else stem), kind.lower()
                if key != sample.key:
                    if sample.name or sample.texts:
                        yield sample
                    sample = TarSample(key)
                if kind in TAR_IMAGES:
                    if sample.name:
                        raise ValueError(f"it has two images for one sample, {sample.name!r} and "
                                         f"{member.name!r}")  # fmt: skip
                    sample.name, sample.offset = member.name, member.offset_data
                    sample.size = member.size
                elif kind in kinds:
                    stream = archive.extractfile(member)
                    sample.texts[kind] = stream.read() if stream is not None else b""
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(
            f"cannot read the shard {path}: {error}. Compressed archives are not read: samples "
            "are read at random, so unpack them to .tar"
        ) from error
    if sample.name or sample.texts:
        yield sample


def _label(sample: TarSample, path: Path) -> int:
    """The class; ValueError names the sample where there is none."""
    found: object = None
    with suppress(ValueError, TypeError, KeyError):
        if "cls" in sample.texts:
            found = int(sample.texts["cls"])
        elif "json" in sample.texts:
            found = json.loads(sample.texts["json"])["label"]
    if type(found) is not int or found < 0:
        raise ValueError(
            f"{sample.name} in {path} has no label: expected {sample.key}.cls with an integer >= 0 "
            f'as text, or {sample.key}.json with {{"label": integer}}'
        )
    return found


def tar_shards(root: Path) -> list[Path]:
    """The .tar files of a folder by name, or the one that is given."""
    names = sorted(os.listdir(root)) if root.is_dir() else [root.name]
    parent = root if root.is_dir() else root.parent
    found = [parent / name for name in names if name.lower().endswith(".tar") and name[0] != "."]
    # Those that were unpacked may lie beside what came of them.
    compressed = [
        name
        for name in names
        if name.lower().endswith(COMPRESSED_TARS) and _unpacked(name) not in names
    ]
    if compressed:
        raise ValueError(
            f"{root} holds compressed archives ({compressed[0]}), of which a sample cannot be read "
            "at random: unpack them to .tar (gunzip)"
        )
    if not found:
        shards = " (the shards of a set are in its folder shards)" if root.is_dir() else ""
        raise ValueError(f"{root} holds no .tar shard{shards}: give the folder of the shards")
    return found


def _unpacked(name: str) -> str:
    """What a compressed archive is called after it was unpacked: x.tar of x.tar.gz and of x.tgz."""
    return name[: name.lower().rindex(".t")] + ".tar"


def _stamp(paths: list[Path]) -> str:
    """What tells shards from others, without reading them."""
    stats = [path.stat() for path in paths]
    rows = [[p.name, s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
    return json.dumps(rows)


def _load(root: Path, paths: list[Path]) -> _Index | None:
    """The index that an earlier run has left, if it is of these shards."""
    try:
        with np.load(root / INDEX, allow_pickle=False) as stored:
            if str(stored["stamp"]) != _stamp(paths):
                return None
            names = os.fsdecode(stored["names"].tobytes()).split("\0")
            return _Index(stored["rows"], names)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _save(root: Path, paths: list[Path], index: _Index) -> None:
    """Keep the index for later runs, where the folder may be written."""
    names = np.frombuffer(os.fsencode("\0".join(index.names)), np.uint8)
    with suppress(OSError):
        # Several ranks may do so at once, on machines whose process numbers are the same.
        descriptor, partial = tempfile.mkstemp(prefix=f"{INDEX}.", suffix=".npz", dir=root)
        with open(descriptor, "wb") as stream:
            np.savez(stream, rows=index.rows, names=names, stamp=np.array(_stamp(paths)))
        os.chmod(partial, 0o644)
        os.replace(partial, root / INDEX)
