"""What sets are measured against: reference files of ADM and EDM2, and our own.

| file | holds |
|---|---|
| ADM .npz | `mu`, `sigma` (pool), `mu_s`, `sigma_s` (spatial), `arr_0`: 10,000 images for precision, recall and KID |
| EDM2 .pkl | {"fid": {"mu", "sigma"}, "fd_dinov2": {"mu", "sigma"}} |
| ours, .npz | `header` (JSON), and `mu/KEY`, `sigma/KEY`, `features/KEY` by feature, such as inception.pool |

Frechet distances go by the stored moments, never by the images. An unknown file is usable; the hash
of its content is what numbers name it by.
"""  # noqa: E501

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from mixflow_fast.data.npy_files import open_npz
from mixflow_fast.evaluation.features.extractor import Features, sha256_of
from mixflow_fast.evaluation.metrics import Gaussian
from mixflow_fast.evaluation.pictures_npz import map_npz
from mixflow_fast.files import existing_path, replacing

KEPT = 10_000  # images whose features are kept for KID, precision and recall
SPLITS = ("train", "val")
_SCHEMA = "mixflow-reference/1"
POOL, SPATIAL, CLASS_TOKEN = "inception.pool", "inception.spatial", "dinov2.cls"
_EDM2 = {"fid": POOL, "fd_dinov2": CLASS_TOKEN}
# What a pickle of numpy arrays is made of, under the names of numpy 1 and 2.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *(("numpy.core.multiarray", name) for name in ("_reconstruct", "scalar")),
    *(("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar")),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


@dataclass(frozen=True)
class Reference:
    """A reference, by features such as "inception.pool".

    Attributes:
        path: the file.
        sha256: of its content.
        gaussians: moments.
        features: (M, d) float32, of images for KID, precision and recall.
        has_images: whether `arr_0` of an ADM file holds images for these three.
        extractors: records of what made the features, where the file says so.
        split: "train" or "val": which images of the data set these are; None where the file does
            not say it, as published ones do not.
    """

    path: Path
    sha256: str
    gaussians: Mapping[str, Gaussian]
    features: Mapping[str, np.ndarray] = field(default_factory=dict)
    has_images: bool = False
    extractors: Sequence[Mapping[str, str | None]] = ()
    split: str | None = None

    @property
    def n(self) -> int | None:
        """Images behind the moments, where the file says so."""
        return next((gaussian.n for gaussian in self.gaussians.values()), None)

    def to_record(self) -> dict[str, str | int | None]:
        """What it is called, and what of it is part of a protocol."""
        return {"name": self.path.name, "sha256": self.sha256, "n": self.n}


def read_reference(path: Path) -> Reference:
    """A reference file of any of the three kinds.

    Raises:
        ValueError: no such file, another kind, a pickle of anything but arrays, moments that do not
            fit each other.
    """
    found = existing_path(path, "reference")
    if not found.is_file():
        raise ValueError(f"the reference {path} is not a file: `mixflow-fast reference` makes one")
    with found.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if not is_zip and found.suffix == ".npz":
        raise ValueError(f"the reference {path} is no ZIP file, as a .npz is: it is damaged")
    return _read_npz(found) if is_zip else _read_pickle(found)


def _read_npz(path: Path) -> Reference:
    with open_npz(path) as arrays:
        names = set(arrays)
        if "header" in names:
            return _read_own(path, arrays)
        pairs = {POOL: ("mu", "sigma"), SPATIAL: ("mu_s", "sigma_s")}
        gaussians = {
            key: _gaussian(path, key, arrays[mu], arrays[sigma])
            for key, (mu, sigma) in pairs.items()
            if mu in names and sigma in names
        }
    if not gaussians:
        raise ValueError(
            f"{path} must be a reference with mu and sigma, got {sorted(names)}: `mixflow-fast "
            "reference` makes one of images"
        )
    return Reference(path, sha256_of(path), gaussians, has_images="arr_0" in names)


def _read_own(path: Path, arrays: Mapping[str, np.ndarray]) -> Reference:
    try:
        header = json.loads(bytes(arrays["header"]))
        if header["schema"] != _SCHEMA:
            raise ValueError(f"schema {header['schema']!r}, expected {_SCHEMA!r}")
        keys, n, extractors = header["features"], header["n"], header["extractors"]
        gaussians = {
            key: _gaussian(path, key, arrays[f"mu/{key}"], arrays[f"sigma/{key}"], n)
            for key in keys
        }
        features = {key: map_npz(path, f"features/{key}") for key in header["kept"]}
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"the reference {path} is damaged: {error!r}") from error
    split = header.get("split")
    return Reference(path, sha256_of(path), gaussians, features, extractors=extractors, split=split)


class _ArraysOnly(pickle.Unpickler):
    """Finds nothing but what numpy arrays are made of: a pickle runs what it finds."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:  # numpy 2's name under numpy 1
            other = module.replace("numpy._core", "numpy.core")
            return getattr(importlib.import_module(other), name)


def _read_pickle(path: Path) -> Reference:
    try:
        with path.open("rb") as file:
            content = _ArraysOnly(file).load()
        found = {key: content[name] for name, key in _EDM2.items() if name in content}
        gaussians = {
            key: _gaussian(path, key, moments["mu"], moments["sigma"])
            for key, moments in found.items()
        }
    # A damaged pickle may raise nearly anything; what it finds is harmless.
    except Exception as error:
        raise ValueError(
            f"{path} must be a .npz, or a .pkl of EDM2 with arrays only: {error}"
        ) from error
    if not gaussians:
        raise ValueError(f"{path} holds none of {', '.join(_EDM2)}")
    return Reference(path, sha256_of(path), gaussians)


def _gaussian(
    path: Path, key: str, mean: np.ndarray, cov: np.ndarray, n: int | None = None
) -> Gaussian:
    mean, cov = (np.asarray(value, np.float64) for value in (mean, cov))
    if mean.ndim != 1 or cov.shape != 2 * mean.shape:
        raise ValueError(
            f"{path} must have a mean (d,) and a covariance (d, d) of {key}, got {mean.shape} and "
            f"{cov.shape}"
        )
    return Gaussian(torch.from_numpy(mean), torch.from_numpy(cov), n)


def write_reference(
    path: Path,
    features: Iterable[Features],
    description: str,
    keep: int = KEPT,
    split: str | None = None,
) -> None:
    """Write our own reference file, whole or not at all.

    Args:
        path: the .npz.
        features: of one set of images by one or several extractors.
        description: what the images are.
        keep: images, evenly over the set, of which features are kept for KID, precision and recall.
        split: one of SPLITS, which images of their data set these are; None: nobody says.

    Raises:
        ValueError: sets of different sizes, or fewer than two images; an unknown split.
    """
    if split not in (*SPLITS, None):
        raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, got {split!r}")
    sets = list(features)
    sizes = {len(each) for each in sets}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(f"a reference needs sets of one size of at least 2, got {sorted(sizes)}")
    count = sizes.pop()
    chosen = np.arange(min(keep, count)) * count // max(min(keep, count), 1)
    arrays: dict[str, np.ndarray] = {}
    keys: list[str] = []
    kept: list[str] = []
    for each in sets:
        for output, array in each.arrays.items():
            key = f"{each.extractor.name}.{output}"
            if output == "logits":
                continue  # of an Inception Score, which has no reference
            own = Gaussian.of(np.asarray(array))
            arrays |= {f"mu/{key}": own.mean.numpy(), f"sigma/{key}": own.cov.numpy()}
            keys.append(key)
            if len(chosen) and output != "spatial":
                arrays[f"features/{key}"] = np.asarray(array[chosen])
                kept.append(key)
    header = {
        "schema": _SCHEMA,
        "n": count,
        "features": keys,
        "kept": kept,
        "extractors": [each.extractor.to_record() for each in sets],
        "images": description,
        **({} if split is None else {"split": split}),
    }
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
