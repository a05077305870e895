"""Pictures in one .npz of any size, written as a stream and read without reading it.

The file is a ZIP that stores its one member, `arr_0.npy`, uint8 (n, H, W, C), with ZIP64's sizes:
byte for byte the member that `np.savez(file, pictures)` writes, and the layout that ADM's
evaluator streams. `np.load` copies a member whole, whatever its mmap_mode, so `map_npz` finds the
bytes in the file and maps them.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path
from types import TracebackType

import numpy as np

MEMBER = "arr_0"
_LOCAL_HEADER = 30  # of a ZIP's member, before its name


class NpzWriter:
    """A new .npz with a member `arr_0` of known shape. Use it as a context manager.

    Args:
        path: the file; it is replaced.
        shape: (n, H, W, C) of all pictures.

    Raises:
        ValueError: at the end, where other than so many bytes were added.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int, int]) -> None:
        self._path, self._left = path, int(np.prod(shape, dtype=np.int64))
        self._file = path.open("wb")
        self._zip = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED, allowZip64=True)
        # A fixed date: the same pictures are the same file.
        member = zipfile.ZipInfo(f"{MEMBER}.npy", date_time=(1980, 1, 1, 0, 0, 0))
        self._member = self._zip.open(member, "w", force_zip64=True)
        header = {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(self._member, header)

    def add(self, pictures: bytes | memoryview) -> None:
        """Append the next bytes, in C order."""
        self._left -= len(pictures)
        self._member.write(pictures)

    def __enter__(self) -> NpzWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._left:
                raise ValueError(f"{self._path}: {self._left} bytes of pictures are lacking")
            if kind is None:
                self._member.close()
                self._zip.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                # So that a check reads the disk and not the memory.
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            # After an error the archive is closed too, or it would complain when it is collected.
            for part in (self._member, self._zip, self._file):
                with contextlib.suppress(OSError, ValueError):
                    part.close()


def map_npz(path: Path, member: str = MEMBER) -> np.ndarray:
    """An array of a .npz, mapped read-only where its member is stored as it is.

    A compressed one is read whole into memory.

    Raises:
        ValueError: no such member, not a .npz, or pickled objects in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(f"{member}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[member])
        with path.open("rb") as file:
            file.seek(info.header_offset)
            header = file.read(_LOCAL_HEADER)
            name, extra = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
            file.seek(info.header_offset + _LOCAL_HEADER + name + extra)
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read(file)
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            order = "F" if fortran else "C"
            return np.memmap(path, dtype, "r", file.tell(), shape, order)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"cannot read {member} of {path}: {error}") from error


def check_npz(path: Path, shape: tuple[int, int, int, int]) -> None:
    """Read a written file again.

    Raises:
        ValueError: its checksum is of another content, or it has another shape.
    """
    with zipfile.ZipFile(path) as archive:
        wrong = archive.testzip()
    found = map_npz(path)
    if wrong is not None or found.shape != tuple(shape) or found.dtype != np.uint8:
        raise ValueError(
            f"{path} does not hold what was written into it ({wrong or found.shape}): the disk or "
            "the memory of this machine is at fault"
        )
