"""Micro-batches of one rank, prepared by threads, in the order of `MicrobatchOrder`."""

from __future__ import annotations

import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.data.dataset import Batch, Dataset
from mixflow_fast.data.microbatch_order import MicrobatchOrder


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
        if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 0:
            raise ValueError(f"num_workers must be an integer >= 0 (threads), got {num_workers!r}")
        self._order = MicrobatchOrder(
            bucket_sizes(dataset),
            seed=seed,
            global_batch_size=global_batch_size,
            microbatch_size=microbatch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        self.dataset = dataset
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.microbatch_size = microbatch_size
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.microsteps = self._order.microsteps
        self._microstep = self._order.microstep_at(start_position)  # next to return
        self._submitted = self._microstep  # next to prepare
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
        return self._order.step_position(self._microstep)

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
