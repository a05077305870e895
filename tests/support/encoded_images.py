"""Photographs as encoded files of many kinds, and folders of them."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


@lru_cache
def photos() -> tuple[Image.Image, ...]:
    """Three photographs: 640 x 427 twice, and 512 x 600."""
    own = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    with Image.open(Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg") as image:
        return *own, image.convert("RGB")


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def lossless(image: Image.Image) -> bytes:
    """WebP as `prepare` writes it."""
    return encoded(image, "WEBP", lossless=True, method=0, quality=0)


def turned() -> Image.Exif:
    """EXIF that says: the camera was held on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def wide_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, RGB (H, W, 3)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def plain_files(image: Image.Image) -> dict[str, bytes]:
    """Files that DALI decodes."""
    jpeg = encoded(image, "JPEG", quality=90, subsampling=2)
    return {
        "jpeg 4:4:4": encoded(image, "JPEG", quality=90, subsampling=0),
        "jpeg 4:2:2": encoded(image, "JPEG", quality=90, subsampling=1),
        "jpeg 4:2:0": jpeg,
        "jpeg progressive": encoded(image, "JPEG", quality=90, progressive=True),
        "jpeg grey": encoded(image.convert("L"), "JPEG", quality=90),
        "jpeg with EXIF": encoded(image, "JPEG", quality=90, exif=turned()),
        "jpeg with more bytes": jpeg + b"more",
        "png": encoded(image, "PNG"),
        "png grey": encoded(image.convert("L"), "PNG"),
        "webp lossless": lossless(image),
        "webp": encoded(image, "WEBP", quality=80),
    }


def odd_files(image: Image.Image) -> dict[str, bytes]:
    """Files that are decoded before DALI sees them."""
    ramp = np.linspace(0, 255, image.width).astype(np.uint8)[None].repeat(image.height, 0)
    glass = image.convert("RGBA")
    glass.putalpha(Image.fromarray(ramp))
    cmyk = encoded(image.convert("CMYK"), "JPEG", quality=90)
    marker = cmyk.index(b"\xff\xee")
    after = marker + 2 + int.from_bytes(cmyk[marker + 2 : marker + 4], "big")
    return {
        "jpeg CMYK": cmyk,
        "jpeg CMYK without Adobe's marker": cmyk[:marker] + cmyk[after:],
        "jpeg RGB": encoded(image, "JPEG", quality=90, keep_rgb=True),
        "jpeg with a preview": encoded(image, "MPO", save_all=True, append_images=[image]),
        "png palette": encoded(image.quantize(64), "PNG"),
        "png transparent palette": encoded(image.quantize(64), "PNG", transparency=5),
        "png transparent colour": encoded(image, "PNG", transparency=image.getpixel((0, 0))),
        "png RGBA": encoded(glass, "PNG"),
        "png LA": encoded(glass.convert("LA"), "PNG"),
        "png 1 bit": encoded(image.convert("1"), "PNG"),
        "png 16 bits": wide_png(
            np.asarray(image).astype(np.int64) * 257 - 100 * (ramp > 9)[..., None]
        ),
        "webp RGBA": encoded(glass, "WEBP", lossless=True, exact=True),
        "bmp": encoded(image, "BMP"),
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    """Two classes of files in turn; a file's name is its key, in the order of `files`."""
    for number, (name, content) in enumerate(files.items()):
        suffix = {"jpeg": "jpg"}.get(name.split()[0], name.split()[0])
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03d} {name.replace(':', '')}.{suffix}").write_bytes(content)
    return root


def write_prepared(root: Path, count: int, side: int = 24) -> Path:
    """Square lossless WebP windows of the photographs, two classes."""
    rng = np.random.RandomState(1)
    files = {}
    for number in range(count):
        photo = photos()[number % 3]
        left, top = (int(rng.randint(0, s - side)) for s in photo.size)
        files[f"webp {number}"] = lossless(photo.crop((left, top, left + side, top + side)))
    return write_folder(root, files)
