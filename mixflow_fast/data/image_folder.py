"""Images in class folders, with the centre crop of ADM (openai/guided-diffusion; SiT and RAE)."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, random_flip
from mixflow_fast.data.decoding import IMAGE_SUFFIXES, decode_rgb
from mixflow_fast.data.foreign import describe_foreign, describe_suffixes, is_split, other_images
from mixflow_fast.data.summary import DataSummary, digest_of, sample_rows
from mixflow_fast.files import existing_path
from mixflow_fast.messages import shorten

if TYPE_CHECKING:
    from PIL import Image

_SIZED = 256  # files whose sizes are in the fingerprint


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to (size, size).

    While the short side is at least 2 * size both sides are halved (integer division) with a box
    filter; then bicubic to a short side of `size` (long side rounded), then the centre is cut out
    at offsets floor((side - size) / 2).
    """
    return cover_crop(image, size, size)


def cover_crop(image: Image.Image, width: int, height: int) -> Image.Image:
    """ADM's crop to any rectangle: resize until the image just covers it, cut out the centre.

    While both sides are at least twice the rectangle's, both are halved (integer division) with a
    box filter; then bicubic by the larger of the two ratios of sides (the other side rounded),
    then the centre at offsets floor((side - rectangle's side) / 2). Smaller images are enlarged.
    """
    from PIL import Image as pil

    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), pil.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, pil.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


class ImageFolder:
    """Images in class folders, `path/<class>/**/<image>`, classes in alphabetical order.

    Each image becomes RGB by the rule of `data/decoding.py`, ADM's centre crop of side `size`.
    EXIF's orientation is not applied, on purpose: ADM, SiT, REPA and RAE do not.

    Files are listed once, sorted; those are images whose names end as `IMAGE_SUFFIXES`, in upper
    or lower case. Hidden files and folders are skipped, other files counted. Symbolic links are
    followed; a folder that is reached twice (a link to a folder above it, a class that is a link
    to another) is refused, since its images would come twice, and so are links to nothing.

    Args:
        path: folder of class folders; `~` is expanded.
        size: side in pixels.
        flip: mirrors left-right with probability 1/2, a function of (seed, position).

    Attributes:
        classes: their names, in the order of the labels.
        files: image files, in the order of the indices.
        size, flip, encoded, crops: as `ImageDataset`.

    Raises:
        ValueError: missing path, no class, a class without images, train/ and val/ as classes, a
            folder that is reached twice, a broken link, a bad size; in `get`, an image that
            cannot be read (with its name).
    """

    def __init__(self, path: str | os.PathLike[str], size: int, flip: bool = True) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size must be an integer >= 1 (pixels), got {size!r}")
        root = existing_path(path)
        if not root.is_dir():
            raise ValueError(
                f"path must be a folder of class folders, got {str(path)!r}"
                f"{_because(describe_foreign(root, 'folder'))}"
            )
        scan = FolderScan(root)
        self.classes = sorted(scan.folders(root))
        _check_classes(root, self.classes)
        self.files: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            # An empty folder would shift no label, but a class that is never seen is a mistake.
            found = scan.images(root / name)
            if not found:
                foreign = describe_foreign(root, "folder")
                raise ValueError(
                    f"class folder {name!r} in {str(path)!r} holds no image "
                    # What is no class folder is not to be removed.
                    f"({', '.join(IMAGE_SUFFIXES)}): {foreign or 'remove it or fill it'}"
                )
            self.files += found
            labels += [label] * len(found)
        self._y = torch.tensor(labels, dtype=torch.int64)
        self._root, self._scan = root, scan
        self.size, self.flip = size, flip
        self.encoded = self.crops = True
        self.num_classes = len(self.classes)
        self.shape = (3, size, size)
        self.name = f"folder-{root.resolve().name}-{size}"

    def __len__(self) -> int:
        return len(self.files)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: images (B, 3, size, size), and x = images / 127.5 - 1, float32."""
        batch = self.get_images(indices, positions, seed)
        return dataclasses.replace(batch, x=batch.images.float() / 127.5 - 1.0)

    def get_images(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """`get` without x: what a run takes, which scales images on the device."""
        check_indices(indices, positions, len(self))
        pixels = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        for row, index in enumerate(indices.tolist()):
            pixels[row] = _decode(self.files[index], self.size)
        images = pixels.permute(0, 3, 1, 2).contiguous()
        if self.flip:
            images = random_flip(images, positions, seed)
        return Batch(None, self._y[indices], positions, images=images)

    def labels(self, indices: Tensor) -> Tensor:
        """As `ImageDataset.labels`."""
        return self._y[indices]

    def payload(self, index: int) -> bytes:
        """As `ImageDataset.payload`."""
        return Path(self.files[index]).read_bytes()

    def name_of(self, index: int) -> str:
        """As `ImageDataset.name_of`."""
        return self.files[index]

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of the names, and of the sizes of some files."""
        # In the folder, wherever that is mounted.
        start = len(str(self._root / "_")) - 1
        names = "\0".join(file[start:] for file in self.files)
        sizes = [os.path.getsize(self.files[row]) for row in sample_rows(len(self), _SIZED)]
        notes, warnings = self._remarks()
        return DataSummary(
            unit="images",
            examples=len(self),
            classes=self.num_classes,
            shape=self.shape,
            digest=digest_of([os.fsencode(names), repr(sizes).encode()]),
            class_names=tuple(self.classes),
            notes=notes,
            warnings=warnings,
        )

    def _remarks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Lines on files that were passed over, and on a folder that is the wrong one."""
        notes, warnings = [], []
        if passed_over := self._scan.passed_over:
            line = (
                f"files passed over: {describe_suffixes(passed_over)}; read are "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
            (warnings if other_images(passed_over) else notes).append(line)
        if stray := self._scan.stray:
            warnings.append(
                f"images directly in {self._root} have no class and are passed over: "
                f"{len(stray):,}, such as {stray[0]}"
            )
        start = len(str(self._root / "_")) - 1
        below = {os.path.dirname(file[start:]) for file in self.files}
        if not below & set(self.classes) and len(below) > self.num_classes:
            warnings.append(
                f"no class folder holds images itself, they lie in {len(below)} folders below, "
                f"such as {shorten(sorted(below), 2)}: if those are the classes, the path is one "
                "level too high"
            )
        return tuple(notes), tuple(warnings)


class FolderScan:
    """Lists a folder, or the class folders in it; hidden names are skipped, links are followed.

    Args:
        root: that folder.

    Attributes:
        passed_over: by suffix, how many files in the classes are no image that is read.
        stray: names of images directly in the root.
    """

    def __init__(self, root: Path) -> None:
        self.passed_over: Counter[str] = Counter()
        self.stray: list[str] = []
        self._first: dict[tuple[int, int], str] = {}
        self._enter(str(root))

    def folders(self, root: Path) -> list[str]:
        """Names of the class folders."""
        found = []
        for entry in _entries(str(root)):
            if is_folder(entry):
                found.append(entry.name)
            elif _is_image(entry.name):
                self.stray.append(entry.name)
        return found

    def images(self, folder: Path) -> list[str]:
        """All images in a class folder and below it, sorted."""
        found = []
        for file in self.files(folder):
            if _is_image(file):
                found.append(file)
            else:
                self.passed_over[os.path.splitext(file)[1].lower()] += 1
        return found

    def files(self, folder: Path) -> list[str]:
        """All files in a folder and below it, sorted.

        Raises:
            ValueError: a folder that was read before under another name, a link to nothing, a
                folder that cannot be listed.
        """
        found, waiting = [], [str(folder)]
        while waiting:
            parent = waiting.pop()
            self._enter(parent)
            for entry in _entries(parent):
                (waiting if is_folder(entry) else found).append(entry.path)
        return sorted(found)

    def _enter(self, folder: str) -> None:
        """Refuse a folder that was read under another name."""
        status = os.stat(folder)
        first = self._first.setdefault((status.st_dev, status.st_ino), folder)
        # Some file systems give all folders one number: the path is asked, too.
        if first != folder and os.path.realpath(first) == os.path.realpath(folder):
            raise ValueError(
                f"{folder!r} is the same folder as {first!r}, by a link: its images would come "
                "twice. Remove the link"
            )


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What a folder holds, without hidden names."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if entry.name[0] != "."]
    except OSError as error:
        raise ValueError(f"cannot list {folder!r}: {error}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; ValueError for a link to nothing."""
    try:
        if entry.is_dir():
            return True
        if entry.is_symlink():
            entry.stat()  # known since `is_dir`: on a network disk another look would be slow
    except OSError:
        # It may be a class folder: without it all labels after it would be others.
        raise ValueError(
            f"{entry.path!r} is a broken link, to {os.readlink(entry.path)!r}: mount what it "
            "points to, or remove it"
        ) from None
    return False


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def _check_classes(root: Path, classes: list[str]) -> None:
    """Refuse a root without class folders, or whose folders are the splits of a data set."""
    if not classes:
        raise ValueError(
            f"no class folder in {str(root)!r}: expected path/<class>/<image>"
            f"{_because(describe_foreign(root, 'folder'))}"
        )
    if all(is_split(name) for name in classes):
        foreign = describe_foreign(root, "folder")
        first = next((name for name in classes if name.lower().startswith("train")), classes[0])
        raise ValueError(
            f"the folders of {str(root)!r} are {shorten(classes)}: parts of a data set, not "
            f"classes. Give one of them, such as {str(root / first)!r}, whose folders are the "
            f"classes{_because(foreign)}"
        )


def _because(foreign: str) -> str:
    return f"; {foreign}" if foreign else ""


def _decode(file: str, size: int) -> Tensor:
    """(size, size, 3) uint8."""
    import numpy as np

    try:
        image = decode_rgb(file)
    except ValueError as error:
        raise ValueError(
            f"{error}. To go on with a run, put a readable copy in its place: without the file the "
            "examples have another order"
        ) from error
    return torch.from_numpy(np.array(adm_center_crop(image, size)))
