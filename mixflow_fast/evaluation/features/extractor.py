"""Images -> features -> files: features are computed once and kept, numbers are made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.evaluation.frechet import FEATURES
from mixflow_fast.files import replacing

BATCH = 64  # images of one pass, whatever came in: the bits must not depend on the caller's batches


@dataclass(frozen=True)
class ExtractorId:
    """What the features depend on beside the images; part of a number's protocol.

    Attributes:
        name: "inception", ...; the folder of features and the keys of a reference go by it.
        sha256: of the weights' file; None: no weights.
        resize: how images are brought to the network's size, in words.
        dtype: of the network.
    """

    name: str
    sha256: str | None
    resize: str
    dtype: str = "float32"

    def to_record(self) -> dict[str, str | None]:
        """Its part of a protocol."""
        return {
            "id": self.name,
            "sha256": self.sha256,
            "dtype": self.dtype,
            "resize": self.resize,
        }


class Extractor(Protocol):
    """A frozen feature network.

    Attributes:
        id: what it is.
        outputs: names of the features it gives; `inception.pool` is output "pool" of "inception".
        device: where images have to be.
    """

    id: ExtractorId
    outputs: tuple[str, ...]
    device: torch.device

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features (B, d) float32 by output, of images (B, 3, H, W) uint8."""
        ...


@dataclass(frozen=True)
class Features:
    """Features of a set in the order of its ids.

    Attributes:
        arrays: (N, d) float32 by output.
        ids: (N,) int64.
        extractor: what made them.
        constant: ids of images of a single colour, which a broken decoder makes.
        source: what the images were, so that kept features of others are not taken for theirs.
    """

    arrays: Mapping[str, np.ndarray]
    ids: np.ndarray
    extractor: ExtractorId
    constant: tuple[int, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def save(self, folder: Path) -> None:
        """Write NAME.OUTPUT.npy, NAME.ids.npy and, last, NAME.json into a folder."""
        name = self.extractor.name
        # That of other features would stand for these arrays, were this stopped on its way.
        (folder / f"{name}.json").unlink(missing_ok=True)
        for part, array in {**self.arrays, "ids": self.ids}.items():
            with replacing(folder / f"{name}.{part}.npy") as partial, partial.open("wb") as file:
                np.save(file, array)
        header = {
            "extractor": asdict(self.extractor),
            "outputs": list(self.arrays),
            "n": len(self),
            "constant": list(self.constant),
            "source": self.source,
        }
        with replacing(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps(header, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, name: str) -> Features:
        """Read what `save` wrote; the arrays are mapped from their files.

        Raises:
            ValueError: no such features, or files that do not fit each other.
        """
        header_file = folder / f"{name}.json"
        try:
            header = json.loads(header_file.read_text())
            names = [*header["outputs"], "ids"]
            # Mapped as "copy on write": PyTorch warns of memory that may not be written.
            arrays = {n: np.load(folder / f"{name}.{n}.npy", mmap_mode="c") for n in names}
            ids = np.array(arrays.pop("ids"))
            extractor = ExtractorId(**header["extractor"])
            constant, source = tuple(header["constant"]), header["source"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"cannot read the features {str(header_file)!r}: {error}") from error
        if any(len(array) != len(ids) for array in arrays.values()) or len(ids) != header["n"]:
            raise ValueError(
                f"the features of {str(header_file)!r} do not have one length: compute them anew"
            )
        return cls(arrays, ids, extractor, constant, source)


def extract(
    images: Iterable[Tensor],
    extractor: Extractor,
    ids: np.ndarray | None = None,
    source: str = "",
) -> Features:
    """Features of images.

    Images are put together to batches of `BATCH` of one size before the network sees them, and the
    last batch of a size is filled up, so features do not depend on how the images came.

    Args:
        images: batches (B, 3, H, W) uint8, of any B; H and W may differ between batches.
        extractor: the network.
        ids: (N,) integers; None: 0, 1, ...
        source: as `Features`.

    Raises:
        ValueError: no images, images of another kind, duplicate or too few ids, features that are
            not finite.
    """
    parts: dict[str, list[np.ndarray]] = {name: [] for name in extractor.outputs}
    constant: list[int] = []
    count = 0
    for batch in _batches(images):
        flat = batch.flatten(1)
        same = (flat == flat[:, :1]).all(dim=1).nonzero().flatten()
        constant += [count + int(place) for place in same]
        filled = batch
        if len(batch) < BATCH:
            filled = torch.cat([batch, batch[-1:].expand(BATCH - len(batch), -1, -1, -1)])
        with torch.inference_mode(), exact_float32():
            found = extractor(filled.to(extractor.device))
        for name in extractor.outputs:
            # A copy, which holds nothing of the batch that it is cut from.
            parts[name].append(found[name][: len(batch)].float().cpu().numpy().copy())
        count += len(batch)
    if not count:
        raise ValueError("images must be at least one, got none")
    own = np.arange(count) if ids is None else np.asarray(ids, np.int64)
    if len(own) != count or len(np.unique(own)) != count:
        raise ValueError(
            f"ids must be {count:,} different integers, one an image, got {len(own):,} with "
            f"{len(np.unique(own)):,} different ones"
        )
    arrays = {name: np.concatenate(rows) for name, rows in parts.items()}
    for name, array in arrays.items():
        wrong = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"{extractor.id.name}.{name} is not finite for {len(wrong):,} of {count:,} images, "
                f"the first with id {own[wrong[0]]}: the extractor's weights are damaged"
            )
    return Features(arrays, own, extractor.id, tuple(int(own[place]) for place in constant), source)


def kept_or_extracted(
    folder: Path | None,
    extractor: Extractor,
    images: Callable[[], Iterable[Tensor]],
    source: str,
    save: bool = True,
) -> Features:
    """Features of a folder if they are there, of this extractor and source; else computed and kept.

    Args:
        folder: where they are kept; None: nowhere.
        extractor: the network.
        images: gives the images, called only if they are needed.
        source: as `Features`, not empty.
        save: whether to keep them; False for a folder that can be read only.
    """
    kept = None if folder is None else kept_features(folder, extractor, source)
    if kept is not None:
        return kept
    found = extract(images(), extractor, source=source)
    if folder is not None and save:
        found.save(folder)
    return found


def kept_features(folder: Path, extractor: Extractor, source: str) -> Features | None:
    """Features of a folder, of this extractor and source; None where there are none."""
    if not (folder / f"{extractor.id.name}.json").exists():
        return None
    kept = Features.load(folder, extractor.id.name)
    return kept if kept.extractor == extractor.id and kept.source == source else None


def _batches(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same images in batches of BATCH, smaller before another size and at the end."""
    held: list[Tensor] = []
    count = 0
    for batch in images:
        if batch.ndim != 4 or batch.shape[1] != 3 or batch.dtype != torch.uint8:
            raise ValueError(
                f"images must be (B, 3, H, W) uint8, got {tuple(batch.shape)} {batch.dtype}"
            )
        if held and held[0].shape[1:] != batch.shape[1:]:
            yield torch.cat(held)
            held, count = [], 0
        held.append(batch)
        count += len(batch)
        if count >= BATCH:
            whole = torch.cat(held)
            full = count - count % BATCH
            yield from whole[:full].split(BATCH)
            held, count = ([whole[full:]], count - full) if count > full else ([], 0)
    if held:
        yield torch.cat(held)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within, float32 products on CUDA devices have no TF32 in them, and cuDNN does not search."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PixelFeatures:
    """The feature maps of `frechet.py`, which have no weights: "pooled_pixels", "random_conv".

    Args:
        name: a key of `FEATURES`.

    Raises:
        ValueError: another name.
    """

    def __init__(self, name: str) -> None:
        if name not in FEATURES:
            raise ValueError(f"name must be one of {', '.join(FEATURES)}, got {name!r}")
        self.id = ExtractorId(name, None, "none: native size", "float64")
        self.outputs = ("features",)
        self.device = torch.device("cpu")
        self._features = FEATURES[name]

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """As `Extractor`; pixels are mapped to [-1, 1]."""
        return {"features": self._features(images.float() / 127.5 - 1)}
