"""Images and captions in .tar files of webdataset: `00042.jpg` with `00042.txt` or `00042.json`.

Members of one name up to the first dot belong together, wherever they are in their tar. The lines
of .txt are the captions; without one, they are "text" of .json, a text or a list of texts.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mixflow_fast.data.preparation.captioned.listing import (
    BadItem,
    Item,
    Listing,
    Refused,
    captions_of,
    decode_text,
    lines_of,
)
from mixflow_fast.data.shard_files import ShardFiles
from mixflow_fast.data.webdataset import (
    COMPRESSED_TARS,
    TAR_IMAGES,
    TarSample,
    tar_samples,
    tar_shards,
)


def is_tar(name: str) -> bool:
    """Whether a file's name is that of a tar; compressed ones are refused when they are listed."""
    return name.lower().endswith((".tar", *COMPRESSED_TARS))


def list_tars(root: Path) -> Listing:
    """The images of a tar, or of the tars of a folder.

    Raises:
        ValueError: no tar, a compressed or damaged one, two images for one sample.
    """
    paths = tar_shards(root)
    folder = root if root.is_dir() else root.parent
    listing = Listing(folder, "webdataset", TarMembers(ShardFiles(paths)))
    for number, path in enumerate(paths):
        for sample in _joined(path, listing.bad):
            name = f"{path.name}/{sample.name or sample.key}"
            try:
                captions = _captions(sample)
                if not sample.name:
                    suffixes = ", ".join(f".{kind}" for kind in TAR_IMAGES)
                    raise Refused("caption without an image", f"expected one of {suffixes}")
            except Refused as error:
                listing.bad.append(error.item(name))
            else:
                place = (number, sample.offset, sample.size)
                listing.items.append(Item(name, captions, place))
    return listing


def _joined(path: Path, bad: list[BadItem]) -> Collection[TarSample]:
    """The samples of a tar, in the order of their first members.

    Whoever packs a folder with tar has its members in the order of the file system, in which an
    image and its caption need not be neighbours.
    """
    found: dict[str, TarSample] = {}
    for sample in tar_samples(path, ("txt", "json")):
        first = found.setdefault(sample.key, sample)
        if first is sample:
            continue
        if sample.name and first.name:
            detail = f"{first.name} comes before it in {path.name}"
            bad.append(BadItem(f"{path.name}/{sample.name}", "second image of one name", detail))
            continue
        if sample.name:
            first.name, first.offset, first.size = sample.name, sample.offset, sample.size
        first.texts.update(sample.texts)
    return found.values()


def _captions(sample: TarSample) -> tuple[str, ...]:
    if "txt" in sample.texts:
        return lines_of(decode_text(sample.texts["txt"]))
    base = os.path.basename(sample.key)
    if "json" not in sample.texts:
        raise Refused("image without a caption", f"neither {base}.txt nor {base}.json is there")
    try:
        record = json.loads(decode_text(sample.texts["json"]))
    except json.JSONDecodeError as error:
        raise Refused("row that cannot be read", f"{base}.json: {error}") from error
    if not isinstance(record, dict) or "text" not in record:
        raise Refused("image without a caption", f'{base}.json has no "text"')
    return captions_of(record["text"])


@dataclass(frozen=True)
class TarMembers:
    """As `Contents`, of members of tars, which are read at their places."""

    files: ShardFiles

    def read(self, item: Item) -> bytes:
        """As `Contents.read`."""
        shard, offset, size = item.place
        return self.files.read(shard, offset, size)

    def open(self, item: Item) -> BinaryIO:
        """As `Contents.open`: reads what is asked for, which for a header is little."""
        return io.BufferedReader(_Member(self.files, item.place))


class _Member(io.RawIOBase):
    """A member of a tar as a file."""

    def __init__(self, files: ShardFiles, place: tuple[int, int, int]) -> None:
        self._files, self._at = files, 0
        self._shard, self._offset, self._size = place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset}, before the beginning")
        self._at = start + offset
        return self._at

    def readinto(self, buffer: memoryview) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        buffer[:count] = self._files.read(self._shard, self._offset + self._at, count)
        self._at += count
        return count
