"""Opens latents that other programs wrote, in arrays or in one file a sample.

* `set.npz`: arrays `latents` or `x` (or `moments`), `labels` or `y`, and maybe `features`; held in
  memory.
* `set.npy`, memory-mapped, beside `set_labels.npy` or `labels.npy`, and maybe `set_features.npy` or
  `features.npy`; or a folder that holds `latents.npy`, `x.npy` or `moments.npy` with these names
  beside it.
* a folder with REPA's `dataset.json` ({"labels": [[file, label], ...]}), one .npy a sample, taken
  in the order of the sorted file names: float32 [8, h, w] = mean | std in REPA's preprocessing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from zipfile import BadZipFile

from mixflow_fast.data.foreign import describe_foreign
from mixflow_fast.data.npy_files import check_listed, load_npy, open_npz, read_dataset_json
from mixflow_fast.data.paired_images import numbered

if TYPE_CHECKING:
    import numpy as np

_PASS_MOMENTS = "pass moments=True (data.moments=true)"


class FilePerSample:
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


class StoredLatents(NamedTuple):
    """Arrays of the files, not yet checked."""

    x: np.ndarray | FilePerSample
    labels: np.ndarray
    features: np.ndarray | None


def open_latents(root: Path, moments: bool, with_features: bool) -> StoredLatents:
    """Opens whichever layout there is.

    Args:
        root: a .npz, a .npy or a folder.
        moments: the channels are meant to be mean | std.
        with_features: open features that lie with the latents.

    Raises:
        ValueError: no such layout, files that are missing or cannot be read, pickles.
    """
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


def _open_npz(path: Path, moments: bool, with_features: bool) -> StoredLatents:
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
    return StoredLatents(arrays[0], arrays[1], arrays[2] if len(arrays) == 3 else None)


def _open_npy(path: Path, moments: bool, with_features: bool) -> StoredLatents:
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
    return StoredLatents(load_npy(path), load_npy(labels), load_npy(features) if features else None)


def _open_dataset_json(root: Path, moments: bool) -> StoredLatents:
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
    samples = FilePerSample([root / name for name in names])
    return StoredLatents(samples, np.array([labels[name] for name in names]), None)
