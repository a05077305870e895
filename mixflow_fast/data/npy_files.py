"""Readers of .npy, .npz and REPA's dataset.json: without pickle, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from zipfile import BadZipFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.lib.npyio import NpzFile


def open_npz(path: Path) -> NpzFile:
    """The arrays of a .npz by name, each read when it is asked for; to be closed."""
    return _load(path, None)


def _load(path: Path, mmap_mode: Literal["r"] | None) -> np.ndarray | NpzFile:
    import numpy as np

    try:
        # A pickle runs code, and data come from anywhere.
        return np.load(path, allow_pickle=False, mmap_mode=mmap_mode)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
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
        labels = {str(name): label for name, label in json.loads(index.read_text())["labels"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{str(index)!r} must be {{"labels": [[file, label], ...]}}, got {error!r}'
        ) from error
    if not labels:
        raise ValueError(f"{str(index)!r} lists no sample")
    return labels
