"""Rows of metrics.jsonl."""

import json
import resource
import signal
from pathlib import Path

import pytest

from mixflow_fast.metrics.metrics_file import MetricsFile, read_metrics
from tests.support.runs import training_row


def test_readers_that_know_no_kinds_see_training_rows_alone(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"kind": "start", "step": 0})
    file.write(training_row(1))
    file.write({"kind": "validation", "step": 1, "ema": {"loss": 1.0}})
    file.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [training_row(1)]
    kinds = [row.get("kind") for row in read_metrics(tmp_path / "metrics.jsonl", kind=None)]
    assert kinds == ["start", None, "validation"]
    (row,) = read_metrics(tmp_path / "metrics.jsonl", kind="validation")
    assert row["ema"] == {"loss": 1.0}


def test_rows_that_come_again_and_a_cut_line_are_dropped_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    rows = [training_row(1), training_row(2), {"kind": "validation", "step": 2}, training_row(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "lo')
    MetricsFile(path, resume_step=2).close()
    assert read_metrics(path, kind=None) == rows[:3]


def test_what_is_not_finite_is_null_and_the_line_is_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.write(training_row(1, loss=float("nan"), by_t=[1.0, float("inf")]))
    file.close()
    text = (tmp_path / "m.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert row["loss"] is None and row["by_t"] == [1.0, None]


def test_rows_that_find_no_room_wait_in_memory(tmp_path: Path) -> None:
    """A file that may not grow, as on a full disk, and may again."""
    path, warnings = tmp_path / "m.jsonl", []
    file = MetricsFile(path, warn=warnings.append)
    file.write(training_row(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The second row is cut off in its middle.
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
        for step in (2, 3):
            file.write(training_row(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert read_metrics(path) == [training_row(1)]
    assert len(warnings) == 1 and f"{path} cannot be written (File too large)" in warnings[0]
    file.write(training_row(4))
    file.close()
    assert read_metrics(path) == [training_row(step) for step in (1, 2, 3, 4)]
