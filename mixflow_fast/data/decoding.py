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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Formats of images that class folders may hold and that are passed over.
OTHER_IMAGE_SUFFIXES = (".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".jp2", ".jxl", ".ppm",
                        ".pgm", ".tga", ".ico", ".jfif", ".jpe", ".svg", ".psd", ".exr", ".apng",
                        ".raw", ".dng")  # fmt: skip
_LONGEST = 100
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
    from PIL import Image as pil

    try:
        with pil.open(file) as image:
            _refuse(image)
            return _to_rgb(image)
    except (*_DAMAGE, pil.DecompressionBombError) as error:
        reason = "it is empty (0 bytes)" if _is_empty(file) else error
        raise ValueError(f"cannot read the image {str(file)!r}: {reason}") from error


def _is_empty(file: str | os.PathLike[str]) -> bool:
    return os.path.isfile(file) and not os.path.getsize(file)


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
