"""Latents that lie on the device as a whole, where a batch is one gather of rows.

For slow storage, and for steps that are captured: it is no faster than the ring of `DeviceLoader`
where the files are in the page cache.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Dataset, joined, split
from mixflow_fast.data.latents import Latents
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.kernels.interpolate import Moments

# What has to stay free beside the table.
SPARE_BYTES = 8 * 10**9
_BLOCK = 4096  # rows that are copied at once


def resident_problem(dataset: Dataset) -> str | None:
    """Why a dataset cannot lie on the device, a sentence; None where it can."""
    if isinstance(dataset, Latents) and dataset.table is not None:
        return None
    return (
        f"{dataset.name} is no set of moments (mean | std), as `mixflow-fast data encode` makes it"
    )


def table_bytes(store: LatentsStore) -> int:
    """Bytes of all rows."""
    return math.prod(store.shape) * store.dtype.itemsize


def fits(store: LatentsStore, device: torch.device) -> bool:
    """Whether all rows leave `SPARE_BYTES` of a GPU beside what is reserved there now."""
    if device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return total - torch.cuda.memory_reserved(device) - SPARE_BYTES >= table_bytes(store)


class Resident:
    """The rows of a set on the device; reads all of them once.

    Args:
        latents: moments of a set.
        device: where its rows go.

    Raises:
        ValueError: latents that cannot lie there.
    """

    def __init__(self, latents: Latents, device: torch.device) -> None:
        if problem := resident_problem(latents):
            raise ValueError(problem)
        self._latents, store = latents, latents.table
        self._rows = torch.empty(tuple(store.shape), dtype=store.dtype, device=device)
        for first in range(0, len(self._rows), _BLOCK):
            last = min(first + _BLOCK, len(self._rows))
            self._rows[first:last].copy_(store.take(torch.arange(first, last)))

    def rows(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 rows of what the latents would give, on the CPU."""
        return self._latents.rows_of(indices, positions, seed)

    def memory(self, size: int) -> Moments:
        """x of `size` samples on the device, not yet written."""
        return split(self._rows.new_empty((size, *self._rows.shape[1:])), self._latents.scale)

    def take(self, rows: Tensor, out: Moments) -> None:
        """Writes rows into what `memory` gave, on the current stream."""
        torch.index_select(self._rows, 0, rows, out=joined(out))
