"""A GPU's streams on the CPU, as late as they may be: what is queued runs some time after."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class LateEvent:
    """Nobody waits for one that was not recorded; recorded again, it is another one."""

    def __init__(self, waiting: set[str]) -> None:
        self._done = threading.Event()
        self._done.set()
        self._waiting, self.at = waiting, 0.0

    def record(self, stream: LateStream) -> None:
        self._done = done = threading.Event()

        def reached() -> None:
            self.at = time.perf_counter()
            done.set()

        stream.queue(reached)

    def query(self) -> bool:
        return self._done.is_set()

    def synchronize(self) -> None:
        self._waiting.add(threading.current_thread().name)
        assert self._done.wait(20)

    def waiter(self) -> Callable[[], None]:
        """What waits for the record that was the last one when this was called."""
        done = self._done
        return lambda: assert_done(done)

    def elapsed_time(self, end: LateEvent) -> float:
        return 1e3 * (end.at - self.at)


def assert_done(done: threading.Event) -> None:
    assert done.wait(20)


class LateStream:
    """Runs what is queued in order, each thing a random time after the one before.

    Args:
        late_s: at most so many seconds.
    """

    def __init__(self, late_s: float, seed: int) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._late, self._random = late_s, random.Random(seed)
        threading.Thread(target=self._run, daemon=True).start()

    def queue(self, call: Callable[[], None]) -> None:
        self._queue.put(call)

    def wait_event(self, event: LateEvent) -> None:
        self.queue(event.waiter())

    def synchronize(self) -> None:
        done = threading.Event()
        self.queue(done.set)
        assert done.wait(20)

    def _run(self) -> None:
        while True:
            call = self._queue.get()
            time.sleep(self._random.random() * self._late)
            call()


class LateCopies:
    """Stands in for `CopyStream`.

    Attributes:
        training: the stream of the training thread.
        allocated: how often there was memory to make.
        waiting: names of the threads that waited for a stream or an event.
    """

    def __init__(self, copy_s: float = 0.003, train_s: float = 0.003, seed: int = 0) -> None:
        self._stream = LateStream(copy_s, seed)
        self.training = LateStream(train_s, seed + 1)
        self.allocated, self.waiting = 0, set[str]()

    def enter_thread(self) -> None:
        pass

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.allocated += 1
        return torch.zeros(tuple(shape), dtype=dtype)

    def device_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        self.allocated += 1
        return torch.zeros(tuple(shape), dtype=dtype)

    def event(self, timing: bool = False) -> LateEvent:
        return LateEvent(self.waiting)

    def current(self) -> LateStream:
        return self.training

    def send(
        self, pairs: Sequence[tuple[Tensor, Tensor]], after: LateEvent, ready: LateEvent
    ) -> None:
        self._stream.wait_event(after)
        for host, device in pairs:
            self._stream.queue(lambda host=host, device=device: device.copy_(host))
        ready.record(self._stream)

    def synchronize(self) -> None:
        self.waiting.add(threading.current_thread().name)
        self._stream.synchronize()
