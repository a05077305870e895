"""Sets of data made here: a folder of shards whose `manifest.json` is written last.

Its presence means that the set is whole. It lists every file with size and SHA-256; what the
examples are is a matter of the format (`mixflow-images/1`, `mixflow-latents/1`), unknown here:

```
manifest.json   format, ..., shards: [{file, rows, bytes, sha256}], files: [{file, bytes, sha256}],
                checksum: SHA-256 of all the rest
work.json       settings and number of shards of the command that makes it, while it is not whole
                and after it (`preparation/shard_work.py`)
done/           a small file for each finished shard
```
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixflow_fast.files import check_inside, write_json

MANIFEST, WORK, DONE = "manifest.json", "work.json", "done"
_BLOCK = 1 << 20
# How one comes by a set of a format.
_WAYS = {
    "mixflow-images": "give images, which `mixflow-fast data prepare` makes",
    "mixflow-latents": "give latents, which `mixflow-fast data encode` makes of prepared images",
    "mixflow-captioned": "give a cache of text-to-image, which `mixflow-fast encode` makes",
}


def write_manifest(root: Path, manifest: Mapping[str, object]) -> None:
    """Write `manifest.json`, whole or not at all; every file that it lists must be there before.

    Args:
        root: folder of the set.
        manifest: plain values; `checksum` is added.
    """
    write_json(root / MANIFEST, {**manifest, "checksum": _checksum(manifest)})


def read_manifest(root: Path, format_: str) -> dict[str, object]:
    """The manifest of a whole set.

    Args:
        root: folder of the set.
        format_: such as "mixflow-images/1".

    Raises:
        ValueError: no manifest (says how far the set is, and how it is finished), damaged, or of
            another format or version.
    """
    if not (root / MANIFEST).is_file():
        if progress := how_far(root):
            raise ValueError(
                f"{root} is not complete: {progress[0]} of {progress[1]} shards are done; run the "
                "command that makes it once more, which goes on from there"
            )
        raise ValueError(
            f"{root} holds no {MANIFEST}: it is no set that `mixflow-fast data` has made (prepare "
            "makes one of images, encode one of latents, import one of other programs' files)"
        )
    manifest = _load(root / MANIFEST)
    found = manifest.get("format")
    if found != format_:
        same = str(found).rpartition("/")[0] == format_.rpartition("/")[0]
        reason = (
            "it was made by another version of mixflow-fast: make it again, or use that version"
            if same
            else _WAYS.get(format_.rpartition("/")[0], "give a set of the expected format")
        )
        raise ValueError(f"{root} has the format {found!r}, expected {format_!r}: {reason}")
    if manifest.get("checksum") != _checksum(manifest):
        raise ValueError(
            f"{root / MANIFEST} is damaged or was edited: its checksum is of another content. "
            "Delete it and run the command that made the set once more, which writes it again"
        )
    return manifest


def set_format(root: Path) -> str | None:
    """The format of a whole set, such as "mixflow-images/1"; None for anything else.

    Raises:
        ValueError: its manifest cannot be read.
    """
    if not (root / MANIFEST).is_file():
        return None
    found = _load(root / MANIFEST).get("format")
    return found if isinstance(found, str) else None


def how_far(root: Path) -> tuple[int, int] | None:
    """(shards done, shards in all) of a set in the making; None where none is being made."""
    try:
        begun = json.loads((root / WORK).read_text(encoding="utf-8"))
        total, sets = begun["shards"], begun.get("sets")
        if isinstance(sets, dict):  # a folder of sets, {name: its shards}
            return sum(_done_in(root / name) for name in sets), sum(sets.values())
        return (_done_in(root), total) if isinstance(total, int) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _done_in(root: Path) -> int:
    """How many shards of a set are done; 0 where it was not begun."""
    try:
        return sum(name.endswith(".done.json") for name in os.listdir(root / DONE))
    except FileNotFoundError:
        return 0


def listed_files(manifest: Mapping[str, object]) -> list[dict[str, object]]:
    """The records {file, bytes, sha256, ...} of all files of a set, shards first.

    Raises:
        ValueError: the manifest lists none, or names outside of its folder.
    """
    records: list[dict[str, object]] = []
    for key in ("shards", "files"):
        rows = manifest.get(key)
        if not isinstance(rows, list) or not all(
            isinstance(row, dict) and {"file", "bytes", "sha256"} <= row.keys() for row in rows
        ):
            raise ValueError(
                f"{MANIFEST} must list {key} as [{{file, bytes, sha256}}, ...], got {rows!r:.80}"
            )
        records += rows
    return records


def all_files(root: Path, manifest: Mapping[str, object]) -> list[dict[str, object]]:
    """As `listed_files`, with those of the sets below the folder whose manifests are listed.

    Raises:
        ValueError: as `listed_files`, of the folder's own manifest.
    """
    records = listed_files(manifest)
    for record in listed_files(manifest):
        folder, _, name = str(record["file"]).rpartition("/")
        if name == MANIFEST and folder:
            # One that cannot be read has another hash than is listed: that is what is told.
            with contextlib.suppress(ValueError):
                inner = listed_files(_load(root / folder / MANIFEST))
                records += [row | {"file": f"{folder}/{row['file']}"} for row in inner]
    return records


def check_sizes(root: Path, manifest: Mapping[str, object]) -> None:
    """Refuse a set of which a file is missing or has another size; reads no content.

    Raises:
        ValueError: names the first such file and both sizes.
    """
    records = listed_files(manifest)
    check_inside((str(record["file"]) for record in records), root / MANIFEST)
    for record in records:
        if fault := _size_fault(root, record):
            raise ValueError(
                f"{root} is damaged: {fault}. Run `mixflow-fast data verify {root}` for all that "
                "is; the command that made the set makes what is missing again"
            )


def verify(
    root: Path, threads: int = 0, progress: Callable[[int], None] | None = None
) -> list[str]:
    """Hash all files of a whole set, and of those in it.

    Args:
        root: folder of the set.
        threads: how many files are read at a time; 0: one a core.
        progress: called with the bytes that were read since its last call, from any thread.

    Returns:
        a line for each file that is missing or damaged; empty where the set is whole.

    Raises:
        ValueError: the manifest cannot be read, or the set has none.
    """
    records = all_files(root, read_manifest(root, set_format(root) or ""))
    check_inside((str(record["file"]) for record in records), root / MANIFEST)

    def fault(record: Mapping[str, object]) -> str:
        found = _size_fault(root, record)
        if not found:
            digest = sha256_of(root / str(record["file"]), progress)
            if digest != record["sha256"]:
                found = (
                    f"{record['file']} has the SHA-256 {digest}, expected {record['sha256']}: its "
                    "content has changed"
                )
        return found

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        return [line for line in pool.map(fault, records) if line]


def total_bytes(manifest: Mapping[str, object]) -> int:
    """Size of all files of a set."""
    return bytes_of(listed_files(manifest))


def bytes_of(records: Iterable[Mapping[str, object]]) -> int:
    """Size of files by their records."""
    return sum(int(str(record["bytes"])) for record in records)


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's content as 64 hexadecimal digits, read in blocks.

    Of a folder it is that of the lines "digest  name" of its files, as `sha256sum` prints them.
    """
    if path.is_dir():
        return folder_digest(
            {f.relative_to(path).as_posix(): sha256_of(f, progress) for f in _in(path)}
        )
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if progress is not None:
                progress(count)
    return digest.hexdigest()


def folder_digest(digests: Mapping[str, str]) -> str:
    """SHA-256 of a folder by those of its files, as `sha256_of` gives it."""
    by_path = sorted(digests.items(), key=lambda item: Path(item[0]))
    lines = "".join(f"{digest}  {name}\n" for name, digest in by_path)
    return hashlib.sha256(lines.encode()).hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(map(os.path.getsize, _in(path))) if path.is_dir() else os.path.getsize(path)


def _in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def file_record(root: Path, name: str) -> dict[str, object]:
    """The record {file, bytes, sha256} of a file of a set, or of a folder of such."""
    path = root / name
    return {"file": name, "bytes": size_of(path), "sha256": sha256_of(path)}


def _size_fault(root: Path, record: Mapping[str, object]) -> str:
    """What is wrong with a file at first sight; "" where nothing is."""
    try:
        size = size_of(root / str(record["file"]))
    except OSError as error:
        path = root / str(record["file"])
        link = f"; it is a link to {os.readlink(path)}" if path.is_symlink() else ""
        return f"{record['file']} cannot be read ({error.strerror}){link}"
    if size != record["bytes"]:
        return f"{record['file']} has {size:,} bytes, expected {record['bytes']:,}"
    return ""


def _load(path: Path) -> dict[str, object]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(manifest).__name__}")
    return manifest


def _checksum(manifest: Mapping[str, object]) -> str:
    """SHA-256 of a manifest's values, however they are written down."""
    plain = {key: value for key, value in manifest.items() if key != "checksum"}
    text = json.dumps(plain, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
