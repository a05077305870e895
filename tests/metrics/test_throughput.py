"""Waiting times and peak memory."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.metrics.throughput import Stopwatch, peak_memory_mib


def test_stopwatch_counts_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 2.5 and watch.take() == 0.0


def test_memory_of_this_process() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    block = torch.ones(64 << 18)  # 64 MiB
    assert 1 < before <= peak_memory_mib(torch.device("cpu")) < 1 << 20
    del block
