"""Rows of metrics.jsonl, its loggers, the progress line, model FLOPs' denominator."""

import fcntl
import io
import json
import os
import pty
import struct
import sys
import termios
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.environment import environment
from mixflow_fast.metrics import loggers
from mixflow_fast.metrics.loggers import Loggers, check_loggers, numbers
from mixflow_fast.metrics.metrics_file import MetricsFile, read_metrics
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.metrics.throughput import Stopwatch, peak_memory_mib
from mixflow_fast.models.flops import peak_tflops


def training_row(step: int, **values: object) -> dict:
    return {"step": step, "loss": 0.5, "lr": 1e-4, "images_per_s": 10.0} | values


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


def test_a_mirror_that_fails_is_warned_of_once_and_the_others_go_on(tmp_path, monkeypatch) -> None:
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


def test_a_mirror_that_cannot_be_opened_does_not_stop_the_run(tmp_path, monkeypatch) -> None:
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


def test_mirrors_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="may name tensorboard, wandb, got 'mlflow'"):
        check_loggers(["mlflow"])
    # What wandb leaves in the working directory is not the package.
    (tmp_path / "wandb").mkdir()
    config = load_config("photos", ["train.loggers=[wandb]"])
    assert config.train.loggers == ("wandb",)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.delitem(sys.modules, "wandb", raising=False)
        with pytest.raises(ValueError, match="needs the package wandb: pip install wandb"):
            validate(config)
    with pytest.raises(ValueError, match="train.loggers must be tuple"):
        load_config("photos", ["train.loggers=[1]"])
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    validate(config)


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_other_lines_do_not_break_the_progress(monkeypatch, terminal) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress(4, 0, "run")
    for step in (1, 2):
        progress.step()
        progress.report(training_row(step))
        progress.log(f"run: step {step} validation loss ema 0.5")
    progress.close()
    lines = screen.getvalue().replace("\r", "\n").splitlines()
    for step in (1, 2):
        assert f"run: step {step} validation loss ema 0.5" in lines
        assert (f"run: step {step}/4 loss 0.5000 lr 1.00e-04 10 img/s" in lines) is not terminal
    assert ("2/4" in screen.getvalue().replace("step 2/4", "")) is terminal


@pytest.mark.parametrize("size", [(0, 0), (30, 100)])
def test_a_terminal_without_a_size_gets_lines(monkeypatch, size) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setattr(sys, "stderr", screen)
        progress = Progress(2, 0, "run")
        progress.step()
        progress.report(training_row(1))
        progress.close()
        text = os.read(ours, 4096).decode()
    os.close(ours)
    assert ("run: step 1/2 loss 0.5000" in text) is (size == (0, 0))
    assert ("1/2 [" in text) is (size != (0, 0))


def test_stopwatch_counts_what_is_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 3.0, 10.0, 10.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 2.5 and watch.take() == 0.0


def test_memory_and_environment_of_this_process() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    block = torch.ones(64 << 18)  # 64 MiB
    assert 1 < before <= peak_memory_mib(torch.device("cpu")) < 1 << 20
    del block
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["cuda"] is None and found["device"]
    json.dumps(found)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
