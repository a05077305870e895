"""Latents that lie on the device as a whole, where a batch is one gather of rows.

For slow storage, and for steps that are captured: it is no faster than the ring of `DeviceLoader`
where the files are in the page cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.data.dataset import split
from mixflow_fast.kernels.interpolate import Moments

# What has to stay free beside the table.
SPARE_BYTES = 8 * 10**9


class Table(Protocol):
    """A dataset whose x is a row of a table, as it is stored.

    Attributes:
        row_shape: of a stored row; (2 C, h, w) mean | std where x is `Moments`.
        row_dtype: of the table.
        row_scale: of the moments; None where x is the row itself.
    """

    row_shape: tuple[int, ...]
    row_dtype: torch.dtype
    row_scale: float | None

    def rows_of(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 places in the table of what `get` gives."""
        ...

    def row_blocks(self) -> Iterator[Tensor]:
        """The table from its first row to its last, in parts of some rows."""
        ...

    def row_count(self) -> int:
        """Rows of the table."""
        ...


def table_bytes(table: Table) -> int:
    """Bytes of the whole table."""
    return table.row_count() * math.prod(table.row_shape) * table.row_dtype.itemsize


def fits(table: Table, device: torch.device) -> bool:
    """Whether a table leaves `SPARE_BYTES` of a GPU beside what is reserved there now."""
    if device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return total - torch.cuda.memory_reserved(device) - SPARE_BYTES >= table_bytes(table)


class Resident:
    """A table on the device; reads all of it once.

    Args:
        table: the dataset.
        device: where its rows go.
    """

    def __init__(self, table: Table, device: torch.device) -> None:
        self._table, self._device = table, device
        shape = table.row_count(), *table.row_shape
        self._rows = torch.empty(shape, dtype=table.row_dtype, device=device)
        first = 0
        for block in table.row_blocks():
            self._rows[first : first + len(block)].copy_(block)
            first += len(block)
        if first != len(self._rows):
            raise ValueError(f"the table must have {len(self._rows)} rows, got {first}")

    def rows(self, indices: Tensor, positions: Tensor, seed: int) -> Tensor:
        """(B,) int64 places in the table, on the CPU."""
        return self._table.rows_of(indices, positions, seed)

    def memory(self, size: int) -> Tensor | Moments:
        """x of `size` samples on the device, not yet written."""
        rows = torch.empty(
            (size, *self._table.row_shape), dtype=self._table.row_dtype, device=self._device
        )
        scale = self._table.row_scale
        return rows if scale is None else split(rows, scale)

    def take(self, rows: Tensor, out: Tensor | Moments) -> None:
        """Writes rows of the table into what `memory` gave, on the current stream."""
        whole = out
        if isinstance(out, Moments):
            shape = len(out.mean), *self._table.row_shape
            whole = out.mean.as_strided(shape, out.mean.stride(), out.mean.storage_offset())
        torch.index_select(self._rows, 0, rows, out=whole)
