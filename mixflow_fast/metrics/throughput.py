"""Waiting times and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType

import torch


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
        """The seconds; starts again at 0."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def peak_memory_mib(device: torch.device) -> float:
    """CUDA: the most that tensors took since the last call. CPU: the process's largest size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
