"""Micro-batches of one rank, in the order that the global position defines.

Optimizer step s covers the global positions [s G, (s+1) G). Its micro-step a on rank r takes

    s G + (a W + r) M + (0 .. M-1),   a = 0 .. G / (M W) - 1

with G the global batch, M the micro-batch, W the ranks. Whatever the split into ranks and
micro-batches, a step trains on the same positions, and a position is the same sample with the same
random numbers.
"""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from mixflow_fast.data.dataset import Batch, Dataset
from mixflow_fast.data.order import sample_index

_ORDER_BLOCK = 8192  # positions whose indices are computed at once: the cost is per call


def _check_int(name: str, value: int, low: int, unit: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer >= {low} ({unit}), got {value!r}")


def _shutdown(pool: ThreadPoolExecutor) -> None:
    # Must not wait: the garbage collector may run this in a worker.
    pool.shutdown(wait=False, cancel_futures=True)


class BatchLoader:
    """An endless iterator over the micro-batches of one rank.

    With `num_workers` > 0 a pool of threads prepares up to 2 * num_workers micro-batches ahead;
    the order stays the same. An exception in a worker is raised by the `next` that would have
    returned its batch, and closes the loader. Use it as a context manager, or call `close`.

    Args:
        dataset: the samples.
        seed: in [0, 2**64), for the order and for what the dataset draws.
        global_batch_size: samples of one optimizer step, over all ranks.
        microbatch_size: samples of one forward pass on one rank.
        rank, world_size: this process, and how many there are.
        start_position: global position to start at, a multiple of global_batch_size; costs the
            same wherever it is.
        num_workers: threads; 0 prepares each batch in the caller.
        shuffle: False keeps the stored order.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.

    Raises:
        ValueError: sizes that do not divide, a bad rank or start, an empty dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch_size: int,
        microbatch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        num_workers: int = 0,
        shuffle: bool = True,
    ) -> None:
        _check_int("global_batch_size", global_batch_size, 1, "samples of one optimizer step")
        _check_int("microbatch_size", microbatch_size, 1, "samples of one forward pass")
        _check_int("world_size", world_size, 1, "processes")
        _check_int("rank", rank, 0, "process number")
        _check_int("start_position", start_position, 0, "samples")
        _check_int("num_workers", num_workers, 0, "threads")
        if rank >= world_size:
            raise ValueError(f"rank must be below world_size = {world_size}, got {rank}")
        if global_batch_size % (microbatch_size * world_size):
            raise ValueError(
                "global_batch_size must be a multiple of microbatch_size * world_size = "
                f"{microbatch_size} * {world_size} = {microbatch_size * world_size}, "
                f"got {global_batch_size}"
            )
        if start_position % global_batch_size:
            raise ValueError(
                f"start_position must be a multiple of global_batch_size = {global_batch_size}, "
                f"got {start_position}; the step that holds it starts at "
                f"{start_position - start_position % global_batch_size}"
            )
        if len(dataset) < 1:
            raise ValueError("dataset must hold at least one sample, got an empty one")
        # Refuses a bad seed here and not in a worker.
        sample_index(torch.zeros(1, dtype=torch.int64), len(dataset), seed)

        self.dataset = dataset
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.microbatch_size = microbatch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.microsteps = global_batch_size // (microbatch_size * world_size)
        self._microstep = start_position // global_batch_size * self.microsteps  # next to return
        self._submitted = self._microstep  # next to prepare
        self._block_start = 0
        self._block_positions = torch.empty(0, microbatch_size, dtype=torch.int64)
        self._block_indices = self._block_positions
        self._lookahead = 2 * num_workers
        self._pending: deque[Future[Batch]] = deque()
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None
        if num_workers:
            self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="mixflow_fast-loader")
            weakref.finalize(self, _shutdown, self._pool)

    @property
    def position(self) -> int:
        """First global position of the optimizer step that the next micro-batch belongs to."""
        return self._microstep // self.microsteps * self.global_batch_size

    def _order(self, microstep: int) -> tuple[Tensor, Tensor]:
        """(indices, positions) of one micro-step, each (M,) int64."""
        row = microstep - self._block_start
        if not 0 <= row < len(self._block_positions):
            count = max(1, _ORDER_BLOCK // self.microbatch_size)
            number = torch.arange(microstep, microstep + count)
            step, part = number // self.microsteps, number % self.microsteps
            first = (
                step * self.global_batch_size
                + (part * self.world_size + self.rank) * self.microbatch_size
            )
            positions = first[:, None] + torch.arange(self.microbatch_size)
            indices = sample_index(positions.flatten(), len(self.dataset), self.seed, self.shuffle)
            self._block_start, row = microstep, 0
            self._block_positions, self._block_indices = positions, indices.view_as(positions)
        # Clones: a batch that is kept must not keep the block.
        return self._block_indices[row].clone(), self._block_positions[row].clone()

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("the BatchLoader is closed; make a new one at the position you need")
        try:
            if self._pool is None:
                indices, positions = self._order(self._microstep)
                batch = self.dataset.get(indices, positions, self.seed)
            else:
                while len(self._pending) < self._lookahead:
                    task = self._order(self._submitted)
                    # The task holds the dataset, never the loader, so the loader can be collected.
                    self._pending.append(self._pool.submit(self.dataset.get, *task, self.seed))
                    self._submitted += 1
                batch = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._microstep += 1
        return batch

    def close(self) -> None:
        """Stops the threads, after the batches they are in. Safe to call twice."""
        self._closed = True
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
