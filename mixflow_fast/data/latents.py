"""Latents that an autoencoder computed before, as examples to train on."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, check_indices, copy_batch, joined, mirrored, split
from mixflow_fast.data.latent_files import FilePerSample, StoredLatents, open_latents
from mixflow_fast.data.latent_statistics import Statistics
from mixflow_fast.data.latents_store import FORMAT, LatentsInfo, LatentsStore
from mixflow_fast.data.npy_files import load_npy
from mixflow_fast.data.paired_images import PairedImages
from mixflow_fast.data.set_files import how_far, set_format
from mixflow_fast.data.summary import DataSummary, digest_of, sample_rows
from mixflow_fast.files import existing_path
from mixflow_fast.kernels.interpolate import Moments, sample_moments

if TYPE_CHECKING:
    import numpy as np

_LOOKED_INTO = 64  # rows of each array whose content is in the fingerprint
_MEASURED = 256  # examples that mean and std are of


class Latents:
    """Precomputed latents: a set of `mixflow-fast data encode` or `import`, or plain files.

    A set (`data/latents_store.py`) says itself what it holds; what is given here must agree. Plain
    files are the layouts of `data/latent_files.py`: latents (N, C, H, W), features (N, T, z),
    float16 or float32; labels (N,) integers >= 0.

    Moments, whose channels are mean | std (std, not the log-variance), are given out as they are
    stored: `MixFlow.prepare` draws the posterior at a position,

        x = scale * (mean + std * normal(seed, Stream.POSTERIOR, position)).

    Anything else is given out in float32, times `scale`, or normalised as a set's manifest says.

    Args:
        path: a set or one of the layouts; `~` is expanded.
        scale: multiplies the latents (0.18215 for Stable Diffusion's autoencoder); None is that of
            the set, 1 for plain files.
        moments: the stored channels are mean | std; x then has half of them. None is what the set
            says, False for plain files.
        mirrors: 2 takes the latent of the image or of its mirror image, by `mirrored` at the
            position; 1 takes the image's own. None: both where the set has both.
        features: None takes features that lie with plain latents, False ignores them, a path is
            another .npy of (N, T, z), or a set of features, whose samples have the same numbers.
        images: the images of the latents for a teacher, uint8, as `PairedImages`; paired by the
            set's numbers, by those in the latents' file names, or by row.
        num_classes: classes of the model; None is that of the set, the largest label + 1 for plain
            files.

    Attributes:
        info: what a set's manifest says; None for plain files.
        moments, scale, mirrors: as they are used.
        flip: whether both mirrors are used; see `without_flips`.

    Raises:
        ValueError: an argument that contradicts the set's manifest; what `LatentsStore` and
            `open_latents` refuse; another shape, dtype or count, labels out of range, an odd number
            of channels with `moments`; in `get`, a negative std or a bad file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        scale: float | None = None,
        moments: bool | None = None,
        mirrors: int | None = None,
        features: str | os.PathLike[str] | bool | None = None,
        images: str | os.PathLike[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        if scale is not None and (not math.isfinite(scale) or scale == 0):
            raise ValueError(f"scale must be a finite number other than 0, got {scale!r}")
        if features is True:
            raise ValueError("features must be None, False or the path of a .npy, got True")
        root = existing_path(path)
        self._root = root
        # A set that is not whole, or not of latents, says so itself.
        is_set = root.is_dir() and (set_format(root) or how_far(root))
        self._store = LatentsStore(root) if is_set else None
        self.info = None if self._store is None else self._store.info
        if self._store is not None:
            info = self._store.info
            _check_agrees(info, str(path), scale, moments, mirrors)
            self.scale = 1.0 if info.normalisation is not None else info.scale
            self.moments = info.kind == "moments"
            self.mirrors = mirrors or info.mirrors
            limit = info.num_classes if num_classes is None else num_classes
            self._y = _check_labels(self._store.labels.numpy(), info.count, limit)
            self.num_classes = limit
        else:
            if mirrors == 2:
                raise ValueError(
                    f"mirrors=2 needs latents of the mirrored images, which {str(path)!r} does not "
                    "hold: encode them with `mixflow-fast data encode`, or leave data.mirrors out"
                )
            self.scale, self.moments = 1.0 if scale is None else float(scale), bool(moments)
            self.mirrors = 1
            self._files = open_latents(root, self.moments, with_features=features is None)
            self._y = _check_files(self._files, root, str(path), self.moments, num_classes)
            self.num_classes = int(self._y.max()) + 1 if num_classes is None else num_classes
        self.flip = self.mirrors == 2
        self._features = self._open_features(features)
        self._images: PairedImages | None = None
        if images is not None:
            self._images = PairedImages(images, *self._numbers())
            side = None if self.info is None else self.info.size
            if side not in (None, self._images.size):
                raise ValueError(
                    f"the latents of {str(path)!r} are of images of {side} pixels, those of "
                    f"{str(images)!r} have {self._images.size}: give the images that were encoded"
                )
        row = self._store.info.shape if self._store else self._files.x.shape[1:]
        self.shape = (row[0] // 2 if self.moments else row[0], row[1], row[2])
        self.name = f"latents-{root.resolve().stem}"

    def _numbers(self) -> tuple[list[int], Tensor, bool]:
        """What the latents' images are found by: numbers, labels, whether these are rows."""
        if self._store is not None:
            return _paired_numbers(self._store), self._y, False
        if isinstance(self._files.x, FilePerSample):
            return self._files.x.numbers(str(self._root / "dataset.json")), self._y, False
        return list(range(len(self))), self._y, True

    def _open_features(
        self, given: str | os.PathLike[str] | bool | None
    ) -> np.ndarray | _PairedFeatures | None:
        """The features that `given` means, checked."""
        if not given:
            found = None if self._store else self._files.features
        elif (path := existing_path(given, "features")).is_dir() and set_format(path) == FORMAT:
            return _PairedFeatures(LatentsStore(path), self._store, self.mirrors)
        else:
            found = load_npy(path)
        if found is None:
            return None
        _check_array("features", found, "(N, T, z)", self._root)
        if len(found) != len(self):
            raise ValueError(
                f"features must have one row per latent, {len(self)}, got {len(found)}"
            )
        if self.mirrors == 2:
            raise ValueError(
                "features are of the images as they are, the latents also of the mirrored ones: "
                "set data.mirrors=1, or let a teacher see the images (teacher.path, data.images)"
            )
        return found

    def __len__(self) -> int:
        return len(self._y)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """As `Dataset.get`: x (B, C, H, W), or `Moments` as stored; features (B, T, z) float32 and
        images uint8, or None.
        """
        check_indices(indices, positions, len(self))
        flipped = mirrored(positions, seed) if self.flip else None
        batch = self._without_x(indices, positions, flipped)
        return dataclasses.replace(batch, x=self._take(indices, flipped))

    def _without_x(self, indices: Tensor, positions: Tensor, flipped: Tensor | None) -> Batch:
        """What `get` gives beside x."""
        features = images = None
        if isinstance(self._features, _PairedFeatures):
            features = self._features.take(indices, flipped).float()
        elif self._features is not None:
            features = _copy_of(self._features, indices).float()
        if self._images is not None:
            images = self._images.get(indices.tolist())
            if flipped is not None:
                images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        return Batch(None, self._y[indices], positions, features, images)

    def fill(self, out: Batch, indices: Tensor, positions: Tensor, seed: int) -> None:
        """As `get`, into given memory; moments of a set go there straight from its files."""
        rows = joined(out.x) if self.table is not None and isinstance(out.x, Moments) else None
        if rows is None and out.x is not None:
            copy_batch(out, self.get(indices, positions, seed))
            return
        check_indices(indices, positions, len(self))
        flipped = mirrored(positions, seed) if self.flip else None
        if rows is not None:
            self.table.fill(rows, self._rows(indices, flipped))
            self._refuse_negative(out.x.std, indices)
        copy_batch(dataclasses.replace(out, x=None), self._without_x(indices, positions, flipped))

    @property
    def table(self) -> LatentsStore | None:
        """The set whose rows are the moments that are given out; None where x is made of them."""
        return self._store if self.moments else None

    def rows_of(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 rows of `table` that `get` gives."""
        return self._rows(indices, mirrored(positions, seed) if self.flip else None)

    def willneed(self, indices: Tensor, positions: Tensor, seed: int) -> None:
        """Have a set's rows of a coming batch read ahead, without waiting for them."""
        if self._store is not None:
            self._store.willneed(self.rows_of(indices, positions, seed))

    def _rows(self, indices: Tensor, flipped: Tensor | None) -> Tensor:
        """The stored rows of some samples."""
        rows = indices * (self._store.info.mirrors if self._store is not None else 1)
        return rows if flipped is None else rows + flipped

    def _take(self, indices: Tensor, flipped: Tensor | None) -> Tensor | Moments:
        """x1 of some samples, or its moments as stored."""
        if self._store is not None:
            stored = self._store.take(self._rows(indices, flipped))
        else:
            stored = _copy_of(self._files.x, indices)
        if self.moments:
            x = split(stored, self.scale)
            self._refuse_negative(x.std, indices)
            return x
        normalisation = self._store.info.normalisation if self._store is not None else None
        if normalisation is None:
            return stored.float() * self.scale
        channels = normalisation.mean, normalisation.std
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in channels)
        return (stored.float() - mean) / std * normalisation.multiplier

    def _refuse_negative(self, std: Tensor, indices: Tensor) -> None:
        # Compared as integers, which have the same sign: of float16 that is 20 times as fast.
        bits = std.view(torch.int16 if std.dtype == torch.float16 else torch.int32)
        if not bits.numel() or int(bits.amin()) >= 0 or not (std < 0).any():
            return
        bad = int(indices[(std < 0).flatten(1).any(1)][0])
        raise ValueError(
            f"std channels must be >= 0, got one < 0 in sample {bad} of {str(self._root)!r}: is it "
            "the log-variance? Store exp(logvar / 2). Are they plain latents, not mean | std? Pass "
            "moments=False (data.moments=false)"
        )

    def summary(self) -> DataSummary:
        """As `Dataset.summary`; the digest is of a set's manifest and labels, or of names, shapes,
        labels and some rows' content of plain files.
        """
        if self._store is not None:
            parts = self._store.identity()
        else:
            parts = [self._y.numpy().tobytes()]
            if isinstance(self._files.x, FilePerSample):
                parts += self._files.x.names(self._root)
            parts += _identity(self._files.x)
        if isinstance(self._features, _PairedFeatures):
            parts += self._features.store.identity()
        elif self._features is not None:
            parts += _identity(self._features)
        if self._images is not None:
            parts += self._images.identity(_LOOKED_INTO)
        return DataSummary(
            unit="latents",
            examples=len(self),
            classes=self.num_classes,
            shape=self.shape,
            digest=digest_of([*parts, b"mirrors 2"] if self.flip else parts),
            notes=() if self._store is None else (_describe(self._store.info, self.mirrors),),
        )

    def statistics(self) -> Statistics:
        """Mean and std of x over a fixed sample of examples, every number of them alike.

        Raises:
            ValueError: as `get`, for moments that are none.
        """
        rows = torch.tensor(sample_rows(len(self), _MEASURED))
        x = self._take(rows, None)
        x = sample_moments(x, 0, rows) if isinstance(x, Moments) else x
        std, mean = torch.std_mean(x, correction=0)
        return Statistics(len(rows), float(mean), float(std), self.scale)


class _PairedFeatures:
    """Features of a set of their own, of the latents' samples and mirrors.

    Raises:
        ValueError: latents without numbers, or some without features; features of one mirror for
            latents of two.
    """

    def __init__(self, store: LatentsStore, latents: LatentsStore | None, mirrors: int) -> None:
        where = str(store.root)
        if store.info.kind != "features":
            raise ValueError(f"features must be a set of features, {where!r} has {store.info.kind}")
        if latents is None:
            raise ValueError(
                f"the set of features {where!r} is for a set of latents, whose samples have "
                "numbers: give plain latents their features as a .npy"
            )
        if mirrors > store.info.mirrors:
            raise ValueError(
                f"the latents have 2 mirrors, the features {where!r} 1: set data.mirrors=1"
            )
        wanted = _paired_numbers(latents)
        place = {number: row for row, number in enumerate(_paired_numbers(store))}
        missing = [n for n in wanted if n not in place]
        if missing:
            raise ValueError(
                f"{len(missing)} of {latents.info.count} latents have no features in {where!r}, "
                f"the first is number {missing[0]}: make them of the same prepared set"
            )
        self.store = store
        self._place = torch.tensor([place[n] for n in wanted])

    def take(self, indices: Tensor, flipped: Tensor | None) -> Tensor:
        """(B, T, z) of some latents."""
        rows = self._place[indices] * self.store.info.mirrors
        return self.store.take(rows if flipped is None else rows + flipped)


def _paired_numbers(store: LatentsStore) -> list[int]:
    """What samples are paired by; ValueError where nobody knows what they were made of."""
    numbers = store.source.tolist()
    if min(numbers) < 0:
        raise ValueError(
            f"the files that {str(store.root)!r} was imported from do not say which image a row is "
            "of, so that neither images nor features can be paired with it: use a set of "
            "`mixflow-fast data encode`, or leave data.images and data.features out"
        )
    return numbers


def _check_agrees(
    info: LatentsInfo, path: str, scale: float | None, moments: bool | None, mirrors: int | None
) -> None:
    """ValueError that names both values where an argument contradicts a set's manifest."""
    if info.kind == "features":
        raise ValueError(f"{path!r} holds features: give it as data.features, latents as data.path")
    kind = "moments (mean | std)" if info.kind == "moments" else "latents, one sample each"
    if moments is not None and moments != (info.kind == "moments"):
        raise ValueError(
            f"data.moments={str(moments).lower()}, but the manifest of {path!r} says that it holds "
            f"{kind}: leave data.moments out"
        )
    multiplied = info.scale if info.normalisation is None else 1.0
    if scale is not None and not math.isclose(scale, multiplied, rel_tol=1e-6):
        raise ValueError(
            f"data.scale={scale:g}, but the manifest of {path!r} says {multiplied:g}: leave "
            "data.scale out"
        )
    if mirrors is not None and mirrors > info.mirrors:
        raise ValueError(
            f"data.mirrors={mirrors}, but the manifest of {path!r} says {info.mirrors}: leave "
            "data.mirrors out, or encode both mirrors (`mixflow-fast data encode --mirrors 2`)"
        )


def _describe(info: LatentsInfo, mirrors: int) -> str:
    """One line on a set: what encoded it, how, and which mirrors are used."""
    encoder = str(info.encoder.get("class", "an unknown encoder"))
    if weights := info.encoder.get("weights_sha256"):
        encoder += f" (weights {str(weights)[:12]})"
    precision = f" in {info.precision['dtype']}" if "dtype" in info.precision else ""
    both = "with their mirror images" if mirrors == 2 else "without mirror images"
    pixels = f" (pixels: {info.preprocessing})" if info.preprocessing else ""
    return f"{info.kind} of {encoder}{precision}, stored as {info.dtype}, {both}{pixels}"


def _copy_of(array: np.ndarray | FilePerSample, indices: Tensor) -> Tensor:
    """Rows of an array as stored, never a view of the mapped file."""
    import numpy as np

    return torch.from_numpy(np.asarray(array[indices.numpy()]))


def _identity(array: np.ndarray | FilePerSample) -> list[bytes]:
    """What tells an array from others, for a fingerprint: shape, dtype, some rows."""
    import numpy as np

    content = array[np.array(sample_rows(array.shape[0], _LOOKED_INTO))]
    return [f"{array.shape} {array.dtype}".encode(), content.tobytes()]


def _check_files(
    files: StoredLatents, root: Path, given: str, moments: bool, num_classes: int | None
) -> Tensor:
    """The labels as (N,) int64, after checks of latents and labels."""
    _check_array("latents", files.x, "(N, C, H, W)", root)
    count, channels = files.x.shape[:2]
    if not count:
        raise ValueError(f"latents must hold at least one sample, got none in {given!r}")
    if moments and channels % 2:
        raise ValueError(
            f"moments=True needs an even number of channels (mean | std), got {channels} in "
            f"{given!r}; pass moments=False (data.moments=false) if they are plain latents"
        )
    return _check_labels(files.labels, count, num_classes)


def _check_array(name: str, array: np.ndarray | FilePerSample, shape: str, path: Path) -> None:
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
