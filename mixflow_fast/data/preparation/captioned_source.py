"""Images with captions, as a source of a text-to-image cache.

| layout | images | captions |
|---|---|---|
| text files | a folder, and what is below it | NAME.txt beside NAME.jpg; its lines |
| metadata | below the folder of the table | metadata.jsonl, .csv or .parquet: file_name and text |
| webdataset | members of .tar files | KEY.txt beside KEY.jpg, its lines; or "text" in KEY.json |

In JSON and parquet a text may be a list of captions. Captions lose white space at their ends.
Items are in the order of their names, and those of tars as they are stored, tars by name.
EXIF's orientation is not applied, by the rule of `data/decoding.py`.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixflow_fast.data.decoding import IMAGE_SUFFIXES, read_rgb
from mixflow_fast.data.foreign import describe_suffixes
from mixflow_fast.data.image_folder import FolderScan
from mixflow_fast.data.preparation.captioned.listing import BadItem, Contents, Item, Layout, Listing
from mixflow_fast.data.preparation.captioned.metadata import is_table, list_metadata
from mixflow_fast.data.preparation.captioned.tars import is_tar, list_tars
from mixflow_fast.data.preparation.captioned.text_files import TEXT_SUFFIX, list_text_files
from mixflow_fast.data.preparation.prepare import MAX_BAD, OnBad
from mixflow_fast.data.preparation.scan import core_count, quiet_pillow
from mixflow_fast.data.preparation.source import Header, check_usable, read_header
from mixflow_fast.files import existing_path
from mixflow_fast.messages import shorten

if TYPE_CHECKING:
    from PIL import Image

_CHUNK = 64  # images of one piece of work
_NAMED = 5  # of each problem, in an error
_LAYOUTS = (
    "known are (1) a folder of images with NAME.txt beside each NAME.jpg, (2) images with "
    "metadata.jsonl, metadata.csv or metadata.parquet (columns file_name and text), (3) .tar files "
    "of webdataset with KEY.jpg and KEY.txt"
)


class BadItems(ValueError):
    """Images or captions that cannot be used, where that is not accepted.

    Attributes:
        bad: all of them.
    """

    def __init__(self, bad: Sequence[BadItem], total: int, way_out: str) -> None:
        self.bad = tuple(bad)
        lines = [f"{len(bad):,} of {total:,} entries cannot be used. {way_out}:"]
        by_problem: dict[str, list[BadItem]] = {}
        for item in bad:
            by_problem.setdefault(item.problem, []).append(item)
        for problem, items in by_problem.items():
            lines.append(f"{problem}: {len(items):,}")
            for item in items[:_NAMED]:
                lines.append(f"  {item.name}" + (f" ({item.detail})" if item.detail else ""))
            if len(items) > _NAMED:
                lines.append(f"  ... and {len(items) - _NAMED:,} more")
        super().__init__("\n  ".join(lines))


@dataclass(frozen=True)
class CaptionedSource:
    """Images with captions, all of which can be used by their headers.

    Attributes:
        root: the folder.
        layout: which of the three it is.
        items: in order.
        sizes: (N, 2) int64, width and height in pixels, EXIF's orientation not applied.
        skipped: what was left out.
        notes, warnings: lines on what was passed over, and on what is probably a mistake.
    """

    root: Path
    layout: Layout
    items: list[Item]
    sizes: np.ndarray
    skipped: tuple[BadItem, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    contents: Contents

    def __len__(self) -> int:
        return len(self.items)

    def name(self, i: int) -> str:
        """An image's name, relative to the folder."""
        return self.items[i].name

    def captions(self, i: int) -> tuple[str, ...]:
        """An image's captions; at least one, none of them empty."""
        return self.items[i].captions

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of an image in pixels, as it is stored."""
        width, height = self.sizes[i].tolist()
        return width, height

    def payload(self, i: int) -> bytes:
        """An image's file; OSError where it cannot be read, which says nothing about the image."""
        return self.contents.read(self.items[i])

    def image(self, i: int) -> Image.Image:
        """An image in mode RGB, by the rule of `data/decoding.py`.

        Raises:
            ValueError: it cannot be used; names it.
        """
        try:
            return read_rgb(io.BytesIO(self.payload(i)), check_usable)
        except ValueError as error:
            raise ValueError(f"cannot read the image {self.name(i)!r}: {error}") from error

    def digest(self) -> str:
        """SHA-256 of names, captions and sizes, in the order of the items."""
        found = hashlib.sha256()
        for item, size in zip(self.items, self.sizes.tolist(), strict=True):
            found.update(json.dumps([item.name, item.captions, size]).encode() + b"\n")
        return found.hexdigest()


def open_captioned(
    path: str | os.PathLike[str],
    on_bad: OnBad = "refuse",
    max_bad: int = MAX_BAD,
    threads: int = 0,
    progress: Callable[[int], None] | None = None,
) -> CaptionedSource:
    """List images with captions and read the headers of all images.

    Args:
        path: a folder, a metadata file or a .tar.
        on_bad: "skip" leaves out what cannot be used.
        max_bad: how many may be left out.
        threads: that read headers; 0: four a core, since they wait for the disk.
        progress: called with how many more headers were read, from the calling thread.

    Raises:
        BadItems: images or captions cannot be used; counts all and names the first.
        ValueError: nothing is there, another layout, a table or an archive that cannot be read.
    """
    listing = _list(existing_path(path))
    total = len(listing.items) + len(listing.bad)
    if on_bad == "skip":  # the rest would only make it more
        _judge(listing.bad, total, on_bad, max_bad)
    items, sizes, turned = _read_headers(listing, threads, progress)
    _judge(listing.bad, total, on_bad, max_bad)
    if not items:
        raise ValueError(f"no image with a caption is left in {path}; {_LAYOUTS}")
    notes, remarks = listing.remarks()
    if turned:
        remarks += (
            f"images with EXIF's orientation, which is not applied as in ADM: {turned:,}; turn "
            "their pixels first if they should stand upright",
        )
    return CaptionedSource(
        root=listing.root,
        layout=listing.layout,
        items=items,
        sizes=sizes,
        skipped=tuple(listing.bad),
        notes=notes,
        warnings=remarks,
        contents=listing.contents,
    )


def _list(root: Path) -> Listing:
    """The listing of the layout that is found.

    Raises:
        ValueError: none of the three, or several.
    """
    folder, top = root.parent, [root.name]
    if root.is_dir():
        folder, top = root, sorted(name for name in os.listdir(root) if name[0] != ".")
    tables = [name for name in top if is_table(name, any_name=root.is_file())]
    tars = [name for name in top if is_tar(name)]
    images = [name for name in top if name.lower().endswith(IMAGE_SUFFIXES)]
    if len(tables) > 1 or (tars and (tables or images)):
        found = shorten([*tables, *tars[:1], *images[:1]])
        raise ValueError(
            f"{root} can be read in several ways, it holds {found}: give the table or the .tar "
            "itself, or move what is not meant"
        )
    if tars:
        return list_tars(root)
    if tables:
        return list_metadata(folder / tables[0], _files(folder))
    names = _files(root) if root.is_dir() else top
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    if root.is_dir() and TEXT_SUFFIX in suffixes and suffixes & set(IMAGE_SUFFIXES):
        return list_text_files(root, names)
    raise ValueError(f"{root} holds no images with captions{_found(root, names)}; {_LAYOUTS}")


def _found(root: Path, names: list[str]) -> str:
    """What is there instead, for the error."""
    deeper = [n for n in names if is_table(os.path.basename(n)) or is_tar(n)]
    if root.is_dir() and deeper:
        below = root / os.path.dirname(deeper[0])
        return f"; {deeper[0]} is one level too low: give the folder {str(below)!r}"
    counts = Counter(os.path.splitext(name)[1].lower() for name in names)
    if any(suffix in counts for suffix in (".parquet", ".arrow")):
        return (
            f": its files are {describe_suffixes(counts)}. Images inside of tables are not read: "
            "write them as files, with metadata.jsonl beside them"
        )
    return f": its files are {describe_suffixes(counts)}" if counts else ": it is empty"


def _files(root: Path) -> list[str]:
    """Names of all files in a folder and below it, sorted, with `/` between folders."""
    start = len(os.path.join(root, ""))
    return [file[start:] for file in FolderScan(root).files(root)]


def _judge(bad: list[BadItem], total: int, on_bad: OnBad, max_bad: int) -> None:
    """Refuse what cannot be used, or too much of it."""
    if bad and on_bad == "refuse":
        raise BadItems(bad, total, "Correct them, or leave them out by --on-bad skip")
    if len(bad) > max_bad:
        raise BadItems(
            bad, total, f"More than --max-bad {max_bad}: look at them, or allow more of them"
        )


def _read_headers(
    listing: Listing, threads: int, progress: Callable[[int], None] | None
) -> tuple[list[Item], np.ndarray, int]:
    """(items whose image can be used, their sizes (N, 2) int64, how many EXIF would turn)."""
    items, sizes, turned = [], list[tuple[int, int]](), 0
    chunks = [listing.items[n : n + _CHUNK] for n in range(0, len(listing.items), _CHUNK)]
    with quiet_pillow(), ThreadPoolExecutor(threads or 4 * core_count()) as pool:
        for chunk, headers in zip(
            chunks, pool.map(lambda part: _headers(listing.contents, part), chunks), strict=True
        ):
            for item, header in zip(chunk, headers, strict=True):
                if isinstance(header, BadItem):
                    listing.bad.append(header)
                    continue
                items.append(item)
                sizes.append((header.width, header.height))
                turned += header.orientation != 1
            if progress is not None:
                progress(len(chunk))
    return items, np.array(sizes, np.int64).reshape(-1, 2), turned


def _headers(contents: Contents, items: Sequence[Item]) -> list[Header | BadItem]:
    found: list[Header | BadItem] = []
    for item in items:
        with contents.open(item) as stream:
            try:
                found.append(read_header(stream))
            except ValueError as error:
                found.append(BadItem(item.name, "image that cannot be used", str(error)))
    return found
