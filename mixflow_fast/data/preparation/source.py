"""The images that a set is made of: their list, and one of them as its training crop."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from mixflow_fast.data.decoding import opened, read_rgb
from mixflow_fast.data.image_folder import ImageFolder, adm_center_crop
from mixflow_fast.data.preparation.imagenet import Scheme, check_imagenet, choose_scheme
from mixflow_fast.files import existing_path

if TYPE_CHECKING:
    from PIL import Image

SMALLEST_SIDE = 32
_ORIENTATION = 0x0112  # EXIF's tag
_PNG_METADATA = {"exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"}


@dataclass(frozen=True)
class Source:
    """Images with classes: in class folders, in the order of (class folder, file name), or packed.

    A number of an image is its place in this list, whatever is skipped later.

    Attributes:
        root: folder of the class folders; of packed images the file or the folder of the files.
        scheme: "imagenet": the classes are the 1000 synsets; "folder": any.
        classes: names in the order of the labels.
        files: relative to `root`.
        labels: (N,) int64.
        notes, warnings: lines on what was passed over, and on what is probably a mistake.
        content: of packed images, an image's file by its number; called from several threads.
    """

    root: Path
    scheme: Scheme
    classes: tuple[str, ...]
    files: list[str]
    labels: np.ndarray
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    content: Callable[[int], bytes] | None = None

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """SHA-256 of the names and labels, in the order of the numbers."""
        names = os.fsencode("\0".join(self.files))
        return hashlib.sha256(names + b"\0\0" + self.labels.tobytes()).hexdigest()

    def read(self, number: int) -> bytes:
        """An image's file; OSError where it cannot be read, which says nothing about the image."""
        if self.content is not None:
            return self.content(number)
        return (self.root / self.files[number]).read_bytes()

    def look(self, number: int) -> tuple[int, Path | io.BytesIO]:
        """(bytes of an image's file, what to read its header from)."""
        if self.content is not None:
            content = self.content(number)
            return len(content), io.BytesIO(content)
        file = self.root / self.files[number]
        return os.path.getsize(file), file


def list_source(path: Path, scheme: Scheme | None = None) -> Source:
    """List a folder of class folders; opens no image.

    Args:
        path: `PATH/<class>/**/<image>`.
        scheme: what the classes are; None: `imagenet.choose_scheme`.

    Raises:
        ValueError: nothing is there, no class, a class without images and whatever else
            `ImageFolder` refuses; "imagenet": other classes than the 1000 synsets.
    """
    root = existing_path(path, "folder")
    if root.is_dir():
        scheme = scheme or choose_scheme(root)
        if scheme == "imagenet":
            check_imagenet(root)
    listed = ImageFolder(root, SMALLEST_SIDE, flip=False)
    start = len(os.path.join(root, ""))
    summary = listed.summary()
    return Source(
        root=root,
        scheme=scheme or "folder",
        classes=tuple(listed.classes),
        files=[file[start:] for file in listed.files],
        labels=listed.labels(slice(None)).numpy(),
        notes=summary.notes,
        warnings=summary.warnings,
    )


@dataclass(frozen=True)
class Header:
    """What an image file says of itself, without its pixels.

    Attributes:
        format, mode: as Pillow calls them, such as JPEG and CMYK.
        width, height: pixels.
        orientation: EXIF's, 1 to 8; 1 where there is none. It is not applied.
    """

    format: str
    mode: str
    width: int
    height: int
    orientation: int


def read_header(file: str | os.PathLike[str] | BinaryIO) -> Header:
    """The header of an image that a set can be made of.

    Raises:
        ValueError: the reason why it cannot.
    """
    with opened(file) as image:
        check_usable(image)
        return Header(
            format=str(image.format),
            mode=image.mode,
            width=image.width,
            height=image.height,
            orientation=_orientation(image),
        )


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and not _PNG_METADATA & set(image.info):
        return 1  # Pillow would decode the pixels, to look for EXIF behind them
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever damaged EXIF brings: the pixels are none the worse for it
        return 1
    return found if found in range(1, 9) else 1


def read_crop(content: bytes, size: int) -> np.ndarray:
    """ADM's centre crop of an image file, (size, size, 3) uint8, by the rule of `data/decoding.py`.

    Raises:
        ValueError: the image cannot be used; the reason, without the file's name.
    """
    return np.asarray(adm_center_crop(read_rgb(io.BytesIO(content), check_usable), size))


def check_usable(image: Image.Image) -> None:
    """What a set refuses beyond `data/decoding.py`, from the header.

    Raises:
        ValueError: 16 bits a channel, or a side below `SMALLEST_SIDE`.
    """
    # The mode does not tell: a PNG of 16-bit RGB has the mode RGB.
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    if image.mode.startswith("I") or any(";16" in mode for mode in raw_modes):
        raise ValueError("it has 16 bits a channel, expected 8: store it with 8")
    if min(image.size) < SMALLEST_SIDE:
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, expected sides of at least "
            f"{SMALLEST_SIDE}"
        )
