"""What training costs: images a second, FLOPs, waiting for data, peak memory."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

import torch

from mixflow_fast.metrics.stragglers import RankTime, Straggler, find_straggler

# What a rank tells the others of a window: its time, and its peak memory in MiB.
_Share = tuple[RankTime, float]


class Waited(Protocol):
    """What waiting for data took: seconds of the host, and of the device for copies."""

    host_s: float
    device_s: float

    def take(self) -> Waited:
        """The times; their count starts again at 0."""
        ...


class Stopwatch:
    """Seconds spent inside of `with` since `take` was called last."""

    def __init__(self) -> None:
        self._seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._seconds += time.perf_counter() - self._started

    def take(self) -> float:
        """The seconds; the count starts again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class DeviceStopwatch:
    """Seconds that a device spent on what was queued inside of `with`; reading them never waits.

    Args:
        device: on a CPU it is the time inside of `with`.
    """

    def __init__(self, device: torch.device) -> None:
        self._host = None if device.type == "cuda" else Stopwatch()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        if self._host is not None:
            self._host.__enter__()
            return
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._events.append(pair)
        pair[0].record()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._host is not None:
            self._host.__exit__(kind, value, traceback)
        else:
            self._events[-1][1].record()

    def take(self) -> float:
        """The seconds, without what the device has not come to; the count starts again at 0."""
        if self._host is not None:
            return self._host.take()
        events, self._events = self._events, []
        return sum(start.elapsed_time(end) for start, end in events if end.query()) / 1e3


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most that tensors took since the last call. CPU: the process's largest size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class Throughput:
    """Images, seconds and memory of training since the last row; what is paused is left out.

    Args:
        device: device of this rank.
        train_flops: FLOPs of the formula per image and training step, nothing computed twice; None
            for a network without one.
        peak_tflops: dense bf16 peak of the device, where that is known and what training uses.
        ranks: how many processes there are.
        all_gather: exchanges values between the ranks, as `HostGroup.all_gather`.

    Attributes:
        waited: of the loader that the loop reads from; None without one.
        working: runs during forward passes, the part of a step in which no rank waits for another.
        straggler: the rank that was much slower than the others in the last window, or None.
    """

    def __init__(
        self,
        device: torch.device,
        train_flops: int | None,
        peak_tflops: float | None,
        ranks: int,
        all_gather: Callable[[_Share], list[_Share]],
    ) -> None:
        self._device, self._flops, self._peak = device, train_flops, peak_tflops
        self._ranks, self._all_gather = ranks, all_gather
        self.waited: Waited | None = None
        self.working = DeviceStopwatch(device)
        self.straggler: Straggler | None = None
        self.restart()

    def restart(self) -> None:
        """Begin a window."""
        self._images = 0
        self._started = time.perf_counter()

    def add(self, images: int) -> None:
        """A step with so many images over all ranks is queued."""
        self._images += images

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is no training time."""
        if self._device.type == "cuda":  # steps that are still queued are training's time
            torch.cuda.synchronize(self._device)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - started

    def take(self) -> dict[str, float | None]:
        """What the window took, for its metrics row; begins the next. Every rank must call it.

        Returns:
            "images_per_s" over all ranks; "seconds"; "model_tflops" a device, None without a
            formula; "peak_tflops";
            "data_wait_s" of the host, "data_stall_s" of the device, "data_wait_fraction" of both in
            the window, and "peak_memory_mib" (tensors of the GPU; on a CPU the process) of the rank
            that has most; "slowest_rank" and "slowest_ratio" of the straggler, None without
            one; "time": seconds since 1970.
        """
        seconds = time.perf_counter() - self._started
        host_s, device_s = 0.0, 0.0
        if self.waited is not None:
            waited = self.waited.take()
            host_s, device_s = waited.host_s, waited.device_s
        time_spent = RankTime(socket.gethostname(), host_s, self.working.take(), device_s)
        shares = self._all_gather((time_spent, peak_memory_mib(self._device)))
        times, memory = zip(*shares, strict=True)
        self.straggler = slow = find_straggler(times, seconds)
        rate, flops = self._images / seconds, self._flops
        self.restart()
        return {
            "images_per_s": rate,
            "seconds": seconds,
            "model_tflops": flops and rate * flops / 1e12 / self._ranks,
            "peak_tflops": self._peak,
            "data_wait_s": max(spent.waiting_s for spent in times),
            "data_stall_s": max(spent.stalled_s for spent in times),
            "data_wait_fraction": min(1.0, max(spent.data_s for spent in times) / seconds),
            "slowest_rank": None if slow is None else slow.rank,
            "slowest_ratio": None if slow is None else slow.ratio,
            "peak_memory_mib": max(memory),
            "time": time.time(),
        }
