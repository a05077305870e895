"""Folders of images, and what is wrong with some of them."""

from __future__ import annotations

import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

# Sides that need no halving at 32 pixels, one and two.
SIDES = ((40, 52), (33, 64), (64, 90), (65, 71), (131, 150), (48, 48), (97, 66))


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """A picture with soft colours, another one for each seed."""
    coarse = np.random.RandomState(seed).randint(0, 256, (5, 6, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_folder(root: Path, classes: tuple[str, ...] = ("a", "b"), each: int = 7) -> Path:
    """Class folders of JPEGs of several sizes; returns `root`."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(each):
            width, height = SIDES[(number + 3 * label) % len(SIDES)]
            picture = smooth(width, height, 100 * label + number)
            picture.save(root / name / f"{number:03d}.JPEG", "JPEG", quality=92)
    return root


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits: grey (H, W) or RGB (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bad_images() -> dict[str, tuple[bytes, str]]:
    """By kind: content of a file that cannot be used, and words of the reason."""
    good = encoded(smooth(200, 150, 1), "JPEG")
    frames = io.BytesIO()
    first, second = smooth(64, 48, 1), smooth(64, 48, 2)
    first.save(frames, "WEBP", save_all=True, append_images=[second], lossless=True)
    wide = np.arange(64 * 64).reshape(64, 64) * 16
    return {
        "empty": (b"", "it is empty (0 bytes)"),
        "noise": (b"not an image" * 9, "is no image of a format that is known"),
        "half": (good[: len(good) // 2], "truncated"),
        "no end": (good[:-8], "truncated"),
        "16 bits grey": (png16(wide), "it has 16 bits a channel"),
        "16 bits rgb": (png16(np.stack([wide] * 3, -1)), "it has 16 bits a channel"),
        "animated": (frames.getvalue(), "it has 2 frames"),
        "small": (encoded(smooth(64, 31, 1), "PNG"), "it has 64 x 31 pixels"),
    }


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """An image as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of openai/guided-diffusion, written down anew from its definition."""
    width, height = image.size
    while not min(width, height) < 2 * size:
        width, height = math.floor(width / 2), math.floor(height / 2)
        image = image.resize(size=(width, height), resample=Image.BOX)
    factor = size / min(width, height)
    # Python's `round` takes a half to the even neighbour.
    width, height = round(width * factor), round(height * factor)
    array = np.array(image.resize(size=(width, height), resample=Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return array[top : top + size, left : left + size]
