"""TensorBoard and wandb beside metrics.jsonl: one that fails stops nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixflow_fast.metrics import loggers
from mixflow_fast.metrics.loggers import Loggers, numbers
from mixflow_fast.metrics.metrics_file import MetricsFile, read_metrics
from tests.support.runs import training_row


class Recorder:
    """A logger that raises from its `fails_at`-th call on."""

    def __init__(self, calls: list, fails_at: int = 1 << 30) -> None:
        self.calls, self.left = calls, fails_at

    def _call(self, *call: object) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError("disk\nfull")
        self.calls.append(call)

    def write(self, row: dict) -> None:
        self._call("write", row["step"])

    def picture(self, path: Path, step: int) -> None:
        self._call("picture", step)

    def close(self) -> None:
        self._call("close")


def test_a_logger_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    good, bad, messages = [], [], []
    monkeypatch.setattr(loggers, "_TensorBoard", lambda *args: Recorder(bad, fails_at=1))
    monkeypatch.setattr(loggers, "_Wandb", lambda *args: Recorder(good))
    both = Loggers(("tensorboard", "wandb"), tmp_path, {}, 0, messages.append)
    file = MetricsFile(tmp_path / "m.jsonl", 0, both)
    for step in (1, 2, 3):
        file.write(training_row(step))
    file.picture(tmp_path / "x.png", 3)
    file.close()
    assert bad == [("write", 1)]
    assert good == [("write", 1), ("write", 2), ("write", 3), ("picture", 3), ("close",)]
    assert len(messages) == 1 and "tensorboard failed (OSError: disk full)" in messages[0]
    assert len(read_metrics(tmp_path / "m.jsonl")) == 3


def test_a_logger_that_cannot_be_opened_does_not_stop_the_run(tmp_path, monkeypatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError("no network")

    messages: list[str] = []
    monkeypatch.setattr(loggers, "_Wandb", broken)
    opened = Loggers(("wandb",), tmp_path, {}, 0, messages.append)
    opened.write(training_row(1))
    opened.close()
    assert len(messages) == 1 and "RuntimeError: no network" in messages[0]


def test_numbers_of_a_row() -> None:
    row = training_row(3, grad_norm=None, loss_by_t=[0.1, None], time=5.0, kind_of="x")
    assert numbers(row) == {
        "train/loss": 0.5,
        "train/lr": 1e-4,
        "train/images_per_s": 10.0,
        "train/loss_by_t/0": 0.1,
    }
    row = {"kind": "validation", "step": 3, "t": [0.5], "ema": {"loss": 2.0, "grid": [[1.0]]}}
    assert numbers(row) == {"validation/ema/loss": 2.0}
    assert numbers({"kind": "start", "step": 0, "ranks": 2}) == {}


def test_tensorboard_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    messages: list[str] = []
    opened = Loggers(("tensorboard",), tmp_path, {}, 0, messages.append)
    opened.write(training_row(7))
    opened.picture(tmp_path / "x.png", 7)
    opened.close()
    assert not messages
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    assert events.Tags()["images"] == ["previews"]
