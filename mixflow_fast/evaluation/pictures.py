"""Sets of pictures to be measured: arrays of a .npz, or a folder of image files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.decoding import IMAGE_SUFFIXES, decode_rgb
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.npy_files import load_npy, npz_array, open_npz
from mixflow_fast.files import existing_path

_ROWS = 64


@dataclass(frozen=True)
class Pictures:
    """A set in the order of its ids 0, 1, ...

    Attributes:
        name: its path as it was given.
        count: pictures.
        source: a fingerprint: names, sizes and times of the files.
        labels: (count,) integers, or None.
        batches: gives them as (B, 3, H, W) uint8, from the start at each call.
    """

    name: str
    count: int
    source: str
    labels: np.ndarray | None
    batches: Callable[[], Iterator[Tensor]]


def open_pictures(path: str | os.PathLike[str], size: int | None = None) -> Pictures:
    """A set of pictures, which are read when they are asked for.

    A .npz holds `arr_0`, (N, H, W, 3) uint8, as ADM's evaluator takes it, or `x`, (N, C, H, W)
    uint8 or floating in [-1, 1], as `mixflow-fast sample` writes it; C is 3, or 1 for grey. Floats
    are rounded to floor(clamp(127.5 x + 128, 0, 255)). Labels are `y`, `arr_1` or NAME.labels.npy
    beside it. A folder is searched for image files at any depth, in the order of their paths.

    Args:
        path: .npz or folder.
        size: side in pixels of ADM's centre crop; None: as they are. Of folders only.

    Raises:
        ValueError: nothing there, arrays of another kind, no image files.
    """
    found = existing_path(path)
    if found.is_dir():
        return _folder(found, str(path), size)
    if size is not None:
        raise ValueError(f"{path} has pictures of one size: leave --size out")
    return _arrays(found, str(path))


def _arrays(path: Path, name: str) -> Pictures:
    with open_npz(path) as archive:
        names = set(archive)
        labels = next((archive[key] for key in ("y", "arr_1") if key in names), None)
    key = next((key for key in ("arr_0", "x") if key in names), None)
    if key is None:
        raise ValueError(
            f"{name} must hold arr_0, (N, H, W, 3) uint8, or x, (N, C, H, W), got {sorted(names)}"
        )
    array = npz_array(path, key)
    channels = array.shape[3 if key == "arr_0" else 1] if array.ndim == 4 else 0
    is_pixels = array.dtype == np.uint8 or (key == "x" and array.dtype.kind == "f")
    if channels not in (1, 3) or not is_pixels:
        raise ValueError(
            f"{key} of {name} must be pictures of 3 channels (1: grey), uint8 or, of x, floating "
            f"in [-1, 1], got {array.shape} {array.dtype}: latents have to be decoded first"
        )
    beside = path.with_suffix(".labels.npy")
    if labels is None and beside.exists():
        labels = load_npy(beside)
    if labels is not None and labels.shape != (len(array),):
        raise ValueError(f"labels of {name} must be ({len(array)},), got {labels.shape}")

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(array), _ROWS):
            rows = torch.from_numpy(np.array(array[start : start + _ROWS]))
            rows = rows.permute(0, 3, 1, 2) if key == "arr_0" else _to_bytes(rows)
            yield rows.expand(-1, 3, -1, -1).contiguous()

    return Pictures(name, len(array), _fingerprint([path], path.parent), labels, batches)


def _to_bytes(x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    if not x.isfinite().all():
        raise ValueError("x must be finite, got NaN or infinity")
    return (127.5 * x + 128).clamp(0, 255).floor().to(torch.uint8)


def _folder(path: Path, name: str, size: int | None) -> Pictures:
    if (path / "set.json").exists():
        raise ValueError(f"{name} is a sample set in shards: give the .npz that was made of it")
    files = sorted(
        Path(root) / file
        for root, _, names in os.walk(path)
        for file in names
        if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith(".")
    )
    if not files:
        raise ValueError(f"{name} holds no image files ({', '.join(IMAGE_SUFFIXES)})")

    def batches() -> Iterator[Tensor]:
        for file in files:
            image = decode_rgb(file)
            image = image if size is None else adm_center_crop(image, size)
            yield torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].contiguous()

    source = _fingerprint(files, path) + ("" if size is None else f" cropped to {size}")
    return Pictures(name, len(files), source, None, batches)


def _fingerprint(files: list[Path], root: Path) -> str:
    """Of names, sizes and times: contents of all would take as long as the features."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
