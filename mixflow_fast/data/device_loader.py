"""Micro-batches of one rank on the device, made ahead in a ring of memory that is allocated once.

    order -> threads fill a pinned host slot -> copy stream -> device slot -> training step

The ring has `depth` slots: memory of one micro-batch on the host, and on a GPU as much there. A
thread, the producer, gives slots that are free to worker threads, which fill parts of them; it
sends full slots to the device on a stream of its own, in the order of the positions. The training
thread waits for the producer alone, on the host, and has its stream wait for the copy, on the
device: it does not synchronise with the device, and no memory is allocated.

What keeps a slot whole, on a GPU:
    * its host memory is written again after its last copy is complete (`ready`),
    * its device memory is written again after all that was queued before the next `next` has run
      (`free`, recorded on the training thread's stream in that `next`).

On a CPU there is no second memory: the batch is the host slot itself.
"""

from __future__ import annotations

import functools
import operator
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType

import torch
from torch import Tensor

from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.data.copy_stream import CopyStream, Event, WaitTimes
from mixflow_fast.data.dataset import Batch, Dataset, fill
from mixflow_fast.data.microbatch_order import MicrobatchOrder
from mixflow_fast.data.resident import Resident

_NAME = "mixflow_fast-loader"
# Fewer rows are not worth a task of their own.
_LEAST_ROWS = 8
# How many micro-batches ahead of the filling a dataset is told what will be read.
_AHEAD = 2


@dataclass
class _Slot:
    """Memory of one micro-batch; where batches have several shapes, of the largest.

    Attributes:
        shapes: (host, batch) as views of the memory for each bucket of the dataset.
        host: what the workers fill; pinned where there is a GPU.
        batch: what the training step gets; on a CPU `host` itself.
        rows, device_rows: (B,) int64 places of the samples in a resident table, or None.
        ready, free: events of a GPU, see above; None on a CPU.
        waiting: parts that are not filled yet.
    """

    shapes: list[tuple[Batch, Batch]]
    host: Batch
    batch: Batch
    rows: Tensor | None = None
    device_rows: Tensor | None = None
    ready: Event | None = None
    free: Event | None = None
    waiting: int = 0


class _Ring:
    """The slots, and how they are filled and sent. Holds no loader, so that one can be collected.

    Args:
        dataset, order, seed: what is filled in.
        microstep: the first one.
        device: where the batches go.
        sizes: rows of a micro-batch, and the number of slots.
        workers: threads that fill.
        resident: a table on the device that x is taken from, or None.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: MicrobatchOrder,
        seed: int,
        microstep: int,
        device: torch.device,
        sizes: tuple[int, int],
        workers: int,
        resident: Resident | None,
    ) -> None:
        self._dataset, self._order, self._seed = dataset, order, seed
        self._next, self._workers, self._resident = microstep, workers, resident
        self.size, self.depth = sizes
        # ("free", slot), ("filled", slot) or ("stop", None), for the producer.
        self.events: queue.SimpleQueue[tuple[str, _Slot | None]] = queue.SimpleQueue()
        # Full slots in their order, or what went wrong.
        self.ready: queue.SimpleQueue[_Slot | BaseException] = queue.SimpleQueue()
        self._coming: deque[tuple[Tensor, Tensor]] = deque()
        # What lies on the device is not read again.
        self._willneed = None if resident is not None else getattr(dataset, "willneed", None)
        self._lock = threading.Lock()
        self.copies = CopyStream(device) if device.type == "cuda" else None

    def produce(self) -> None:
        """What the producer does until it is told to stop."""
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix=f"{_NAME}-worker")
        filling: deque[tuple[_Slot, list[Future[None]]]] = deque()
        try:
            if self.copies is not None:
                self.copies.enter_thread()
            for slot in self.allocate():
                self.events.put(("free", slot))
            while True:
                kind, slot = self.events.get()
                if kind == "stop":
                    break
                if kind == "free":
                    filling.append((slot, self._begin(slot, pool)))
                while filling and not filling[0][0].waiting:
                    slot, parts = filling.popleft()
                    for part in parts:
                        part.result()
                    self.send(slot)
                    self.ready.put(slot)
            self.finish()  # of a loader that nobody closed, too: its memory goes with this thread
        except BaseException as error:  # the training thread raises it in its place
            self.ready.put(error)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def allocate(self) -> list[_Slot]:
        """Slots for batches like those that the dataset gives of each of its buckets."""
        _, positions = self._order(self._next)
        sizes = bucket_sizes(self._dataset)
        firsts = torch.tensor([sum(sizes[:number]) for number in range(len(sizes))])
        likes = [self._dataset.get(first[None], positions[:1], self._seed) for first in firsts]
        if self._resident is not None:
            likes = [replace(like, x=None) for like in likes]
        slots = []
        for _ in range(self.depth):
            hosts = _views(likes, self.size, self._host_memory)
            batches = hosts
            if self.copies is not None:
                batches = _views(likes, self.size, self._device_memory)
            shapes = list(zip(hosts, batches, strict=True))
            slot = _Slot(shapes, *shapes[0])
            if self.copies is not None:
                slot.ready, slot.free = self.copies.event(), self.copies.event()
            if self._resident is not None:
                slot.rows = slot.device_rows = self._host_memory((self.size,), torch.int64)
                if self.copies is not None:
                    slot.device_rows = self._device_memory((self.size,), torch.int64)
                slot.batch = replace(slot.batch, x=self._resident.memory(self.size))
                slot.shapes = [(slot.host, slot.batch)]
            slots.append(slot)
        return slots

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.copies is not None:
            return self.copies.host_memory(shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def _device_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.copies.device_memory(shape, dtype)

    def _task(self) -> tuple[Tensor, Tensor]:
        """(indices, positions) of the next micro-step; tells the dataset which ones follow."""
        ahead = 1 if self._willneed is None else 1 + _AHEAD
        while len(self._coming) < ahead:
            task = self._order(self._next)
            self._next += 1
            if self._willneed is not None:
                self._willneed(*task, self._seed)
            self._coming.append(task)
        return self._coming.popleft()

    def parts(self, slot: _Slot, workers: int) -> list[Callable[[], None]]:
        """The next micro-step, cut into calls that fill a slot."""
        if slot.ready is not None:
            slot.ready.synchronize()  # its last copy reads the host memory
        indices, positions = self._task()
        slot.host, slot.batch = slot.shapes[self._order.indices_at.bucket_of(int(indices[0]))]
        if self._resident is not None:
            slot.rows.copy_(self._resident.rows(indices, positions, self._seed))
        rows = max(_LEAST_ROWS, -(-self.size // max(workers, 1)))
        calls = []
        for first in range(0, self.size, rows):
            part = slice(first, first + rows)
            out = slot.host.map(operator.itemgetter(part))
            task = indices[part], positions[part], self._seed
            calls.append(functools.partial(fill, self._dataset, out, *task))
        return calls

    def _begin(self, slot: _Slot, pool: ThreadPoolExecutor) -> list[Future[None]]:
        """Has the workers fill a slot; the last one tells the producer."""
        calls = self.parts(slot, self._workers)
        slot.waiting = len(calls)

        def done(_: Future[None]) -> None:
            with self._lock:
                slot.waiting -= 1
                last = not slot.waiting
            if last:
                self.events.put(("filled", slot))

        futures = [pool.submit(call) for call in calls]
        for future in futures:
            future.add_done_callback(done)
        return futures

    def send(self, slot: _Slot) -> None:
        """Queue the copy of a full slot to the device."""
        if self.copies is None:
            return
        # x of a resident table is there already.
        sent = slot.batch if self._resident is None else replace(slot.batch, x=None)
        pairs = list(zip(slot.host.buffers(), sent.buffers(), strict=True))
        if slot.rows is not None:
            pairs.append((slot.rows, slot.device_rows))
        self.copies.send(pairs, slot.free, slot.ready)

    def finish(self) -> None:
        """Wait for the copies, before the memory goes."""
        if self.copies is not None:
            self.copies.synchronize()


def _views(
    likes: Sequence[Batch], rows: int, memory: Callable[[tuple[int, ...], torch.dtype], Tensor]
) -> list[Batch]:
    """Batches of some shapes in the memory of the largest.

    Args:
        likes: a batch of one row of each shape.
        rows: of each batch.
        memory: (shape, dtype) -> memory.
    """
    columns = list(zip(*(like.buffers() for like in likes), strict=True))
    largest = [max(column, key=torch.Tensor.numel) for column in columns]
    owners = [memory((rows, *like.shape[1:]), like.dtype) for like in largest]

    def batch(like: Batch) -> Batch:
        remaining = iter(owners)

        def view(row: Tensor) -> Tensor:
            owner = next(remaining)
            return owner.view(-1)[: rows * row.numel()].view(rows, *row.shape[1:])

        return like.map(view)

    return [batch(like) for like in likes]


class DeviceLoader:
    """An endless iterator over the micro-batches of one rank, on the device.

    A batch is valid until the next `next`, which gives its memory to another one: clone what is
    to be kept (`batch.map(torch.clone)`). An exception in a worker is raised by the `next` that
    would have returned its batch, and closes the loader. Use it as a context manager, or call
    `close`.

    Args:
        dataset: the samples. With a method `fill` they are written straight into the ring (see
            `dataset.fill`); with `willneed(indices, positions, seed)` it is told early what will
            be read.
        device: where the batches are used.
        seed, global_batch_size, microbatch_size, rank, world_size, shuffle: as `MicrobatchOrder`.
        start_position: global position to start at, a multiple of global_batch_size; costs the
            same wherever it is.
        depth: micro-batches in the ring, of which the training step has one.
        workers: threads that prepare examples; 0 prepares them in the caller.
        resident: a table on the device that x is taken from, or None.
        poison: overwrite a batch when it is left, with NaN and the like, to find uses after that.

    Attributes:
        microsteps: micro-batches of one optimizer step on this rank.
        wait: what waiting for data took.

    Raises:
        ValueError: sizes that do not divide, a bad rank or start, an empty dataset.
    """

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device,
        *,
        seed: int,
        global_batch_size: int,
        microbatch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_position: int = 0,
        shuffle: bool = True,
        depth: int = 3,
        workers: int = 2,
        resident: Resident | None = None,
        poison: bool = False,
    ) -> None:
        for name, value, low in (("depth", depth, 1), ("workers", workers, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        self._order = MicrobatchOrder(
            bucket_sizes(dataset),
            seed=seed,
            global_batch_size=global_batch_size,
            microbatch_size=microbatch_size,
            rank=rank,
            world_size=world_size,
            shuffle=shuffle,
        )
        self.microsteps, self.wait = self._order.microsteps, WaitTimes()
        self._microstep = self._order.microstep_at(start_position)
        self._resident, self._poison = resident, poison
        sizes = microbatch_size, depth if workers else 1
        self._ring = ring = _Ring(
            dataset, self._order, seed, self._microstep, device, sizes, workers, resident
        )
        self._current: _Slot | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        if workers:
            # The thread holds the ring, never the loader.
            self._thread = threading.Thread(target=ring.produce, name=_NAME, daemon=True)
            self._thread.start()
            weakref.finalize(self, ring.events.put, ("stop", None))

    @property
    def position(self) -> int:
        """First global position of the optimizer step that the next micro-batch belongs to."""
        return self._order.step_position(self._microstep)

    def __iter__(self) -> DeviceLoader:
        return self

    def __next__(self) -> Batch:
        """The next micro-batch; the memory of the last one goes to another."""
        if self._closed:
            raise RuntimeError(
                "the DeviceLoader is closed; make a new one at the position you need"
            )
        try:
            left = self._leave()
            started = time.perf_counter()
            slot = self._filled_here(left) if self._thread is None else self._filled(left)
            self.wait.host_s += time.perf_counter() - started
        except BaseException:
            self.close()
            raise
        if slot.ready is not None:
            self.wait.have_wait(self._ring.copies, slot.ready)
        if self._resident is not None:
            self._resident.take(slot.device_rows, slot.batch.x)
        self._current = slot
        self._microstep += 1
        self.wait.batches += 1
        return slot.batch

    def _leave(self) -> _Slot | None:
        """What the last batch was in; from here on its memory may be written again."""
        slot, self._current = self._current, None
        if slot is None:
            return None
        if self._poison:
            for value in slot.batch.buffers():
                bad = torch.nan if value.is_floating_point() else torch.iinfo(value.dtype).max
                value.fill_(bad)
        if slot.free is not None:
            slot.free.record(self._ring.copies.current())
        return slot

    def _filled(self, left: _Slot | None) -> _Slot:
        """The next full slot of the ring."""
        if left is not None:
            self._ring.events.put(("free", left))
        found = self._ring.ready.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _filled_here(self, slot: _Slot | None) -> _Slot:
        """The only slot, filled by the caller."""
        if slot is None:
            (slot,) = self._ring.allocate()
        for part in self._ring.parts(slot, 0):
            part()
        self._ring.send(slot)
        return slot

    def close(self) -> None:
        """Stops the threads, after the examples they are at. Safe to call twice."""
        self._closed, self._current = True, None
        if self._thread is not None:
            self._ring.events.put(("stop", None))
            self._thread.join()
            self._thread = None
        self._ring.finish()

    def __enter__(self) -> DeviceLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
