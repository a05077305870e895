"""From an image file to 8-bit RGB: the one rule for training images and a teacher's images.

| file | becomes |
|---|---|
| 8-bit grey and RGB, palettes, CMYK, YCbCr, 1 bit | `convert("RGB")` of Pillow, as ADM does |
| 16 bits a channel | the high byte of each value |
| transparency (alpha, a transparent palette entry or colour) | the image over white |
| several frames (animations, pages) | refused |
| 32-bit integers, floats, Lab | refused: their range is not known |
| empty, cut off or damaged | refused |
| a side over 100 times as long as the other | refused |

EXIF's orientation is not applied, on purpose: ADM, SiT, REPA and RAE do not. Images smaller than
the training size are enlarged, as by ADM.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Formats of images that class folders may hold and that are passed over.
OTHER_IMAGE_SUFFIXES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm",
                        ".pgm", ".tga", ".ico", ".jfif", ".jpe", ".svg", ".psd", ".exr", ".apng",
                        ".raw", ".dng")  # fmt: skip
_LONGEST = 100
_EMPTY = "it is empty (0 bytes)"
_NO_IMAGE = "its content is no image of a format that is known"
# A photo of a phone: the picture, and beside it a preview or a map of brightness.
_STILL_WITH_EXTRAS = "MPO"
# What Pillow's readers raise on a damaged file, beside what they mean to.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError,
           struct.error, zlib.error)  # fmt: skip


def decode_rgb(file: str | os.PathLike[str]) -> Image.Image:
    """The pixels of an image file in mode RGB, by the table above.

    Raises:
        ValueError: names the file, and what it is where it is refused.
    """
    try:
        return read_rgb(file)
    except ValueError as error:
        raise ValueError(f"cannot read the image {str(file)!r}: {error}") from error


def read_rgb(
    source: str | os.PathLike[str] | BinaryIO,
    check: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """As `decode_rgb`, from a file or from its content; the error holds the reason alone.

    Args:
        source: a path, or a binary stream at its start.
        check: raises ValueError where an image that was opened, and not yet decoded, is refused
            by a further rule.
    """
    with opened(source) as image:
        if check is not None:
            check(image)
        return _to_rgb(image)


@contextmanager
def opened(source: str | os.PathLike[str] | BinaryIO) -> Iterator[Image.Image]:
    """An image of which only the header was read, if it is one that the table above takes.

    Raises:
        ValueError: the reason, without a name; also for what fails while it is decoded inside.
    """
    from PIL import Image as pil

    try:
        with pil.open(source) as image:
            _refuse(image)
            yield image
    except pil.UnidentifiedImageError as error:
        # Pillow's words name the file, or the address of a stream.
        raise ValueError(_EMPTY if _is_empty(source) else _NO_IMAGE) from error
    except (*_DAMAGE, pil.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _is_empty(source: str | os.PathLike[str] | BinaryIO) -> bool:
    if isinstance(source, str | os.PathLike):
        return os.path.isfile(source) and not os.path.getsize(source)
    return not source.seek(0, os.SEEK_END)


def _refuse(image: Image.Image) -> None:
    """Refuse what is no single picture of known range."""
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != _STILL_WITH_EXTRAS:
        raise ValueError(
            f"it has {frames} frames, expected one picture: store the frame that is meant, or "
            "remove it"
        )
    # Pillow before 11 reads 16-bit PNG as mode I.
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format != "PNG"):
        raise ValueError(
            f"its mode is {image.mode} ({'Lab' if image.mode == 'LAB' else '32 bits a value'}), "
            "whose range is not known: store it as 8-bit RGB or grey, or as 16-bit grey"
        )
    if max(image.size) > _LONGEST * min(image.size):
        raise ValueError(
            f"it has {image.width} x {image.height} pixels, expected sides of at most {_LONGEST} "
            "to 1: crop it, or remove it"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image as pil

    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _high_byte(image)
    if "transparency" not in image.info and not {"A", "a"} & set(image.getbands()):
        return image.convert("RGB")
    layered = _with_alpha(image)
    if layered.getchannel("A").getextrema()[0] == 255:  # nothing shows through
        return layered.convert("RGB")
    return pil.alpha_composite(pil.new("RGBA", image.size, "white"), layered).convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit grey as mode L; Pillow does the same with each channel of 16-bit RGB."""
    import numpy as np
    from PIL import Image as pil

    _refuse_wide_transparency(image)
    return pil.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))


def _with_alpha(image: Image.Image) -> Image.Image:
    _refuse_wide_transparency(image)
    if image.mode == "La":  # premultiplied grey has one conversion only
        image = image.convert("LA")
    return image.convert("RGBA")


def _refuse_wide_transparency(image: Image.Image) -> None:
    """A transparent colour of 16 bits cannot be found among pixels of which 8 bits are left."""
    colour = image.info.get("transparency", 0)
    values = colour if isinstance(colour, tuple | bytes) else (colour,)
    if image.mode.startswith("I") and "transparency" in image.info or max(values, default=0) > 255:
        raise ValueError(
            "it has 16 bits a channel and a transparent colour: store it with an alpha channel, or "
            "without transparency"
        )
