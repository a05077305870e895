"""How prepared pixels are stored: image files in tar shards, or bytes in .npy shards.

| format | shard | exact |
|---|---|---|
| webp | tar of lossless WebP, with the least effort: PNG's speed and less than its size | yes |
| raw | .npy, uint8 (rows, S, S, 3), rows from byte 4096 on | yes |
| jpeg | tar of JPEG, quality 98, colours not subsampled | no |
| png | REPA's folders of PNG without compression | yes |

A tar holds `00000042.webp` and `00000042.cls` (the label in ASCII) for each image, in order, so
that every reader of webdataset takes it. The number is the image's in the source, so that a shard
does not depend on what is skipped in the shards before it. ICC profiles and EXIF are not written.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import numpy as np

from mixflow_fast.data.npy_files import HEADER_BYTES, padded_header

Format = Literal["webp", "raw", "jpeg", "png"]
FORMATS: tuple[Format, ...] = ("webp", "raw", "jpeg")
SUFFIXES = {"webp": "webp", "jpeg": "jpg", "png": "png"}
EXACT = frozenset({"webp", "raw", "png"})
_TAR_BLOCK = tarfile.BLOCKSIZE


def encode(pixels: np.ndarray, image_format: Format) -> bytes:
    """Pixels, (S, S, 3) uint8, as a file of a format; "raw": as they are."""
    if image_format == "raw":
        return np.ascontiguousarray(pixels).tobytes()
    from PIL import Image

    out = io.BytesIO()
    image = Image.fromarray(pixels)
    if image_format == "webp":
        image.save(out, "WEBP", lossless=True, quality=0, method=0)
    elif image_format == "jpeg":
        image.save(out, "JPEG", quality=98, subsampling=0)
    else:
        image.save(out, "PNG", compress_level=0)
    return out.getvalue()


class Shard:
    """A shard that is being written, image by image. Use it as a context manager.

    Args:
        path: of the file, or of the folder (png).
        image_format: of the images.
        size: side in pixels.

    Attributes:
        rows: images so far.
        sizes: bytes of each, in order.
    """

    def __init__(self, path: Path, image_format: Format, size: int) -> None:
        self.rows, self.sizes = 0, list[int]()
        self._path, self._format, self._size = path, image_format, size
        self._file: BinaryIO | None = None
        if image_format == "png":
            path.mkdir()
            return
        self._file = path.open("wb")
        if image_format == "raw":
            self._file.write(bytes(HEADER_BYTES))

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        try:
            if kind is None:
                self._end(self._file)
        finally:
            self._file.close()

    def add(self, number: int, label: int, payload: bytes) -> None:
        """Append an image.

        Args:
            number: in the source.
            label: its class.
            payload: as `encode` gave it.
        """
        if self._file is None:
            (self._path / f"img{number:08d}.png").write_bytes(payload)
        elif self._format == "raw":
            self._file.write(payload)
        else:
            _add_member(self._file, f"{number:08d}.{SUFFIXES[self._format]}", payload)
            _add_member(self._file, f"{number:08d}.cls", str(label).encode())
        self.rows += 1
        self.sizes.append(len(payload))

    def _end(self, file: BinaryIO) -> None:
        if self._format == "raw":
            file.seek(0)
            file.write(padded_header((self.rows, self._size, self._size, 3), "uint8"))
            return
        file.write(bytes(2 * _TAR_BLOCK))
        file.write(bytes(-file.tell() % tarfile.RECORDSIZE))


def payload_offsets(image_format: Format, sizes: Sequence[int], labels: Sequence[int]) -> list[int]:
    """Where the images of a shard begin in its file, in bytes.

    Args:
        image_format: webp, jpeg or raw.
        sizes: bytes of each image, as `Shard.sizes`.
        labels: their classes.
    """
    offsets, place = [], HEADER_BYTES if image_format == "raw" else 0
    for size, label in zip(sizes, labels, strict=True):
        if image_format == "raw":
            offsets.append(place)
            place += size
        else:
            offsets.append(place + _TAR_BLOCK)
            place += _in_tar(size) + _in_tar(len(str(label)))
    return offsets


def _in_tar(size: int) -> int:
    """Bytes that a member of a tar takes, with its header."""
    return _TAR_BLOCK + size + -size % _TAR_BLOCK


def _add_member(file: BinaryIO, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the same bytes whoever writes it
    member.size = len(content)
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    file.write(content)
    file.write(bytes(-len(content) % _TAR_BLOCK))
