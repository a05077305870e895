"""Recognises data of other formats and folders of another kind, to name them and the next step.

Nothing here is read as data; it only finishes the sentence of an error.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixflow_fast.data.decoding import IMAGE_SUFFIXES, OTHER_IMAGE_SUFFIXES

Kind = Literal["folder", "latents"]
_SPLIT = re.compile(
    r"(train|training|val|valid|validation|test|testing|dev|heldout|held-out)([-_ ]?\d+k?)?",
    re.IGNORECASE,
)
_FOLDERS_LOOKED_INTO = 3
_LOOKED_AT = 10_000  # entries of one folder: enough to see what it is
# As .npy, which is mapped: of an .npz each rank would hold a copy in memory.
_TO_NPY = (
    "write them as set.npy, (N, C, H, W) float16 or float32, and set_labels.npy beside it, (N,) "
    "integers, and give set.npy with data.kind=latents"
)
_TO_FOLDERS = "into class folders, PATH/<class>/<image>, and give PATH with data.kind=folder"
_WEBDATASET = "read .tar shards of images with data.kind=webdataset (.tar.gz are to be unpacked)"
_IMPORT = "`mixflow-fast data import PATH --out DIR` makes a set of it"
_PARQUET = (
    "`mixflow-fast data import PATH --size S --out DIR` makes a set of the images of .parquet"
)
_ARROW = f"write them as .parquet (`Dataset.to_parquet`): {_PARQUET}"


def is_split(name: str) -> bool:
    """Whether a folder's name is that of a part of a data set: train, val, test2017."""
    return _SPLIT.fullmatch(name) is not None


def describe_foreign(root: Path, kind: Kind) -> str:
    """What a path holds that a dataset of this kind does not read, and what to do.

    Args:
        root: an existing file or folder.
        kind: of the dataset that was asked for.

    Returns:
        "it holds .tar shards (webdataset): unpack them ..."; "" where nothing is recognised.
    """
    look = _Look.at(root)
    return next((words for rule in _RULES if (words := rule(look, kind))), "")


@dataclass(frozen=True)
class _Look:
    """What a path holds at first sight.

    Attributes:
        root: the path.
        files, folders: names directly in it (of a file: its own name).
        below: names of the files in the first folders of it.
    """

    root: Path
    files: tuple[str, ...]
    folders: tuple[str, ...]
    below: tuple[str, ...]

    @classmethod
    def at(cls, root: Path) -> _Look:
        if not root.is_dir():
            return cls(root, (root.name,), (), ())
        files, folders = _names(root)
        below = [n for name in folders[:_FOLDERS_LOOKED_INTO] for n in _names(root / name)[0]]
        return cls(root, tuple(files), tuple(folders), tuple(below))

    def named(self, *suffixes: str) -> list[str]:
        """Files with one of these endings, in it or in its first folders."""
        return [n for n in (*self.files, *self.below) if n.lower().endswith(suffixes)]

    def first(self, suffix: str) -> Path | None:
        """A file with this ending."""
        direct = sorted(name for name in self.files if name.lower().endswith(suffix))
        if not direct:
            return None
        return self.root / direct[0] if self.root.is_dir() else self.root


def _names(folder: Path) -> tuple[list[str], list[str]]:
    """Names of (files, folders), sorted, without hidden ones."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry, _ in zip(entries, range(_LOOKED_AT), strict=False):
                if entry.name[0] != ".":
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError:  # it may not be listed: then it is not recognised
        return [], []
    return sorted(files), sorted(folders)


def _run(look: _Look, kind: Kind) -> str:
    if "config.yaml" in look.files and "checkpoints" in look.folders:
        return "it is the folder of a run (out=), not data: its weights go to train.init"
    return ""


def _set(look: _Look, kind: Kind) -> str:
    """What `mixflow-fast data` has made; incomplete ones have work.json alone."""
    if not {"manifest.json", "work.json"} & set(look.files) or "done" not in look.folders:
        return ""
    if "images" in look.folders:
        return (
            "it is a set in REPA's layout, for REPA's code: `mixflow-fast data import` reads its "
            "folder `images`"
        )
    found = "latents" if "moments" in look.folders else "images"
    return f"it is a set that `mixflow-fast data` makes: read it with data.kind={found}"


def _weights(look: _Look, kind: Kind) -> str:
    if "model_index.json" in look.files or any(
        name.startswith(("diffusion_pytorch_model", "model.safetensors", "pytorch_model"))
        for name in look.files
    ):
        return (
            "it is a folder of a model's weights (diffusers, transformers), not data: weights go "
            "to train.init or teacher.path"
        )
    return ""


def _safetensors(look: _Look, kind: Kind) -> str:
    file = look.first(".safetensors")
    if file is None:
        return ""
    keys = _safetensors_keys(file)
    if "latents" in keys:
        return f"it holds LightningDiT's latents ({file.name} with {', '.join(sorted(keys))}): " + (
            f"{_IMPORT}"
        )
    return "it holds .safetensors, which are read as weights (train.init), not as data"


def _safetensors_keys(file: Path) -> list[str]:
    """Names of the tensors, from the header; none where it is damaged."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(size, 1 << 20)))
        return [key for key in header if key != "__metadata__"]
    except (OSError, ValueError, struct.error, TypeError):
        return []


def _packed(look: _Look, kind: Kind) -> str:
    for words, suffixes, step in (
        (".tar shards (webdataset)", (".tar", ".tgz", ".tar.gz"), _WEBDATASET),
        (
            "a zip archive",
            (".zip",),
            f"if it is REPA's or EDM2's (with dataset.json), {_IMPORT}; else unpack {_TO_FOLDERS}",
        ),
        ("TFRecords", (".tfrecord", ".tfrecords", ".tfrec"), f"write images {_TO_FOLDERS}"),
        ("tables (parquet; Hugging Face datasets)", (".parquet",), _PARQUET),
        ("tables (arrow; Hugging Face datasets)", (".arrow",), _ARROW),
        ("an LMDB", (".mdb", ".lmdb"), f"write images {_TO_FOLDERS}, or latents: {_TO_NPY}"),
        ("torch tensors (.pt)", (".pt", ".pth"), _TO_NPY),
        ("pickles", (".pkl", ".pickle"), _TO_NPY),
        ("HDF5", (".h5", ".hdf5"), _TO_NPY),
    ):
        if look.named(*suffixes):
            return f"it holds {words}: {step}"
    if any(re.search(r"-\d{5}-of-\d{5}$", name) for name in look.files):
        return f"it holds TFRecords: write images {_TO_FOLDERS}"
    if {"dataset_dict.json", "dataset_info.json"} & set(look.files):
        return f"it is a folder of Hugging Face datasets: {_ARROW}"
    return ""


def _one_level_too_high(look: _Look, kind: Kind) -> str:
    """Latents whose folder is below, such as those of REPA's preprocessing."""
    if kind == "folder":
        return ""
    layouts = {"dataset.json", "latents.npy", "x.npy", "moments.npy"}
    inner = [name for name in look.folders if layouts & set(_names(look.root / name)[0])]
    if not inner:
        return ""
    with_images = f" data.images={look.root / 'images'}" if "images" in inner else ""
    chosen = next((name for name in inner if name != "images"), inner[0])
    listed = ", ".join(inner)
    return f"its folders do ({listed}): set data.path={look.root / chosen}{with_images}"


def _other_kind(look: _Look, kind: Kind) -> str:
    arrays, images = look.named(".npy", ".npz"), look.named(*IMAGE_SUFFIXES)
    if kind == "folder" and arrays and not images:
        return f"it holds arrays ({arrays[0]}): latents are read with data.kind=latents"
    if kind == "latents" and images and not arrays:
        if not look.root.is_dir():
            return "it is one image: images in class folders are read with data.kind=folder"
        return (
            f"it holds images ({images[0]}): class folders of images are read with "
            "data.kind=folder, by a model of pixels; for a model of latents make some of them "
            "first, by `mixflow-fast data prepare` and `mixflow-fast data encode`"
        )
    return ""


def _images(look: _Look, kind: Kind) -> str:
    """Images that are not in class folders."""
    if kind != "folder" or look.folders:
        return ""
    found = [name for name in look.files if name.lower().endswith(IMAGE_SUFFIXES)]
    if not look.root.is_dir():
        words = "one image" if found else "a file"
        return f"it is {words}: give the folder of the class folders"
    if found:
        return (
            f"it holds {len(found)} images directly: move them {_TO_FOLDERS} (one class: "
            "PATH/all/<image>)"
        )
    return ""


def _empty(look: _Look, kind: Kind) -> str:
    return "" if look.files or look.folders else "it is empty"


def describe_suffixes(passed_over: Counter[str]) -> str:
    """ "12 (.gif 10, .txt 2)", the most frequent first."""
    parts = [f"{suffix or 'without a suffix'} {n:,}" for suffix, n in passed_over.most_common(5)]
    return f"{passed_over.total():,} ({', '.join(parts)})"


def other_images(passed_over: Counter[str]) -> bool:
    """Whether images of a format that is not read are among files that were passed over."""
    return any(suffix in OTHER_IMAGE_SUFFIXES for suffix in passed_over)


_RULES: tuple[Callable[[_Look, Kind], str], ...] = (
    _run,
    _set,
    _weights,
    _safetensors,
    _packed,
    _one_level_too_high,
    _other_kind,
    _images,
    _empty,
)
