"""The interface of datasets, their batches, and helpers that they share.

A dataset is random access and has no state: `get` is a pure function of the indices (which
samples), of the positions (which random numbers) and of the seed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.data.summary import DataSummary
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.kernels.philox import Stream, uniform


@dataclass(frozen=True)
class Batch:
    """One micro-batch; on the CPU when it comes from a dataset.

    Attributes:
        x: what the network trains on: (B, C, H, W) data x1 as it sees them, or the `Moments` of
            such, (B, C, H, W) each, float32 or float16. None: it is made of `images` on the
            device, as they are or by an encoder.
        y: (B,) int64 class labels.
        positions: (B,) int64 global sample positions, the `ids` of every random draw.
        features: (B, T, z) features of a frozen encoder, or None.
        images: (B, 3, H, H) uint8 images, mirrored where the example is, or None: the data
            themselves where x is None, else the images of the latents.
        cond: what text encoders give for the prompts, or their tokens: (B, ...) each, under the
            names of `PromptLayout`; None where there are no prompts.
    """

    x: Tensor | Moments | None
    y: Tensor
    positions: Tensor
    features: Tensor | None = None
    images: Tensor | None = None
    cond: dict[str, Tensor] | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on a device; views of one buffer stay that."""
        return self.map(lambda value: _moved(value, device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of changed tensors.

        Args:
            change: gets a tensor of B rows and returns one of B rows. It gets the buffer of mean
                and std whole, (B, 2 C, H, W), where they are its halves.
        """

        def changed(
            value: Tensor | Moments | dict[str, Tensor] | None,
        ) -> Tensor | Moments | dict[str, Tensor] | None:
            if isinstance(value, dict):
                return {name: change(part) for name, part in value.items()}
            if isinstance(value, Moments):
                whole = joined(value)
                if whole is None:
                    return Moments(change(value.mean), change(value.std), value.scale)
                return split(change(whole), value.scale)
            return None if value is None else change(value)

        return Batch(*(changed(getattr(self, f.name)) for f in fields(self)))

    def buffers(self) -> list[Tensor]:
        """Its tensors, each of B rows; mean and std as one where they are halves of a buffer."""
        found: list[Tensor] = []
        self.map(lambda value: (found.append(value), value)[1])
        return found


def split(rows: Tensor, scale: float) -> Moments:
    """(B, 2 C, H, W) mean | std as `Moments`, views of it."""
    mean, std = rows.chunk(2, dim=1)
    return Moments(mean, std, scale)


def joined(moments: Moments) -> Tensor | None:
    """The (B, 2 C, ...) buffer that mean and std are the halves of, as `split` makes them."""
    mean, std, _ = moments
    size = mean[0].numel() if len(mean) else 0
    halves = (
        mean.dim() > 1
        and mean.untyped_storage().data_ptr() == std.untyped_storage().data_ptr()
        and mean.stride() == std.stride()
        and std.storage_offset() - mean.storage_offset() == size
        and mean[0].is_contiguous()
    )
    if not halves or mean.stride(0) < 2 * size:
        return None
    shape = (len(mean), 2 * mean.shape[1], *mean.shape[2:])
    return mean.as_strided(shape, mean.stride(), mean.storage_offset())


def _moved(value: Tensor, device: torch.device) -> Tensor:
    # A copy from memory that is not pinned makes the host wait for the device.
    if device.type == "cuda" and not value.is_cuda:
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class Dataset(Protocol):
    """Samples by index.

    Attributes:
        num_classes: labels lie in [0, num_classes).
        shape: (C, H, W) of x1, or of the images where x is None.
        name: short, and safe in file names.
    """

    num_classes: int
    shape: tuple[int, int, int]
    name: str

    def __len__(self) -> int: ...

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        """The samples `indices`, (B,) int64 in [0, len); random numbers from `positions`, (B,)."""
        ...

    def summary(self) -> DataSummary:
        """What the data are; cheap, and the same wherever they are mounted."""
        ...


class ImageDataset(Dataset, Protocol):
    """A dataset of images, which gives them as uint8: what `take` gets of it has x None.

    Attributes:
        size: side of the images in pixels.
        flip: whether an example is mirrored where `mirrored` says so.
        encoded: whether there are encoded files to decode; False for raw pixels.
        crops: whether ADM's crop is still to be done after decoding.
    """

    size: int
    flip: bool
    encoded: bool
    crops: bool

    def labels(self, indices: Tensor) -> Tensor:
        """(B,) int64 class labels."""
        ...

    def payload(self, index: int) -> bytes:
        """The encoded file of a sample; ValueError for raw pixels."""
        ...

    def name_of(self, index: int) -> str:
        """What a sample's file is called, for errors."""
        ...


def take(dataset: Dataset, indices: Tensor, positions: Tensor, seed: int) -> Batch:
    """What a run takes of a dataset: `get`, of images as bytes alone where it gives both."""
    return getattr(dataset, "get_images", dataset.get)(indices, positions, seed)


def fill(dataset: Dataset, out: Batch, indices: Tensor, positions: Tensor, seed: int) -> None:
    """Writes samples into given memory: what `get` returns.

    A dataset that can write there by itself has a method `fill` with the other arguments. It writes
    the fields that `out` has, and need not write positions.

    Args:
        dataset: the samples.
        out: tensors of B rows; None for a field that is not wanted.
        indices, positions, seed: as `Dataset.get`.

    Raises:
        ValueError: as `get`; samples of another kind or shape than `out`.
    """
    direct = getattr(dataset, "fill", None)
    if direct is not None:
        direct(out, indices, positions, seed)
        out.positions.copy_(positions)
    else:
        given = indices, positions, seed
        copy_batch(out, take(dataset, *given) if out.x is None else dataset.get(*given))


def copy_batch(out: Batch, batch: Batch) -> None:
    """Copies a batch into given memory; fields that `out` has not are left out.

    Raises:
        ValueError: a field of another kind or shape.
    """
    for name in (f.name for f in fields(out)):
        there, value = getattr(out, name), getattr(batch, name)
        if there is None:
            continue
        if type(there) is not type(value):
            raise ValueError(
                f"samples must be alike, but {name} of some is {type(there).__name__} and of "
                f"others {type(value).__name__}"
            )
        if isinstance(there, Tensor):
            pairs = [(there, value)]
        elif isinstance(there, dict):
            pairs = [(part, value[part_name]) for part_name, part in there.items()]
        else:
            pairs = list(zip(there[:2], value[:2], strict=True))
        for to, new in pairs:
            if to.shape != new.shape:
                raise ValueError(
                    f"samples must be alike, but {name} of some is {tuple(to.shape[1:])} and of "
                    f"others {tuple(new.shape[1:])}"
                )
            to.copy_(new)


def check_indices(indices: Tensor, positions: Tensor, size: int) -> None:
    """Raises ValueError unless both are (B,) int64 and indices lie in [0, size)."""
    for name, value in (("indices", indices), ("positions", positions)):
        if value.dim() != 1 or value.dtype != torch.int64:
            raise ValueError(
                f"{name} must be a 1-D int64 tensor, got shape {tuple(value.shape)} "
                f"and dtype {value.dtype}"
            )
    if len(indices) != len(positions):
        raise ValueError(
            f"indices and positions must have one length, got {len(indices)} and {len(positions)}"
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        raise ValueError(
            f"indices must lie in [0, {size}), got {int(indices.min())} to {int(indices.max())}"
        )


def without_flips(dataset: Dataset) -> Dataset:
    """The same examples as they are stored; shares the memory of `dataset`."""
    if not getattr(dataset, "flip", False):
        return dataset
    plain = copy.copy(dataset)
    plain.flip = False
    return plain


def mirrored(positions: Tensor, seed: int) -> Tensor:
    """(B,) whether the example at a position is the mirrored one, a function of (seed, position)
    alone, with probability 1/2.
    """
    return uniform(seed, Stream.FLIP, positions)[:, 0] < 0.5


def random_flip(x: Tensor, positions: Tensor, seed: int) -> Tensor:
    """Mirrors the images left-right that `mirrored` names; (B, C, H, W)."""
    return torch.where(mirrored(positions, seed)[:, None, None, None], x.flip(-1), x)
