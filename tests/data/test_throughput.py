"""The race of loaders: turns, what is timed, and the arithmetic."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

import pytest

from mixflow_fast.data import throughput
from mixflow_fast.data.throughput import Contestant, Rates, race


@dataclass
class Five:
    y: tuple[int, ...] = (0,) * 5


def batches(log: list[str], name: str, seconds: float):
    for _ in itertools.count():
        log.append(name)
        time.sleep(seconds)
        yield Five()


def test_turns_alternate_and_what_was_prepared_ahead_is_taken_before() -> None:
    log: list[str] = []
    loaders = {
        "fast": Contestant(batches(log, "fast", 0.002), before=4, finish=lambda: log.append("end")),
        "slow": Contestant(batches(log, "slow", 0.02), before=1),
    }
    turns: list[int] = []
    rates = race(loaders, 0.05, 2, turns.append)
    assert [name for name, _ in itertools.groupby(log) if name != "end"] == [
        "fast", "fast", "slow", "fast", "fast",
    ]  # fmt: skip
    assert log[:5] == ["fast"] * 4 + ["end"] and sum(turns) == 4
    assert rates["fast"].ratio(rates["slow"]) > 3
    assert all(100 < rate < 251 for rate in rates["slow"].per_s)


def test_rates_are_examples_by_wall_and_cpu_time(monkeypatch) -> None:
    clock, cpu = itertools.count(0.0, 0.5), itertools.count(0.0, 0.25)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    loaders = {"one": Contestant(iter(lambda: Five(), None), 0, cpu_s=lambda: next(cpu))}
    rates = race(loaders, 2.0, 1)["one"]
    # Start at 0, looked at after each batch at 0.5 to 2.0, the end at 2.5.
    assert rates.per_s == [pytest.approx(20 / 2.5)]
    assert rates.cpu_ms == [pytest.approx(250 / 20)]


def test_ratios_are_of_the_same_round() -> None:
    assert Rates([10.0, 40.0, 90.0], []).ratio(Rates([10.0, 20.0, 30.0], [])) == 2.0
