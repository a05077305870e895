"""Images that other programs packed, as a source of prepared sets.

* Tables of Hugging Face datasets: .parquet files with `image`, struct<bytes, path>, and `label`,
  integers, whose names stand in the schema's metadata. They are read in the order of the file
  names, group of rows by group of rows.
* REPA's and EDM2's prepared images: a folder or a stored zip of {idx[:5]}/img{idx}.png beside
  dataset.json. They are crops already, and making a set of their own side leaves them as they are.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mixflow_fast.data.foreign import is_split
from mixflow_fast.data.imports.archive import INDEX, Archive, list_files, open_archive
from mixflow_fast.data.paired_images import numbered
from mixflow_fast.data.preparation.imagenet import Scheme
from mixflow_fast.data.preparation.imagenet_synsets import SYNSETS
from mixflow_fast.data.preparation.source import Source

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_GROUPS_KEPT = 4  # of rows, in memory: the threads work on neighbouring images
# The first and the last of ImageNet's 1000 classes by the names of Hugging Face's `imagenet-1k`.
_FIRST_NAME, _LAST_NAME = "tench", "toilet tissue"


def is_packed(path: Path) -> bool:
    """Whether a path holds such images."""
    if path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet"))):
        return True
    return (path.suffix == ".zip" and path.is_file()) or (path / INDEX).is_file()


def list_packed(
    path: Path,
    scheme: Scheme | None = None,
    trust_labels: bool = False,
    no_labels: bool = False,
) -> Source:
    """The images at a path; opens none.

    Args:
        path: a .parquet, a folder of them, or REPA's or EDM2's folder or zip.
        scheme: "imagenet" refuses tables whose classes are not the 1000 in their order.
        trust_labels: take tables whose schema does not say what the labels mean.
        no_labels: take images without classes as one class.

    Raises:
        ValueError: files that cannot be read, labels whose meaning is not known, other classes.
    """
    if (path / INDEX).is_file() or path.suffix == ".zip":
        if scheme == "imagenet":
            raise ValueError(
                f"--classes imagenet: {INDEX} of {path} has no class names to compare; leave it "
                "out, the labels are taken as they are"
            )
        return _list_archive(open_archive(path), no_labels)
    return _list_tables(path, scheme, trust_labels)


def _list_archive(archive: Archive, no_labels: bool) -> Source:
    where = f"{INDEX} of {str(archive.path)!r}"
    labels = list_files(archive, no_labels)
    by_number = numbered(labels, where)
    numbers = sorted(by_number)
    if numbers != list(range(len(numbers))):
        gap = next(n for n, number in enumerate(numbers) if n != number)
        raise ValueError(
            f"{where} must list the images 0 to {len(numbers) - 1}, which latents are paired by; "
            f"number {gap} is missing: copy the whole set"
        )
    files = [by_number[number] for number in numbers]
    values = np.array([labels[name] for name in files], np.int64)
    return Source(
        root=archive.path,
        scheme="folder",
        classes=tuple(map(str, range(int(values.max()) + 1))),
        files=files,
        labels=values,
        notes=("classes have numbers and no names in dataset.json",),
        warnings=(),
        content=lambda number: archive.read(files[number]),
    )


def _list_tables(path: Path, scheme: Scheme | None, trust_labels: bool) -> Source:
    paths = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    _check_one_split(paths)
    tables = _Tables(paths)
    names = tables.class_names
    if names is None:
        if not trust_labels or scheme == "imagenet":
            raise ValueError(
                f"the schema of {str(tables.paths[0])!r} does not say what the labels mean: if "
                "they are those of your checkpoint, give --trust-labels"
                f"{' and no --classes imagenet' if scheme == 'imagenet' else ''}"
            )
        names = tuple(map(str, range(int(tables.labels.max()) + 1)))
    if tables.labels.min() < 0 or tables.labels.max() >= len(names):
        raise ValueError(
            f"labels of {path} must lie in [0, {len(names)}), got {tables.labels.min()} to "
            f"{tables.labels.max()}: is it a split without labels?"
        )
    imagenet = names == tuple(SYNSETS) or (
        len(names) == len(SYNSETS)
        and names[0].startswith(_FIRST_NAME)
        and names[-1].startswith(_LAST_NAME)
    )
    if scheme == "imagenet" and not imagenet:
        raise ValueError(
            f"the {len(names)} classes of {path} are not ImageNet's 1000 in their order, they "
            f"begin with {names[0]!r} and end with {names[-1]!r}: labels would mean other classes"
        )
    # The names of Hugging Face are in the order of the synsets.
    chosen: Scheme = "imagenet" if imagenet and scheme != "folder" else "folder"
    partial = [file.name for file in tables.paths if "partial" in str(file)]
    return Source(
        root=path,
        scheme=chosen,
        classes=tuple(SYNSETS) if chosen == "imagenet" else names,
        files=tables.names,
        labels=tables.labels,
        notes=(),
        warnings=(
            (
                f"{partial[0]} is of a conversion that the hub cuts off at 5 GB: it may not be the "
                "whole set",
            )
            if partial
            else ()
        ),
        content=tables.read,
    )


def _check_one_split(paths: list[Path]) -> None:
    """ValueError for tables of several parts of a data set: the hub keeps all in one folder."""
    names = [path.name.partition("-")[0].partition(".")[0] for path in paths]
    splits = sorted({name for name in names if is_split(name)})
    if len(splits) > 1:
        raise ValueError(
            f"{paths[0].parent} holds the parts {', '.join(splits)} of a data set, which would "
            f"become one: move the tables of one of them ({splits[0]}-*.parquet) into a folder of "
            "their own (links will do), and give that"
        )


@contextmanager
def opened_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A .parquet file, which stays open.

    Raises:
        ValueError: pyarrow is missing, or reading fails, inside the `with` too; names the file.
    """
    try:
        import pyarrow
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ValueError(
            f'.parquet needs pyarrow ({error}): pip install "mixflow_fast[data]"'
        ) from None
    try:
        yield pq.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error


class _Tables:
    """The rows of .parquet files; safe to read from several threads.

    Attributes:
        paths: of the files, in order.
        names: of the images: file and row.
        labels: (N,) int64.
        class_names: by the schema's metadata; None if it has none.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self._files: list[pq.ParquetFile] = []
        self._groups: list[tuple[int, int]] = []  # (file, its group) in the order of the rows
        counts, labels, self.names = [], [], []
        for number, path in enumerate(paths):
            with opened_parquet(path) as file:
                labels.append(_labels(file, path))
            self._files.append(file)
            self.names += [f"{path.name}[{row}]" for row in range(file.metadata.num_rows)]
            for group in range(file.num_row_groups):
                self._groups.append((number, group))
                counts.append(file.metadata.row_group(group).num_rows)
        self._ends = list(accumulate(counts))
        self.labels = np.concatenate(labels)
        if not len(self.labels):
            raise ValueError(f"{str(paths[0])!r} has no rows")
        found = {_class_names(file) for file in self._files}
        if len(found) > 1:
            raise ValueError(
                f"the files of {str(paths[0].parent)!r} give the classes different names: they are "
                "of several data sets"
            )
        (self.class_names,) = found
        self._kept: OrderedDict[int, list[bytes | None]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, number: int) -> bytes:
        """An image's file."""
        group = bisect_right(self._ends, number)
        first = self._ends[group - 1] if group else 0
        with self._lock:
            if group not in self._kept:
                self._kept[group] = self._load(group)
                while len(self._kept) > _GROUPS_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            content = self._kept[group][number - first]
        if content is None:
            raise ValueError("its bytes are not in the table, only a path: embed the files")
        return content

    def _load(self, group: int) -> list[bytes | None]:
        number, own = self._groups[group]
        column = self._files[number].read_row_group(own, columns=["image"]).column("image")
        return [None if row is None else row["bytes"] for row in column.to_pylist()]


def _labels(file: pq.ParquetFile, path: Path) -> np.ndarray:
    """(rows,) int64; ValueError for other columns."""
    schema = file.schema_arrow
    names = set(schema.names)
    if not {"image", "label"} <= names or not str(schema.field("image").type).startswith("struct"):
        raise ValueError(
            f"{str(path)!r} must have the columns image (struct of bytes and path) and label, as "
            f"Hugging Face datasets write them, got {schema.names}"
        )
    values = file.read(columns=["label"]).column("label")
    if values.null_count or not str(values.type).startswith(("int", "uint")):
        raise ValueError(f"label of {str(path)!r} must be integers, got {values.type}")
    return values.to_numpy().astype(np.int64)


def _class_names(file: pq.ParquetFile) -> tuple[str, ...] | None:
    """Of the schema's metadata."""
    text = (file.schema_arrow.metadata or {}).get(b"huggingface")
    try:
        names = json.loads(text)["info"]["features"]["label"]["names"]
        return tuple(map(str, names))
    except (ValueError, KeyError, TypeError):
        return None
