"""Images named by a table, `metadata.jsonl`, `.csv` or `.parquet`, as Hugging Face's imagefolder.

The column `file_name` is relative to the table's folder. The column `text` is a caption, or, in
JSON and parquet, a list of captions.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from mixflow_fast.data.decoding import IMAGE_SUFFIXES
from mixflow_fast.data.imports.images import opened_parquet
from mixflow_fast.data.preparation.captioned.listing import (
    BadItem,
    FolderFiles,
    Item,
    Listing,
    Refused,
    captions_of,
    decode_text,
    unread_image,
)
from mixflow_fast.files import check_inside
from mixflow_fast.messages import did_you_mean, shorten

_SUFFIXES = (".jsonl", ".csv", ".parquet")
_FILE, _TEXT = "file_name", "text"
# What others call the column of the captions.
_CAPTION_NAMES = ("caption", "captions", "prompt", "prompts", "description")

# (name of the row in messages, its cells or why it cannot be read)
_Row = tuple[str, Mapping[str, object] | Refused]


def is_table(name: str, any_name: bool = False) -> bool:
    """Whether a file in a folder is its table: metadata.jsonl, .csv or .parquet.

    Args:
        name: without folders.
        any_name: it was given itself, so that the suffix decides.
    """
    stem, suffix = os.path.splitext(name.lower())
    return suffix in _SUFFIXES and (any_name or stem == "metadata")


def list_metadata(table: Path, names: list[str]) -> Listing:
    """The images that a table names.

    Args:
        table: the file.
        names: of all files in its folder and below, sorted.

    Raises:
        ValueError: the table cannot be read, has other columns or no row.
    """
    listing = Listing(table.parent, "metadata", FolderFiles(table.parent))
    there, seen = set(names), set[str]()
    rows = 0
    for row_name, cells in _rows(table):
        rows += 1
        try:
            if isinstance(cells, Refused):
                raise cells
            name = _file_name(cells, table)
            if name in seen:
                raise Refused("second image of one name", f"{name} has a row before this one")
            seen.add(name)
            _check_there(name, there)
            listing.items.append(Item(name, _captions(cells, name)))
        except Refused as error:
            listing.bad.append(error.item(row_name))
    if not rows:
        raise ValueError(f"{table} has no row: give one for each image")
    for name in names:
        if name in seen or name == table.name:
            continue
        if name.lower().endswith(IMAGE_SUFFIXES):
            detail = f"no row of {table.name} names it"
            listing.bad.append(BadItem(name, "image without a caption", detail))
        else:
            listing.passed_over[os.path.splitext(name)[1].lower()] += 1
    listing.items.sort(key=lambda item: item.name)
    return listing


def _rows(table: Path) -> Iterator[_Row]:
    """The rows of a table; its columns are checked before the first."""
    suffix = table.suffix.lower()
    return {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[suffix](table)


def _json_rows(table: Path) -> Iterator[_Row]:
    checked = False
    with table.open("rb") as file:
        for number, line in enumerate(file, 1):
            name = f"{table.name} line {number}"
            if not line.strip():
                continue
            try:
                cells = json.loads(decode_text(line))
            except Refused as error:
                yield name, error
                continue
            except ValueError as error:
                yield name, Refused("row that cannot be read", str(error))
                continue
            if not isinstance(cells, dict):
                yield name, Refused("row that cannot be read", "it is no JSON object")
                continue
            if not checked:
                _check_columns(cells, table)
                checked = True
            yield name, cells


def _csv_rows(table: Path) -> Iterator[_Row]:
    try:
        text = decode_text(table.read_bytes())
    except Refused as error:
        raise ValueError(f"cannot read {str(table)!r}, its text is not UTF-8: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        _check_columns(reader.fieldnames or (), table)
        for cells in reader:
            name = f"{table.name} line {reader.line_num}"
            # A comma in a caption without quotes makes one cell more, and a cell that is missing
            # is None.
            if None in cells or None in cells.values():
                detail = f"expected {len(reader.fieldnames or ())} cells; put texts into quotes"
                yield name, Refused("row that cannot be read", detail)
            else:
                yield name, cells
    except csv.Error as error:
        raise ValueError(
            # The line of `DictReader` is that of the last row it could read.
            f"cannot read {str(table)!r} at line {reader.reader.line_num}: {error}"
        ) from error


def _parquet_rows(table: Path) -> Iterator[_Row]:
    with opened_parquet(table) as file:
        _check_columns(file.schema_arrow.names, table)
        number = 0
        for batch in file.iter_batches(columns=[_FILE, _TEXT]):
            for cells in batch.to_pylist():
                yield f"{table.name} row {number}", cells
                number += 1


def _check_columns(columns: Collection[str], table: Path) -> None:
    """ValueError where a column is missing; names the one that is probably meant."""
    missing = [name for name in (_FILE, _TEXT) if name not in columns]
    if not missing:
        return
    hint = ""
    for column in columns:
        near = did_you_mean(column, missing)
        if not near and column in _CAPTION_NAMES and _TEXT in missing:
            near = f"; did you mean {_TEXT!r}?"
        if near and not hint:
            hint = f"{near} Rename {column!r}"
    if not hint and "image" in columns:
        hint = "; images inside of tables are not read: write them as files"
    raise ValueError(
        f"{table} must have the columns {_FILE} and {_TEXT}, got {shorten(columns) or 'none'}{hint}"
    )


def _file_name(cells: Mapping[str, object], table: Path) -> str:
    """The image's name, relative to the table's folder, without `.` and `..` in it."""
    name = cells.get(_FILE)
    if not isinstance(name, str) or not name:
        raise Refused("row that cannot be read", f"its {_FILE} is {name!r}")
    try:
        check_inside([name], table)
    except ValueError as error:
        raise Refused("name outside the folder", str(error)) from error
    return posixpath.normpath(name)


def _check_there(name: str, there: Collection[str]) -> None:
    if name not in there:
        raise Refused("caption without an image", f"there is no {name}")
    if not name.lower().endswith(IMAGE_SUFFIXES):
        detail = unread_image([name]) or f"{name} is none of {', '.join(IMAGE_SUFFIXES)}"
        raise Refused("caption without an image", detail)


def _captions(cells: Mapping[str, object], name: str) -> tuple[str, ...]:
    if _TEXT not in cells:
        raise Refused("image without a caption", f"the row of {name} has no {_TEXT}")
    try:
        return captions_of(cells[_TEXT])
    except Refused as error:
        detail = f"of {name}" + (f": {error.detail}" if error.detail else "")
        raise Refused(error.problem, detail) from error
