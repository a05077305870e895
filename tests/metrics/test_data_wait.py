"""The sentence on data that come too slowly."""

from __future__ import annotations

from mixflow_fast.metrics.data_wait import DataWaitWatch, WaysOut

WAYS = WaysOut(preparing="raise data.workers", copying="set data.resident=on")


def row(wait_s: float, stall_s: float = 0.0, seconds: float = 10.0) -> dict[str, object]:
    fraction = (wait_s + stall_s) / seconds
    return {"data_wait_s": wait_s, "data_stall_s": stall_s, "data_wait_fraction": fraction}


def said(rows: list[dict[str, object]], every: int = 50, start: int = 0) -> list[str | None]:
    watch = DataWaitWatch(WAYS, start)
    return [watch.sentence(start + every * (n + 1), values) for n, values in enumerate(rows)]


def test_a_hundred_slow_steps_in_a_row_are_said_once() -> None:
    assert said([row(1.0)] * 5) == [
        None,
        "data: training waited for them for 10% of its last steps; the slowest stage is preparing "
        "examples: raise data.workers",
        *[None] * 3,
    ]
    assert said([row(1.0), row(0.4), row(1.0)]) == [None] * 3
    assert said([row(0.5)] * 5) == [None] * 5
    assert said([row(1.0)], every=100)[0]
    # A run that goes on counts its own steps.
    assert said([row(1.0)], start=1000) == [None]


def test_the_slower_stage_is_named() -> None:
    sentence = said([row(0.4, 0.6)], every=100)[0]
    assert "copying batches to the device: set data.resident=on" in sentence
