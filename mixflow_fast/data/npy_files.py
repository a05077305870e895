"""Readers of .npy, .npz and REPA's dataset.json: without pickle, with errors that name the file.

And the header of a .npy whose rows begin at a page of memory, which numpy itself does not write.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import BadZipFile

from mixflow_fast.files import check_inside

if TYPE_CHECKING:
    import numpy as np
    from numpy.lib.npyio import NpzFile

HEADER_BYTES = 4096


def padded_header(shape: tuple[int, ...], dtype: str) -> bytes:
    """The first HEADER_BYTES of a .npy of version 1.0, padded with blanks.

    Args:
        shape: of the array, in C order.
        dtype: "uint8", "float16", ...
    """
    import numpy as np

    fields = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": tuple(shape)}
    start = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return start + repr(fields).encode("latin1").ljust(HEADER_BYTES - 11) + b"\n"


def open_npz(path: Path) -> NpzFile:
    """The arrays of a .npz by name, each read when it is asked for; to be closed."""
    return _load(path, None)


def _load(path: Path, mmap_mode: Literal["r"] | None) -> np.ndarray | NpzFile:
    import numpy as np

    try:
        # A pickle runs code, and data come from anywhere.
        return np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        if "allow_pickle" in str(error):  # numpy's advice for what is neither .npy nor .npz
            error = ValueError("it is no whole .npy or .npz, or holds Python objects")
        raise ValueError(f"cannot read the arrays of {str(path)!r}: {error}") from error


def load_npy(path: Path) -> np.ndarray:
    """The one array of a .npy, memory-mapped."""
    import numpy as np

    array = _load(path, "r")
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{str(path)!r} must hold one array (.npy), got an archive")
    return array


def read_dataset_json(root: Path) -> dict[str, object]:
    """{file name: label} of `root/dataset.json`, {"labels": [[file, label], ...]}; not empty."""
    index = root / "dataset.json"
    try:
        rows = json.loads(index.read_text())["labels"]
        labels = {str(name): label for name, label in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{str(index)!r} must be {{"labels": [[file, label], ...]}}, got {error!r}'
        ) from error
    if not labels:
        raise ValueError(f"{str(index)!r} lists no sample")
    if len(labels) < len(rows):
        raise ValueError(
            f"{str(index)!r} lists {len(rows) - len(labels)} of its {len(rows)} files twice"
        )
    check_inside(labels, index)
    return labels


def check_listed(root: Path, names: Iterable[str]) -> None:
    """Refuse a dataset.json that lists files which are not there.

    One listing a folder: on a network disk a look at each of a million files takes minutes.

    Args:
        root: folder of the dataset.json.
        names: files that it lists, relative to it.
    """
    by_folder: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        by_folder[os.path.dirname(name)].append(os.path.basename(name))
    listed, missing = 0, []
    for folder, files in by_folder.items():
        try:
            there = set(os.listdir(root / folder))
        except OSError:
            there = set()
        listed += len(files)
        missing += [os.path.join(folder, name) for name in files if name not in there]
    if missing:
        raise ValueError(
            f"{str(root / 'dataset.json')!r} lists {listed:,} files, of which {len(missing):,} are "
            f"not there, such as {missing[0]!r}: copy what is missing, or take it out of the list"
        )
