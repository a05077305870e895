"""The correctness checks of the benchmark harness: red on what is wrong, whatever the cause."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks import checks, draws, numerics, replay
from benchmarks.numerics import Finding, Setting
from benchmarks.rows import Deadline
from mixflow_fast import MixFlow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
RED = checks.Report([Finding("all", "x", "float32", 2.0, 1.0)])


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Wrong(MixFlow):
    """The reference, with an error put into it. `error` is set by the tests."""

    error = ""

    def __init__(self, *args, impl: str = "triton", **options) -> None:
        super().__init__(*args, impl="reference", **options)
        self.calls = 0

    def prepare(self, x1, ids=None, **given):
        self.calls += 1
        if self.error == "place in the batch":
            ids = torch.arange(len(x1), device=x1.device)
        it = super().prepare(x1, ids=ids, **given)
        x = it.x.clone()
        if self.error == "x":
            x[0].view(-1)[-1] *= 1.02
        if self.error == "another run" and self.calls == 2:
            x[-1].view(-1)[0] += 1
        if self.error == "unwritten":
            x[0].view(-1)[0] = torch.empty(1, dtype=x.dtype).nan_to_num()
            x[-1].view(-1)[-1] = torch.empty(1, dtype=x.dtype)[0]
        return dataclasses.replace(it, x=x)

    def loss(self, pred, it, **options):
        if self.error == "loss near data":
            off = 1 + 1e-5 * (it.t > 0.75).float()
            losses = super().loss(pred, it, **options)
            return losses * off if options["reduction"] == "none" else losses
        if self.error == "gradient":
            pred = pred * 1.01 - pred.detach() * 0.01
        return super().loss(pred, it, **options)


@pytest.mark.parametrize(
    ("error", "tensor"),
    [("x", "x"), ("loss near data", "losses, t in [0.75, 1)"), ("gradient", "gradient"), ("", "")],
)
def test_numerics_are_red_on_a_wrong_kernel(monkeypatch, error, tensor) -> None:
    right = Setting.objective
    monkeypatch.setattr(Wrong, "error", error)
    monkeypatch.setattr(
        Setting,
        "objective",
        lambda self, impl: Wrong(clock=self.clock) if impl == "triton" else right(self, impl),
    )
    found = list(numerics.errors(Setting(), (4, 4, 4, 4), torch.float32, CPU, "triton", OPS))
    failed = [finding.tensor for finding in found if not finding.passed]
    assert (tensor in failed) if error else not failed
    assert {f"losses, t in [{low:g}, {high:g})" for low, high in numerics.BUCKETS} <= {
        finding.tensor for finding in found
    }


OPS = ("interpolate", "velocity_loss")


@pytest.mark.parametrize(
    ("error", "check"),
    [
        ("place in the batch", "alone and in"),
        ("another run", "two runs"),
        ("unwritten", "buffers full of NaN"),
        ("", ""),
    ],
)
def test_bits_are_red_on_a_wrong_kernel(monkeypatch, error, check) -> None:
    monkeypatch.setattr(Wrong, "error", error)
    monkeypatch.setattr(draws, "MixFlow", Wrong)
    found = list(draws.same_bits(CPU, "triton", (3, 2, 2, 2), torch.bfloat16))
    failed = {finding.check for finding in found if not finding.passed}
    assert any(check in name for name in failed) if error else not failed
    # Torch is left as it was.
    assert not torch.are_deterministic_algorithms_enabled()


def test_draws_are_red_on_wrong_numbers(monkeypatch) -> None:
    assert all(finding.passed for finding in draws.normals(CPU, "reference"))
    normal = draws.philox.normal
    monkeypatch.setattr(draws.philox, "normal", lambda *args: normal(*args) * (1 + 1e-5))
    failed = {finding.tensor for finding in draws.normals(CPU, "reference") if not finding.passed}
    assert {"RMS error", "largest error"} <= failed
    monkeypatch.setattr(draws.philox, "normal", normal)
    monkeypatch.setattr(draws, "MixFlow", lambda **options: MixFlow(**(options | {"seed": 1})))
    failed = {finding.tensor for finding in draws.normals(CPU, "reference") if not finding.passed}
    assert failed == {"x at the noise end", "x0()", "gradient of the loss"}
    words = draws.philox.random_words
    monkeypatch.setattr(draws, "_kernel_words", lambda *args: words(draws.SEED, *args) ^ (1 << 31))
    assert not any(finding.passed for finding in draws.integers(CPU, "triton"))


def test_replays_are_red_when_nothing_is_drawn_anew(monkeypatch) -> None:
    cpu = torch.device("cpu")
    found = list(replay.graph_replays(cpu, "reference"))
    assert len(found) == 9 and all(finding.passed for finding in found)
    monkeypatch.setattr(replay, "capture", lambda step, device: (step(), lambda: None))
    assert not any(finding.passed for finding in replay.graph_replays(cpu, "reference"))


def test_compiled_steps_are_checked(monkeypatch) -> None:
    found = list(replay.compiled(torch.device(DEVICE), "triton", backend="eager"))
    assert len(found) == 6 and all(finding.passed for finding in found)
    monkeypatch.setattr(torch, "compile", lambda step, **_: lambda *a: 1.01 * step(*a))
    assert not any(finding.passed for finding in replay.compiled(CPU, "reference"))


def test_settings_cover_paths_predictions_and_clocks() -> None:
    settings = numerics.SETTINGS
    paths, predictions = ("linear", "gvp", "vp"), ("velocity", "noise", "data", "score")
    assert {(s.path, s.prediction) for s in settings} == set(itertools.product(paths, predictions))
    for clock in ("data_at_1", "noise_at_1"):
        there = [s for s in settings if s.clock == clock]
        assert {s.path for s in there} == set(paths)
        assert {s.prediction for s in there} == set(predictions)
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    assert {d for s, d in numerics.plan("full")} == dtypes
    assert {d for s, d in numerics.plan("timed") if s == numerics.TIMED} == dtypes
    assert {s for s, d in numerics.plan("full") if d == torch.float32} == set(settings)


def test_checks_that_raise_or_do_not_fit_are_not_green(monkeypatch) -> None:
    def explode():
        raise RuntimeError("no such kernel")

    def pass_():
        return [Finding("fine", "x", "float32", 0.0, 0.0)]

    monkeypatch.setattr(checks, "tasks", lambda *_: [("one", pass_), ("two", explode)])
    report = checks.run(CPU)
    assert not report.green and len(report.findings) == 2
    assert "no such kernel" in report.table() and "RED" in report.table()
    monkeypatch.setattr(checks, "tasks", lambda *_: [("one", pass_), ("two", pass_)])
    assert checks.run(CPU).green
    clock = Clock()

    def slow():
        clock.now += 9
        return pass_()

    monkeypatch.setattr(checks, "tasks", lambda *_: [("one", slow), ("two", slow)])
    report = checks.run(CPU, deadline=Deadline(10, clock))
    assert report.left_out == ["two"] and not report.failures and not report.green
    assert not checks.Report().green
