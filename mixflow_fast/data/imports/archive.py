"""A folder or a zip whose members are read by name."""

from __future__ import annotations

import json
import os
import struct
import threading
import zipfile
from pathlib import Path
from typing import Protocol

from mixflow_fast.files import check_inside

INDEX = "dataset.json"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field


class Archive(Protocol):
    """Files by name.

    Attributes:
        path: of the folder or the zip.
    """

    path: Path

    def names(self) -> list[str]:
        """All files, sorted, with `/` between folders."""
        ...

    def read(self, name: str) -> bytes:
        """Content of a file; safe to call from several threads."""
        ...


def open_archive(path: Path) -> Archive:
    """A folder, or a zip whose members are stored without compression.

    Raises:
        ValueError: neither of them.
    """
    return Folder(path) if path.is_dir() else StoredZip(path)


class Folder:
    """The files of a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """As `Archive.names`; hidden files and folders are passed over."""
        found = []
        for folder, folders, files in os.walk(self.path, followlinks=True):
            folders[:] = [name for name in folders if name[0] != "."]
            below = os.path.relpath(folder, self.path)
            found += [os.path.normpath(os.path.join(below, n)) for n in files if n[0] != "."]
        return sorted(name.replace(os.sep, "/") for name in found)

    def read(self, name: str) -> bytes:
        """As `Archive.read`."""
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {str(self.path / name)!r}: {error}") from error


class StoredZip:
    """A zip without compression, so that a member's bytes lie in the file as they are.

    Raises:
        ValueError: it is no zip, or a member is compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"cannot read the zip {str(path)!r}: {error}") from error
        packed = next((m for m in members if m.compress_type != zipfile.ZIP_STORED), None)
        if packed is not None:
            raise ValueError(
                f"the members of {str(path)!r} must be stored without compression, as EDM2 and "
                f"REPA write them, got {packed.filename!r} compressed: unpack it and give the "
                "folder"
            )
        check_inside((member.filename for member in members), path)
        self._members = {m.filename: (m.header_offset, m.file_size) for m in members}
        self._fd = os.open(path, os.O_RDONLY)
        self._offsets: dict[str, int] = {}
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            os.close(self._fd)

    def names(self) -> list[str]:
        """As `Archive.names`."""
        return sorted(self._members)

    def offset(self, name: str) -> int:
        """The byte of the zip at which a member's content begins.

        The extra field of the local header may be of another length than that of the directory.
        """
        found = self._offsets.get(name)
        if found is None:
            header, _ = self._members[name]
            content = os.pread(self._fd, _LOCAL_HEADER.size, header)
            if len(content) < _LOCAL_HEADER.size or content[:4] != b"PK\x03\x04":
                raise ValueError(f"{str(self.path)!r} is damaged at its member {name!r}")
            _, name_length, extra_length = _LOCAL_HEADER.unpack(content)
            found = header + _LOCAL_HEADER.size + name_length + extra_length
            with self._lock:
                self._offsets[name] = found
        return found

    def read(self, name: str) -> bytes:
        """As `Archive.read`."""
        if name not in self._members:
            raise ValueError(f"{str(self.path)!r} holds no member {name!r}")
        size = self._members[name][1]
        content = os.pread(self._fd, size, self.offset(name))
        if len(content) < size:
            raise ValueError(f"{str(self.path)!r} is cut off at its member {name!r}")
        return content


def read_index(archive: Archive) -> dict[str, int] | None:
    """{file name: label} of an archive's dataset.json; None where its `labels` is null.

    Raises:
        ValueError: no dataset.json, or one of another form.
    """
    where = f"{INDEX} of {str(archive.path)!r}"
    try:
        rows = json.loads(archive.read(INDEX))["labels"]
        if rows is None:
            return None
        labels = {str(name): label for name, label in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{where} must be {{"labels": [[file, label], ...]}}, got {error!r}'
        ) from error
    if len(labels) < len(rows) or not labels:
        raise ValueError(f"{where} must list every file once, got {len(rows)} rows")
    wrong = next((n for n, v in labels.items() if type(v) is not int or v < 0), None)
    if wrong is not None:
        raise ValueError(
            f"{where} must give labels that are integers >= 0, got {labels[wrong]!r} for {wrong!r}"
        )
    check_inside(labels, archive.path / INDEX)
    return labels


def list_files(archive: Archive, no_labels: bool, suffix: str = "") -> dict[str, int]:
    """{file name: label} of an archive's dataset.json, all of which are there; not empty.

    Args:
        archive: the files.
        no_labels: take files without classes (`labels` is null) as one class.
        suffix: of the names of such files.

    Raises:
        ValueError: as `read_index`; no labels; files that are not there.
    """
    where = f"{INDEX} of {str(archive.path)!r}"
    labels, there = read_index(archive), archive.names()
    if labels is None:
        if not no_labels:
            raise ValueError(
                f"{where} has no labels (null): the images were prepared without classes. Give "
                "--no-labels to take them as one class"
            )
        labels = {name: 0 for name in there if name != INDEX and name.endswith(suffix)}
    missing = sorted(labels.keys() - set(there))
    if missing:
        raise ValueError(
            f"{where} lists {len(labels):,} files, of which {len(missing):,} are not there, such "
            f"as {missing[0]!r}: copy what is missing"
        )
    if not labels:
        raise ValueError(f"{str(archive.path)!r} holds no file{suffix and f' *{suffix}'}")
    return labels
