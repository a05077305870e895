"""The files of a whole set: all pictures in one, the labels, and `set.json`, which names them.

They are written under dotted names and read again; `set.json` comes next, and then they get their
names. So what a kill leaves is a set that is not whole, or one whose renaming is gone on with.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mixflow_fast.data.preparation.shard_work import named_errors
from mixflow_fast.data.set_files import file_record
from mixflow_fast.evaluation.pictures_npz import NpzWriter, check_npz
from mixflow_fast.files import sync, write_json

FORMAT, SET = "mixflow-samples/1", "set.json"
_BLOCK = 1 << 20


def npz_of(folder: Path) -> Path:
    """Where the pictures of a set come to lie: beside its folder."""
    return folder.with_name(folder.name + ".npz")


def labels_of(folder: Path) -> Path:
    """Where the labels of a set come to lie: beside its folder."""
    return folder.with_name(folder.name + ".labels.npy")


class DamagedShard(Exception):
    """A finished shard whose content is not what was noted."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def write_whole(
    folder: Path,
    shape: tuple[int, int, int, int],
    header: Mapping[str, object],
    records: list[dict[str, object]],
) -> None:
    """Write the file of all pictures and that of the labels, check them, then `set.json`.

    Args:
        folder: of the set.
        shape: (n, H, W, C) of all pictures.
        header: what `set.json` begins with.
        records: of the shards, in order; what they note is put into `set.json`.

    Raises:
        DamagedShard: the content of one is not what was noted.
    """
    npz, labels = npz_of(folder), labels_of(folder)
    partial = partial_of(npz)
    try:
        with named_errors(npz), NpzWriter(partial, shape) as writer:
            for number, record in enumerate(records):
                _copy_shard(folder / str(record["file"]), record, number, writer)
        check_npz(partial, shape)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    files = {"npz": npz}
    drawn = [label for record in records for label in record.pop("labels")]
    if drawn:
        with named_errors(labels), partial_of(labels).open("wb") as file:
            np.save(file, np.array(drawn, dtype=np.int64))
        sync(partial_of(labels))
        files["labels"] = labels
    found = {}
    for name, path in files.items():
        record = file_record(folder.parent, partial_of(path).name)
        found[name] = {"path": path.name, "bytes": record["bytes"], "sha256": record["sha256"]}
    shards = [{"name": record.pop("file"), **record} for record in records]
    write_json(folder / SET, {**header, "shards": shards, **found})


def _copy_shard(path: Path, record: Mapping[str, object], number: int, writer: NpzWriter) -> None:
    """Append a shard's pictures while its checksum is taken."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            file.seek(0)
            digest.update(file.read(start))
            # A damaged one may be too long: the writer counts what it gets.
            left = int(str(record["bytes"])) - start
            while block := file.read(min(left, _BLOCK)):
                digest.update(block)
                writer.add(block)
                left -= len(block)
    except (OSError, ValueError) as error:
        raise DamagedShard(number) from error
    if left or digest.hexdigest() != record["sha256"]:
        raise DamagedShard(number)


def partial_of(path: Path) -> Path:
    """The name of a file until `set.json` is there."""
    return path.with_name(f".{path.name}.partial")


def finish_renaming(folder: Path) -> None:
    """Bring the files that `set.json` names to their places.

    Raises:
        ValueError: one is gone, or another file lies there.
    """
    content = read_set_json(folder / SET)
    for record in (content[key] for key in ("npz", "labels") if key in content):
        path = folder.parent / Path(str(record["path"])).name
        with contextlib.suppress(FileNotFoundError):  # another process was as quick
            if not path.exists():
                os.replace(partial_of(path), path)
                sync(path.parent)
        if path.is_file() and path.stat().st_size == record["bytes"]:
            continue
        state = "has another size than" if path.exists() else "is gone, which"
        raise ValueError(
            f"{path} {state} {folder / SET} says: put it back, or delete {folder} and what lies "
            "beside it under its name to make the set again"
        )


def read_set_json(path: Path) -> dict[str, dict[str, object]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} must be the {SET} of a set of samples, of format {FORMAT}")
    return content
