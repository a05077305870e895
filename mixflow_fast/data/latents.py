"""Latents that an autoencoder computed before, in arrays or in one file a sample.

The folder of files is that of REPA's preprocessing: float32 [8, h, w] = mean | std per image,
beside a dataset.json.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices
from mixflow_fast.data.foreign import describe_foreign
from mixflow_fast.data.latent_statistics import Statistics
from mixflow_fast.data.npy_files import check_listed, load_npy, open_npz, read_dataset_json
from mixflow_fast.data.paired_images import PairedImages, numbered
from mixflow_fast.data.summary import DataSummary, digest_of, sample_rows
from mixflow_fast.files import existing_path
from mixflow_fast.kernels.philox import Stream, normal

if TYPE_CHECKING:
    import numpy as np

_LOOKED_INTO = 64  # rows of each array whose content is in the fingerprint
_MEASURED = 256  # examples that mean and std are of
_PASS_MOMENTS = "pass moments=True (data.moments=true)"


class Latents:
    """Precomputed latents, in one of three layouts.

    * `set.npz`: arrays `latents` or `x` (or `moments`), `labels` or `y`, and maybe `features`; held
      in memory.
    * `set.npy`, memory-mapped, beside `set_labels.npy` or `labels.npy`, and maybe
      `set_features.npy` or `features.npy`; or a folder that holds `latents.npy`, `x.npy` or
      `moments.npy` with these names beside it.
    * a folder with REPA's `dataset.json` ({"labels": [[file, label], ...]}), one .npy a sample,
      taken in the order of the sorted file names.

    Latents are (N, C, H, W), features (N, T, z), float16 or float32, given out as float32; labels
    are (N,) integers >= 0. With `moments` the channels are mean | std (std, not the log-variance)
    and each position draws its own sample of the posterior:

        x = scale * (mean + std * normal(seed, Stream.POSTERIOR, position))

    Args:
        path: one of the layouts above; `~` is expanded.
        scale: multiplies the latents (0.18215 for Stable Diffusion's autoencoder).
        moments: the stored channels are mean | std; x then has half of them.
        features: None takes features that lie with the latents, False ignores them, a path is
            another .npy of (N, T, z).
        images: the images of the latents for a teacher, uint8, as `PairedImages`; paired by the
            number in the latents' file names, or by row.
        num_classes: classes of the model; None is the largest label + 1.

    Raises:
        ValueError: missing or pickled arrays, files of a dataset.json that are not there, another
            shape, dtype or count, labels out of range, an odd number of channels with `moments`;
            in `get`, a negative std or a bad file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        scale: float = 1.0,
        moments: bool = False,
        features: str | os.PathLike[str] | bool | None = None,
        images: str | os.PathLike[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        if not math.isfinite(scale) or scale == 0:
            raise ValueError(f"scale must be a finite number other than 0, got {scale!r}")
        if features is True:
            raise ValueError("features must be None, False or the path of a .npy, got True")
        root = existing_path(path)
        self._x, labels, stored = _open(root, moments, with_features=features is None)
        if features:
            stored = load_npy(existing_path(features, "features"))
        self._features = stored
        _check_array("latents", self._x, "(N, C, H, W)", root)
        count, channels, height, width = self._x.shape
        if not count:
            raise ValueError(f"latents must hold at least one sample, got none in {str(path)!r}")
        if moments and channels % 2:
            raise ValueError(
                f"moments=True needs an even number of channels (mean | std), got {channels} in "
                f"{str(path)!r}; pass moments=False (data.moments=false) if they are plain latents"
            )
        if stored is not None:
            _check_array("features", stored, "(N, T, z)", root)
            if len(stored) != count:
                raise ValueError(
                    f"features must have one row per latent, {count}, got {len(stored)}"
                )
        self._y = _check_labels(labels, count, num_classes)
        self._images: PairedImages | None = None
        if images is not None:
            rows = not isinstance(self._x, _FilePerSample)
            numbers = list(range(count)) if rows else self._x.numbers(str(root / "dataset.json"))
            self._images = PairedImages(images, numbers, self._y, rows)
        self.scale, self.moments, self._root = float(scale), moments, root
        self.num_classes = int(self._y.max()) + 1 if num_classes is None else num_classes
        self.shape = (channels // 2 if moments else channels, height, width)
        self.name = f"latents-{root.resolve().stem}"

    def __len__(self) -> int:
        return len(self._y)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x (B, C, H, W); features (B, T, z) and images uint8, or None."""
        check_indices(indices, positions, len(self))
        features = None if self._features is None else _to_float32(self._features[indices.numpy()])
        images = None if self._images is None else self._images.get(indices.tolist())
        x = self._draw(indices, positions, seed)
        return Batch(x, self._y[indices], positions, features, images)

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of names, shapes, labels and some rows' content."""
        parts = [self._y.numpy().tobytes()]
        if isinstance(self._x, _FilePerSample):
            parts += self._x.names(self._root)
        for array in (self._x, self._features):
            if array is not None:
                parts += _identity(array)
        if self._images is not None:
            parts += self._images.identity(_LOOKED_INTO)
        return DataSummary(
            unit="latents",
            examples=len(self),
            classes=self.num_classes,
            shape=self.shape,
            digest=digest_of(parts),
        )

    def statistics(self) -> Statistics:
        """Mean and std of x over a fixed sample of examples, every number of them alike.

        Raises:
            ValueError: as `get`, for moments that are none.
        """
        rows = torch.tensor(sample_rows(len(self), _MEASURED))
        std, mean = torch.std_mean(self._draw(rows, rows, 0), correction=0)
        return Statistics(len(rows), float(mean), float(std), self.scale)

    def _draw(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """x1 (B, C, H, W) of some samples."""
        x = _to_float32(self._x[indices.numpy()])
        if self.moments:
            mean, std = x.chunk(2, dim=1)
            if (std < 0).any():
                bad = int(indices[(std < 0).flatten(1).any(1)][0])
                raise ValueError(
                    f"std channels must be >= 0, got one < 0 in sample {bad} of "
                    f"{str(self._root)!r}: is it the log-variance? Store exp(logvar / 2). Are they "
                    "plain latents, not mean | std? Pass moments=False (data.moments=false)"
                )
            noise = normal(seed, Stream.POSTERIOR, positions, math.prod(self.shape))
            x = mean + std * noise.view_as(mean)
        return x * self.scale


def _identity(array: np.ndarray | _FilePerSample) -> list[bytes]:
    """What tells an array from others, for a fingerprint: shape, dtype, some rows."""
    import numpy as np

    content = array[np.array(sample_rows(array.shape[0], _LOOKED_INTO))]
    return [f"{array.shape} {array.dtype}".encode(), content.tobytes()]


class _FilePerSample:
    """One .npy a sample, with the part of ndarray's interface that `Latents` uses."""

    def __init__(self, files: list[Path]) -> None:
        # The first file stands for all until they are read: there may be a million.
        first = load_npy(files[0])
        self._files, self._sample_shape, self.dtype = files, first.shape, first.dtype
        self.shape = (len(files), *first.shape)
        self.ndim = len(self.shape)

    def numbers(self, where: str) -> list[int]:
        """The number in each file's name; ValueError if two are the same."""
        return list(numbered(map(str, self._files), where))

    def names(self, root: Path) -> list[bytes]:
        """Their names in a folder, for a fingerprint."""
        start = len(str(root / "_")) - 1
        return [os.fsencode("\0".join(str(file)[start:] for file in self._files))]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        import numpy as np

        samples = [load_npy(self._files[row]) for row in rows.tolist()]
        for row, sample in zip(rows.tolist(), samples, strict=True):
            if sample.shape != self._sample_shape or sample.dtype != self.dtype:
                raise ValueError(
                    f"{str(self._files[row])!r} must be {self._sample_shape} {self.dtype} like the "
                    f"first sample, got {sample.shape} {sample.dtype}"
                )
        return np.stack(samples) if samples else np.empty((0, *self._sample_shape), self.dtype)


class _Stored(NamedTuple):
    """Arrays of the files, not yet checked."""

    x: np.ndarray | _FilePerSample
    labels: np.ndarray
    features: np.ndarray | None


def _open(root: Path, moments: bool, with_features: bool) -> _Stored:
    """Opens whichever layout there is."""
    if (root / "dataset.json").is_file():
        return _open_dataset_json(root, moments)
    if root.suffix == ".npz" and root.is_file():
        return _open_npz(root, moments, with_features)
    if root.is_dir() or (root.suffix == ".npy" and root.is_file()):
        return _open_npy(root, moments, with_features)
    inside = "; give the folder that holds it" if root.name == "dataset.json" else _because(root)
    raise ValueError(
        f"path must be a .npz, a .npy or a folder of latents, got {str(root)!r}{inside}"
    )


def _because(root: Path) -> str:
    above = next((f for f in root.absolute().parents[:2] if (f / "dataset.json").is_file()), None)
    if above is not None:
        return f"; {str(above)!r} has a dataset.json, which lists the latents: give that folder"
    foreign = describe_foreign(root, "latents")
    return f"; {foreign}" if foreign else ""


def _to_float32(array: np.ndarray) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(array, dtype=np.float32))  # a copy: never the mapped file


def _check_array(name: str, array: np.ndarray | _FilePerSample, shape: str, path: Path) -> None:
    if array.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} of {str(path)!r} must be {shape}, got shape {array.shape}")
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4):
        raise ValueError(
            f"{name} of {str(path)!r} must be float16 or float32, got {array.dtype}; "
            "convert them with array.astype('float32')"
        )


def _check_labels(labels: np.ndarray, count: int, num_classes: int | None) -> Tensor:
    """The labels as (N,) int64."""
    import numpy as np

    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"labels must be (N,) integers >= 0, got shape {labels.shape} and dtype {labels.dtype}"
        )
    if len(labels) != count:
        raise ValueError(f"labels must have one entry per latent, {count}, got {len(labels)}")
    low, high = int(labels.min()), int(labels.max())
    limit = 1 << 31 if num_classes is None else num_classes
    if low < 0 or high >= limit:
        raise ValueError(f"labels must lie in [0, {limit}), got {low} to {high}")
    return torch.from_numpy(labels.astype(np.int64))


def _choose(found: list[str], moments: bool, path: Path) -> str:
    """The one name of the latents among those present."""
    usable = [name for name in found if moments or name != "moments"]
    if moments and "moments" in usable:
        return "moments"
    if len(usable) == 1:
        return usable[0]
    if found == ["moments"]:
        raise ValueError(f"{str(path)!r} holds 'moments' (mean | std): {_PASS_MOMENTS}")
    problem = f"both {' and '.join(usable)}" if usable else "none of them"
    of_folder = path.is_dir()
    wanted = "latents.npy, x.npy, moments.npy, dataset.json" if of_folder else "latents, x, moments"
    raise ValueError(
        f"{str(path)!r} must hold one of {wanted}, got {problem}{'' if usable else _because(path)}"
    )


def _open_npz(path: Path, moments: bool, with_features: bool) -> _Stored:
    with open_npz(path) as archive:
        found = [name for name in ("latents", "x", "moments") if name in archive.files]
        name = _choose(found, moments, path)
        label_names = [key for key in ("labels", "y") if key in archive.files]
        if len(label_names) != 1:
            got = " and ".join(label_names) or f"only {', '.join(archive.files)}"
            raise ValueError(f"{str(path)!r} must hold one of labels, y, got {got}")
        wanted = [name, label_names[0]]
        if with_features and "features" in archive.files:
            wanted.append("features")
        try:
            arrays = [archive[key] for key in wanted]
        except (ValueError, OSError, EOFError, BadZipFile) as error:
            raise ValueError(f"cannot read the arrays of {str(path)!r}: {error}") from error
    return _Stored(arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None)


def _open_npy(path: Path, moments: bool, with_features: bool) -> _Stored:
    if path.is_dir():
        names = ("latents", "x", "moments")
        found = [name for name in names if (path / f"{name}.npy").is_file()]
        path = path / f"{_choose(found, moments, path)}.npy"
    elif path.stem == "moments":
        _choose(["moments"], moments, path)

    def sibling(kind: str) -> Path | None:
        options = (path.with_name(f"{path.stem}_{kind}.npy"), path.with_name(f"{kind}.npy"))
        return next((option for option in options if option.is_file()), None)

    # `set_labels.npy` before `labels.npy`, so that several sets can share a folder.
    labels, features = sibling("labels"), sibling("features") if with_features else None
    if labels is None:
        raise ValueError(
            f"no labels beside {str(path)!r}: add {path.stem}_labels.npy or labels.npy"
        )
    return _Stored(load_npy(path), load_npy(labels), load_npy(features) if features else None)


def _open_dataset_json(root: Path, moments: bool) -> _Stored:
    import numpy as np

    labels = read_dataset_json(root)
    index = root / "dataset.json"
    names = sorted(labels)
    for name in names:
        if not name.endswith(".npy"):
            raise ValueError(
                f"{str(index)!r} must list .npy latents, got {name!r}: a folder of latents has a "
                "dataset.json of its own; images of latents are given as images (data.images)"
            )
    if not moments and "mean-std" in names[0]:
        # By its name alone: four channels of each look like plain latents of eight.
        raise ValueError(f"{str(root)!r} holds mean | std per image: {_PASS_MOMENTS}")
    check_listed(root, names)
    samples = _FilePerSample([root / name for name in names])
    return _Stored(samples, np.array([labels[name] for name in names]), None)
