"""Real data in memory, as a network sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.data import Batch, Dataset
from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.kernels.interpolate import Moments, sample_moments

# Memory that `read_examples` takes at most, and examples that say enough of mean and covariance.
_BYTES = 1 << 30
_ENOUGH = 20_000
_SEED = 0


@dataclass(frozen=True)
class Examples:
    """Real data as the network sees them.

    Attributes:
        x: (N, C, H, W) float32 on the CPU.
        y: (N,) int64 labels, or None for a network without classes.
        description: what they are, for the report.
    """

    x: Tensor
    y: Tensor | None
    description: str = "examples"

    def __post_init__(self) -> None:
        if self.x.dim() != 4 or len(self.x) < 2:
            raise ValueError(f"examples must be (N, C, H, W), N >= 2, got {tuple(self.x.shape)}")

    def spread(self, count: int) -> Tensor:
        """(count,) places, evenly over the examples; repeated where there are too few."""
        return torch.arange(count) * len(self.x) // count


def read_examples(
    dataset: Dataset,
    inputs: Callable[[Batch], Tensor | Moments],
    device: torch.device,
    at_least: int,
    description: str,
    batch_size: int = 256,
) -> Examples:
    """Examples of a dataset, evenly spread over it, so that its classes are there in its shares.

    Where its examples have several shapes they are those of the shape that most have.

    Args:
        dataset: without flips.
        inputs: what the network trains on, from a batch on the device.
        device: where `inputs` works.
        at_least: how many are wanted; more are read while they are cheap. A smaller dataset gives
            what it has.
        description: what they are.
        batch_size: examples at a time.
    """
    shape = dataset.shape
    affordable = _BYTES // (4 * shape[0] * shape[1] * shape[2])
    sizes = bucket_sizes(dataset)
    largest = max(range(len(sizes)), key=sizes.__getitem__)
    count = min(sizes[largest], max(at_least, min(_ENOUGH, affordable)))
    index = sum(sizes[:largest]) + torch.arange(count) * sizes[largest] // count
    x, y = [], []
    for places in torch.arange(count).split(batch_size):
        batch = dataset.get(index[places], places, _SEED).to(device)
        found = inputs(batch)
        if isinstance(found, Moments):
            found = sample_moments(found, _SEED, batch.positions, "auto")
        x.append(found.float().cpu())
        y.append(batch.y.cpu())
    return Examples(torch.cat(x), torch.cat(y), description)
