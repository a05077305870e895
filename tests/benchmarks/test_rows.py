"""The benchmarks' rows: statistics, deadlines, what is on disk, the device."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks import rows
from benchmarks.rows import (
    KEYS,
    Deadline,
    Expectation,
    Writer,
    latest,
    paired_ratio,
    percentiles,
    read,
)

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_percentiles_of_known_samples() -> None:
    assert percentiles(range(101)) == (20, 50, 80)
    assert percentiles([3.0]) == (3, 3, 3)
    assert percentiles([4.0, 1.0]) == pytest.approx((1.6, 2.5, 3.4))
    for bad in ([], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="samples must be one or more finite"):
            percentiles(bad)


def test_paired_ratio_cancels_what_both_share() -> None:
    drift = np.array([1.0, 5.0, 0.2, 3.0, 9.0, 0.7])
    assert paired_ratio(2 * drift, drift) == (2, 2, 2, 2, 2)
    slower, faster = drift * [1.9, 2.0, 2.1, 2.2, 1.8, 2.05], drift
    ratio = paired_ratio(slower, faster)
    assert ratio.p50 == pytest.approx(2.025)
    assert 1.8 <= ratio.low95 < ratio.p50 < ratio.high95 <= 2.2
    assert paired_ratio(slower, faster) == ratio
    assert paired_ratio(faster, slower).p50 == pytest.approx(np.median(faster / slower))


def test_interval_is_that_of_all_resamples() -> None:
    """With five rounds all 3125 resamples can be listed."""
    other = np.array([1.0, 1.3, 0.9, 2.0, 1.1])
    medians = [np.median(draw) for draw in itertools.product(other, repeat=5)]
    ratio = paired_ratio(other, np.ones(5), resamples=20_000)
    assert (ratio.low95, ratio.high95) == pytest.approx(np.percentile(medians, (2.5, 97.5)))


@pytest.mark.parametrize(
    ("other", "ours", "message"),
    [
        ([1.0, 2.0], [1.0], "one time per round"),
        ([], [], "one time per round"),
        ([1.0, 0.0], [1.0, 1.0], "finite and positive"),
        ([1.0, 1.0], [1.0, float("inf")], "finite and positive"),
    ],
)
def test_paired_ratio_refuses(other, ours, message) -> None:
    with pytest.raises(ValueError, match=message):
        paired_ratio(other, ours)


def test_deadline_names_what_did_not_fit() -> None:
    clock = Clock()
    deadline = Deadline(10, clock)
    assert deadline.fits("a", 10) and deadline.report() == ""
    clock.now += 7
    assert not deadline.fits("b", 4) and deadline.fits("c", 2)
    clock.now += 7
    assert deadline.left() == -4 and not deadline.fits("d", 0)
    assert deadline.left_out == ["b", "d"]
    assert deadline.report().split("\n") == ["left out, 10 s were not enough:", "  b", "  d"]
    assert Deadline(None, clock).fits("e", 1e9)
    with pytest.raises(ValueError, match="deadline must be"):
        Deadline(-1)


def test_expectation_follows_the_last_cells() -> None:
    expectation = Expectation(first=20, margin=1.5, last=2)
    assert expectation.seconds() == 20
    for seconds, expected in ((4, 6), (2, 6), (1, 3)):
        expectation.saw(seconds)
        assert expectation.seconds() == expected


def test_one_slow_cell_does_not_keep_out_those_that_follow() -> None:
    expectation = Expectation(first=20, cap=8)
    assert expectation.seconds() == 20
    for seconds, expected in ((60, 8), (2, 8), (2, 8), (2, 8), (2, 2.5)):
        expectation.saw(seconds)
        assert expectation.seconds() == expected


def test_rows_are_on_disk_with_every_key(tmp_path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    writer = Writer(path, ENVIRONMENT, "smoke: not a speed")
    cell = dict(op="interpolate", provider="eager", mode="forward", shape=[1, 2], dtype="float32")
    writer.add(**cell, metric="latency_ms", p50=2.0, p20=1.0, p80=3.0, note="plain")
    assert len(read(path)) == 1
    writer.add(**cell, metric="latency_ms", p50=5.0)
    writer.add(**cell, metric="launches", p50=None, note="why")
    found = read(path)
    assert [set(row) for row in found] == [set(KEYS)] * 3 and writer.count == 3
    assert found[0]["note"] == "smoke: not a speed; plain" and found[0]["device"] == "here"
    assert [row["p50"] for row in latest(found)] == [5.0, None]
    with path.open("a") as file:
        file.write('{"op": "cut o')
    assert read(path) == found
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            writer.add(**cell, metric="latency_ms", p50=bad)
    with pytest.raises(ValueError, match="speed"):
        writer.add(**cell, metric="latency_ms", p50=1.0, speed=3)
    path.write_text('{"op": "interpolate"}\n')
    with pytest.raises(ValueError, match="lacks"):
        read(path)


def test_commands_choose_the_interpreter_before_triton_is_imported() -> None:
    """In a process of its own: these tests have chosen it already (`tests/conftest.py`)."""
    code = (
        "import benchmarks.{}; from mixflow_fast.kernels import runtime; "
        "assert runtime.triton is None or runtime.interpreting()"
    )
    hidden = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    hidden |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(rows.ROOT)}
    for module in ("run", "checks"):
        command = [sys.executable, "-c", code.format(module)]
        done = subprocess.run(command, env=hidden, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def test_commit_without_git(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_SHA", raising=False)
    assert rows.git_sha() == "unknown"
    monkeypatch.setenv("GIT_SHA", "abc")
    assert rows.git_sha() == "abc"
