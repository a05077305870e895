"""Which samples a rank's micro-batches hold: the order that the global position defines.

Optimizer step s covers the global positions [s G, (s+1) G). Its micro-step a on rank r takes

    s G + (a W + r) M + (0 .. M-1),   a = 0 .. G / (M W) - 1

with G the global batch, M the micro-batch, W the ranks. Whatever the split into ranks and
micro-batches, a step trains on the same positions, and a position is the same sample with the same
random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixflow_fast.data.bucket_order import BucketOrder

_BLOCK = 8192  # positions whose indices are computed at once: the cost is per call


def _check_int(name: str, value: int, low: int, unit: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low} ({unit}), got {value!r}")


class MicrobatchOrder:
    """The order of one rank's micro-batches; random access, and the same cost everywhere.

    Args:
        sizes: samples of the dataset, or of each of its buckets: a step is then of one bucket.
        seed: in [0, 2**64).
        global_batch_size: samples of one optimizer step, over all ranks.
        microbatch_size: samples of one forward pass on one rank.
        rank, world_size: this process, and how many there are.
        shuffle: False keeps the stored order.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.
        indices_at: from global positions to the samples there.

    Raises:
        ValueError: sizes that do not divide, a bad rank or seed, an empty dataset.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        *,
        seed: int,
        global_batch_size: int,
        microbatch_size: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
    ) -> None:
        _check_int("global_batch_size", global_batch_size, 1, "samples of one optimizer step")
        _check_int("microbatch_size", microbatch_size, 1, "samples of one forward pass")
        _check_int("world_size", world_size, 1, "processes")
        _check_int("rank", rank, 0, "process number")
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
        if global_batch_size % (microbatch_size * world_size):
            raise ValueError(
                "global_batch_size must be a multiple of microbatch_size * world_size = "
                f"{microbatch_size} * {world_size} = {microbatch_size * world_size}, "
                f"got {global_batch_size}"
            )
        sizes = [sizes] if isinstance(sizes, int) else list(sizes)
        if sum(sizes) < 1:
            raise ValueError("dataset must hold at least one sample, got an empty one")
        self.indices_at = BucketOrder(
            sizes, seed=seed, global_batch_size=global_batch_size, shuffle=shuffle
        )
        self._global_batch_size, self._microbatch_size = global_batch_size, microbatch_size
        self._rank, self._world_size = rank, world_size
        self.microsteps = global_batch_size // (microbatch_size * world_size)
        self._block_start = 0
        self._block_positions = torch.empty(0, microbatch_size, dtype=torch.int64)
        self._block_indices = self._block_positions

    def microstep_at(self, start_position: int) -> int:
        """The number of the micro-step that starts at a global position.

        Raises:
            ValueError: no optimizer step starts there.
        """
        _check_int("start_position", start_position, 0, "samples")
        batch = self._global_batch_size
        if start_position % batch:
            raise ValueError(
                f"start_position must be a multiple of global_batch_size = {batch}, got "
                f"{start_position}; the step that holds it starts at "
                f"{start_position - start_position % batch}"
            )
        return start_position // batch * self.microsteps

    def step_position(self, microstep: int) -> int:
        """First global position of the optimizer step that a micro-step belongs to."""
        return microstep // self.microsteps * self._global_batch_size

    def __call__(self, microstep: int) -> tuple[Tensor, Tensor]:
        """(indices, positions) of one micro-step, each (M,) int64; not for several threads."""
        row = microstep - self._block_start
        if not 0 <= row < len(self._block_positions):
            count = max(1, _BLOCK // self._microbatch_size)
            number = torch.arange(microstep, microstep + count)
            step, part = number // self.microsteps, number % self.microsteps
            first = (
                step * self._global_batch_size
                + (part * self._world_size + self._rank) * self._microbatch_size
            )
            positions = first[:, None] + torch.arange(self._microbatch_size)
            indices = self.indices_at(positions.flatten())
            self._block_start, row = microstep, 0
            self._block_positions, self._block_indices = positions, indices.view_as(positions)
        # Clones: a batch that is kept must not keep the block.
        return self._block_indices[row].clone(), self._block_positions[row].clone()
