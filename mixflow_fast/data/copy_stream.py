"""The stream that brings batches to a GPU, and the events that order it with the training's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """What is used of `torch.cuda.Event`."""

    def record(self, stream: Stream) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float: ...


class Stream(Protocol):
    """What is used of `torch.cuda.Stream`."""

    def wait_event(self, event: Event) -> None: ...


class CopyStream:
    """Memory on both sides, and copies from one to the other beside what the GPU computes.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def enter_thread(self) -> None:
        """Once in every thread that uses it: threads begin on the first GPU."""
        torch.cuda.set_device(self._device)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Pinned memory: a copy from other memory makes the host wait."""
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def device_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the GPU, which the first copy may write as soon as it is free there."""
        memory = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        # The allocator gives memory back in the order of this thread's stream, not of the copies'.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return memory

    def event(self, timing: bool = False) -> Event:
        """An event that was not recorded yet: nothing waits for it."""
        return torch.cuda.Event(enable_timing=timing)

    def current(self) -> Stream:
        """The stream that the calling thread queues its work on."""
        return torch.cuda.current_stream(self._device)

    def send(self, pairs: Sequence[tuple[Tensor, Tensor]], after: Event, ready: Event) -> None:
        """Queue copies.

        Args:
            pairs: (on the host, on the device).
            after: what they wait for.
            ready: recorded behind them.
        """
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            for host, device in pairs:
                device.copy_(host, non_blocking=True)
            ready.record(self._stream)

    def synchronize(self) -> None:
        """Wait for all copies."""
        self._stream.synchronize()


@dataclass
class WaitTimes:
    """What waiting for data took since it was read last.

    Attributes:
        host_s: seconds that `next` was blocked: the examples were not prepared.
        device_s: seconds that the device waited for copies of batches: they were not sent in time.
        batches: micro-batches given out.
    """

    host_s: float = 0.0
    device_s: float = 0.0
    batches: int = 0
    _stalls: deque[tuple[Event, Event]] = field(default_factory=deque, repr=False, compare=False)

    def take(self) -> WaitTimes:
        """The times, without stalls that the device has not come to; the count starts again."""
        # In their order: the last ones may still run, and the host must not wait for them.
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self.device_s += before.elapsed_time(after) / 1e3
        taken = WaitTimes(self.host_s, self.device_s, self.batches)
        self.host_s, self.device_s, self.batches = 0.0, 0.0, 0
        return taken

    def have_wait(self, copies: CopyStream, ready: Event) -> None:
        """Has the current stream wait for an event, and notes for how long it does."""
        stream, before, after = copies.current(), copies.event(True), copies.event(True)
        before.record(stream)
        stream.wait_event(ready)
        after.record(stream)
        self._stalls.append((before, after))
