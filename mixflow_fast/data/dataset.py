"""The interface of datasets, their batches, and helpers that they share.

A dataset is random access and has no state: `get` is a pure function of the indices (which
samples), of the positions (which random numbers) and of the seed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.data.summary import DataSummary
from mixflow_fast.kernels.philox import Stream, uniform


@dataclass(frozen=True)
class Batch:
    """One micro-batch; on the CPU when it comes from a dataset.

    Attributes:
        x: (B, C, H, W) float32 data x1 as the network sees it; images in [-1, 1].
        y: (B,) int64 class labels.
        positions: (B,) int64 global sample positions, the `ids` of every random draw.
        features: (B, T, z) float32 features of a frozen encoder, or None.
        images: (B, 3, H, H) uint8 images of the latents, or None.
    """

    x: Tensor
    y: Tensor
    positions: Tensor
    features: Tensor | None = None
    images: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """A copy on a device."""

        def move(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            # A copy from memory that is not pinned makes the host wait for the device.
            value = value.pin_memory() if device.type == "cuda" else value
            return value.to(device, non_blocking=True)

        return Batch(*(move(getattr(self, f.name)) for f in fields(self)))


class Dataset(Protocol):
    """Samples by index.

    Attributes:
        num_classes: labels lie in [0, num_classes).
        shape: (C, H, W) of x1.
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


def random_flip(x: Tensor, positions: Tensor, seed: int) -> Tensor:
    """Mirrors each image left-right with probability 1/2, a function of (seed, position) alone."""
    mirrored = uniform(seed, Stream.FLIP, positions)[:, 0] < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
