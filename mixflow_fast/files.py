"""Paths that users give, atomic writes of files and folders, and checksums.

All lasting files of this package are written through `replacing`: under another name first, then
flushed to the disk and renamed. An interruption leaves the file that was there before.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_BLOCK = 1 << 20
# Before a hash of the ends of a file alone.
ENDS = "ends "
# The mask can only be read by setting it, which every thread would see: once, at the import.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path that a user means: `~` and `~name` are home folders."""
    return Path(os.path.expanduser(path))


def existing_path(path: str | os.PathLike[str], name: str = "path") -> Path:
    """A path that a user gave, with `~` expanded.

    Args:
        path: as it was given.
        name: what it is called where it was given: an argument, or a setting such as "data.path".

    Raises:
        ValueError: nothing is there; says how far the path exists, and the nearest name.
    """
    given = f"{name} {path}"
    if "://" in str(path):
        raise ValueError(f"{given} is an address on a network: only local files are read")
    found = user_path(path)
    if found.exists():
        return found
    if found.is_symlink():
        raise ValueError(f"{given} is a link to {os.readlink(found)}, which does not exist")
    there = next(parent for parent in found.absolute().parents if parent.is_dir())
    names = os.listdir(there) if there == found.absolute().parent else []
    # Not `did_you_mean`, for which two names with one ending are as good as the same.
    near = difflib.get_close_matches(found.name, names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{given} does not exist: the last folder of it that does is {there}{hint}")


def existing_folder(path: str | os.PathLike[str], wanted: str) -> Path:
    """A folder that a user gave, with `~` expanded.

    Args:
        path: as it was given.
        wanted: what should be there, for the error.

    Raises:
        ValueError: nothing is there, or a file.
    """
    found = existing_path(path, "folder")
    if not found.is_dir():
        raise ValueError(f"{path} is not a folder: give {wanted}")
    return found


def check_inside(names: Iterable[str], listing: Path) -> None:
    """Refuse names of files, read from a file, that would be read from anywhere on the machine.

    A link below the folder may lead out of it: its user has set it.

    Args:
        names: relative to the folder of `listing`.
        listing: the file that holds them.

    Raises:
        ValueError: a name is absolute, or leaves the folder by "..".
    """
    for name in names:
        leaves = ".." in name and os.path.normpath(name).split(os.sep)[0] == os.pardir
        if leaves or os.path.isabs(name):
            raise ValueError(
                f"{listing} names {name!r}, which is not below {listing.parent}: only files of "
                "its own folder are read; put the file or a link to it there"
            )


def check_writable(path: Path, force: bool) -> None:
    """Refuse a file to be written before there is anything to write.

    Args:
        path: the file.
        force: it may replace one that is there.

    Raises:
        ValueError: it is there without `force`, or it could not be written.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: choose a file as --out")
    if path.exists() and not force:
        raise ValueError(f"{path} exists: choose another --out, or replace it with --force")
    _check_place(path, path.absolute().parents, "--out")


def check_folder_writable(path: Path, option: str = "out=") -> None:
    """Refuse a folder to be written into, `out=` of a run, before there is anything to write.

    Args:
        path: the folder; it need not exist.
        option: how the user gave it.

    Raises:
        ValueError: it is a file, or it could not be made or written.
    """
    _check_place(path, (path.absolute(), *path.absolute().parents), option)


def _check_place(path: Path, places: Iterable[Path], option: str) -> None:
    place = next(place for place in places if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        why = "may not be written" if place.is_dir() else "is not a folder"
        if place != path.absolute():
            why = f"cannot be made, because {place} {why}"
        raise ValueError(f"{path} {why}: choose another {option}")


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a name beside `path` for a file or a folder, and renames it to `path` at the end.

    Everything is flushed to the disk before the rename. After an error it is removed, and `path`
    stays as it was. An older folder at `path` is moved aside and removed after the rename. Parent
    folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        for written in (*partial.rglob("*"), partial) if partial.is_dir() else (partial,):
            if written.is_file():
                _usual_mode(written)
            sync(written)
        if partial.is_dir() and path.is_dir():
            # A folder cannot be renamed onto another that is not empty.
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as aside:
                os.replace(path, Path(aside, "old"))
                try:
                    os.replace(partial, path)
                except OSError:
                    os.replace(Path(aside, "old"), path)
                    raise
        else:
            os.replace(partial, path)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # A write says that the disk is full, and not what it wrote.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    sync(path.parent)  # makes the rename itself durable


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Write `json_text` of an object, whole or not at all.

    Raises:
        ValueError: something that JSON cannot hold, NaN and infinity included.
    """
    write_text(path, json_text(obj, Path(path).name))


def json_text(obj: object, name: str = "the record") -> str:
    """Indented JSON and the end of its last line.

    Args:
        obj: plain values.
        name: what it is called in the error.

    Raises:
        ValueError: something that JSON cannot hold, NaN and infinity included.
    """
    # NaN is no JSON: other readers would refuse the whole file.
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: not representable in JSON ({error}); "
            "give plain dicts, lists, strings, finite numbers and None"
        ) from error
    return text + "\n"


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def crc32(path: Path) -> int:
    """CRC-32 of a file's content, read in blocks: it finds damage, not forgery."""
    value, block = 0, memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            value = zlib.crc32(block[:count], value)
    return value


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits, read in blocks."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def ends_digest(path: Path) -> str:
    """`ENDS` and the SHA-256 of a file's size, its first and its last MiB: what tells gigabytes of
    weights from others without reading them.
    """
    size, block = path.stat().st_size, 1 << 20
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(block))
        file.seek(max(0, size - block))
        digest.update(file.read(block))
    return ENDS + digest.hexdigest()


class ChecksummedFile:
    """A file open for writing that knows size and CRC-32 of what went into it.

    The checksum is taken while the content passes, so that nothing is read again for it.

    Args:
        file: a binary file at its start, which is only appended to from here on.

    Attributes:
        bytes: size so far.
        crc32: CRC-32 so far, as `crc32` gives it for the whole file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.bytes = self.crc32 = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append; returns the number of bytes."""
        view = memoryview(data).cast("B")
        # In blocks, which are still in the cache when they are written.
        for start in range(0, len(view), _BLOCK):
            block = view[start : start + _BLOCK]
            self.crc32 = zlib.crc32(block, self.crc32)
            self._file.write(block)
        self.bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Hand what is buffered to the system."""
        self._file.flush()


def remove_partial(folder: Path) -> None:
    """Delete what `replacing` left in a folder when its process was killed."""
    for path in folder.glob(".*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # a process of another user
        return True
    return True


def _usual_mode(path: Path) -> None:
    """Sets the permissions that `open` would have given; safetensors makes its files private."""
    with suppress(OSError):  # a file system that knows no permissions
        os.chmod(path, 0o666 & ~_UMASK)
