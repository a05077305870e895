"""Sets of pictures to be measured: a set made here, a .npz, or a folder of image files."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.decoding import IMAGE_SUFFIXES, decode_rgb, opened
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.npy_files import load_npy, open_npz
from mixflow_fast.data.set_files import WORK
from mixflow_fast.evaluation.pictures_npz import map_npz
from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.sample_sets import SET, SampleSet, read_set
from mixflow_fast.files import existing_path, write_json
from mixflow_fast.models.autoencoders.decoding import quantise

_ROWS = 64
_CONTENT = "pictures.json"  # beside the features
# Networks overshoot a little; latents have a standard deviation of 1, and 13% of a normal
# distribution are beyond 1.5.
_FAR, _FAR_SHARE, _ENOUGH = 1.5, 0.05, 1000


@dataclass(frozen=True)
class Content:
    """What pictures are, whatever their files are called.

    Attributes:
        sha256: of an array's shape, type and bytes, or of the bytes of all image files in order.
        size: (height, width) in pixels; None where they differ.
    """

    sha256: str
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Pictures:
    """A set in the order of its ids 0, 1, ...

    Attributes:
        name: its path as it was given.
        count: pictures.
        source: a fingerprint: names, sizes and times of the files.
        labels: (count,) integers, or None.
        batches: gives them as (B, 3, H, W) uint8, from the start at each call.
        content: what they are by their content, which is read for it.
        quantisation: the rule that made bytes of floats; "unknown" where they came as bytes.
        protocol: how they came about, as they say themselves; None where they do not, and then
            `protocol_of` gives one.
        origin: which weights, as plain values; empty where nothing says it.
    """

    name: str
    count: int
    source: str
    labels: np.ndarray | None
    batches: Callable[[], Iterator[Tensor]]
    content: Callable[[], Content]
    quantisation: str = "unknown"
    protocol: Protocol | None = None
    origin: Mapping[str, object] = field(default_factory=dict)


def open_pictures(path: str | os.PathLike[str], size: int | None = None) -> Pictures:
    """A set of pictures, which are read when they are asked for.

    A set of `mixflow-fast sample --out FOLDER` is given by its folder or its .npz. Any other .npz
    holds `arr_0`, (N, H, W, C) uint8, as ADM's evaluator takes it, or `x`, (N, C, H, W) uint8 or
    floating in [-1, 1], as `mixflow-fast sample` writes it; C is 3, or 1 for grey. Floats become
    bytes by the rule "round" of `quantise`. Labels are `y`, `arr_1` or NAME.labels.npy beside it.
    Any other folder is searched for image files at any depth, in the order of their paths.

    Args:
        path: a set, a .npz, or a folder of images.
        size: side in pixels of ADM's centre crop; None: as they are. Of image files only.

    Raises:
        ValueError: nothing there, arrays of another kind, no image files, an unfinished set.
    """
    found = existing_path(path)
    is_set = any((found / name).exists() for name in (SET, WORK))
    if found.is_dir() and not is_set:
        return _folder(found, str(path), size)
    if size is not None:
        raise ValueError(f"{path} has pictures of one size: leave --size out")
    return _arrays(found, str(path))


def protocol_of(pictures: Pictures, kept: Path | None = None) -> Protocol:
    """How pictures came about: as they say, or else all that is known of those of unknown origin.

    The latter have their content in their protocol, so that numbers of them are of one protocol
    with numbers of the same pictures and with nothing else.

    Args:
        pictures: a set.
        kept: folder where the hash of the content is kept, and taken from again; None: nowhere.
    """
    if pictures.protocol is not None:
        return pictures.protocol
    content = _kept_content(pictures, kept)
    size: object = None if content.size is None else list(content.size)
    if content.size is not None and content.size[0] == content.size[1]:
        size = content.size[0]
    return Protocol(
        {
            "sampler": {"method": "unknown"},
            "set": {"n": pictures.count, "sha256": content.sha256},
            "image": {"size": size, "quantisation": pictures.quantisation},
        }
    )


def _kept_content(pictures: Pictures, folder: Path | None) -> Content:
    if folder is None:
        return pictures.content()
    file = folder / _CONTENT
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["source"] == pictures.source:
            size = None if kept["size"] is None else tuple(kept["size"])
            return Content(kept["sha256"], size)
    found = pictures.content()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, {"source": pictures.source, "sha256": found.sha256, "size": found.size})
    return found


def _arrays(path: Path, name: str) -> Pictures:
    names = set()
    labels = None
    if path.is_file():
        with open_npz(path) as archive:
            names = set(archive)
            labels = next((archive[key] for key in ("y", "arr_1") if key in names), None)
        if not names & {"arr_0", "x"}:
            raise ValueError(
                f"{name} must hold arr_0, (N, H, W, 3) uint8, or x, (N, C, H, W), got "
                f"{sorted(names)}"
            )
    if "x" in names and "arr_0" not in names:
        return _planes(path, name, labels)
    made = read_set(path)
    if made.labels is not None:
        labels = made.labels
    path = made.path
    _check_count(made, name)

    def batches() -> Iterator[Tensor]:
        for rows in made.batches(_ROWS):
            yield rows.expand(-1, 3, -1, -1).contiguous()

    source = _fingerprint([path], path.parent)
    labels = _labels(path, name, len(made), labels)

    def content() -> Content:
        return Content(_array_sha256(made.pictures), made.pictures.shape[1:3])

    return Pictures(
        name,
        len(made),
        source,
        labels,
        batches,
        content,
        protocol=made.protocol,
        origin=made.origin,
    )


def _check_count(made: SampleSet, name: str) -> None:
    section = made.protocol.record.get("set") if made.protocol is not None else None
    wanted = section.get("n") if isinstance(section, Mapping) else None
    if wanted is not None and wanted != len(made):
        raise ValueError(
            f"{name} holds {len(made):,} pictures, and its protocol says {wanted}: make it again"
        )


def _planes(path: Path, name: str, labels: np.ndarray | None) -> Pictures:
    """Of `x`, (N, C, H, W)."""
    array = map_npz(path, "x")
    channels = array.shape[1] if array.ndim == 4 else 0
    if channels not in (1, 3) or not (array.dtype == np.uint8 or array.dtype.kind == "f"):
        raise ValueError(
            f"x of {name} must be pictures of 3 channels (1: grey), uint8 or floating in [-1, 1], "
            f"got {array.shape} {array.dtype}: latents have to be decoded first"
        )
    if array.dtype != np.uint8:
        _refuse_latents(array, name)

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(array), _ROWS):
            rows = torch.from_numpy(np.array(array[start : start + _ROWS]))
            rows = rows if rows.dtype == torch.uint8 else quantise(rows)
            yield rows.expand(-1, 3, -1, -1).contiguous()

    def content() -> Content:
        return Content(_array_sha256(array), array.shape[2:])

    source = _fingerprint([path], path.parent)
    labels = _labels(path, name, len(array), labels)
    rule = "unknown" if array.dtype == np.uint8 else "round"
    return Pictures(name, len(array), source, labels, batches, content, rule)


def _refuse_latents(array: np.ndarray, name: str) -> None:
    """Refuse floats that are no pictures in [-1, 1], looking at some; NaN is refused later."""
    some = np.asarray(array[:: max(1, len(array) // _ROWS)], np.float32)
    outside = float((np.abs(some) > _FAR).mean()) if some.size else 0.0
    if some.size >= _ENOUGH and outside > _FAR_SHARE:
        raise ValueError(
            f"x of {name} must be pictures in [-1, 1], and {100 * outside:.0f}% of its values are "
            f"beyond {_FAR:g}: latents have to be decoded first (`mixflow-fast sample --decoder`); "
            "pictures are better given in 8 bits (`mixflow-fast sample --quantise round`)"
        )


def _labels(path: Path, name: str, count: int, labels: np.ndarray | None) -> np.ndarray | None:
    beside = path.with_suffix(".labels.npy")
    if labels is None and beside.exists():
        labels = load_npy(beside)
    if labels is not None and labels.shape != (count,):
        raise ValueError(f"labels of {name} must be ({count},), got {labels.shape}")
    return labels


def _folder(path: Path, name: str, size: int | None) -> Pictures:
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

    def content() -> Content:
        digest, sizes = hashlib.sha256(), set()
        for file in files:
            data = file.read_bytes()
            digest.update(len(data).to_bytes(8, "little") + data)
            with opened(io.BytesIO(data)) as image:  # its header alone
                width, height = image.size
            sizes.add((height, width) if size is None else (size, size))
        words = "" if size is None else f" cropped to {size}"
        own = hashlib.sha256(digest.digest() + words.encode()).hexdigest()
        return Content(own, sizes.pop() if len(sizes) == 1 else None)

    source = _fingerprint(files, path) + ("" if size is None else f" cropped to {size}")
    return Pictures(name, len(files), source, None, batches, content)


def _array_sha256(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}\n".encode())
    for start in range(0, len(array), _ROWS):
        digest.update(np.ascontiguousarray(array[start : start + _ROWS]).data)
    return digest.hexdigest()


def _fingerprint(files: list[Path], root: Path) -> str:
    """Of names, sizes and times: contents of all would take as long as the features."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
