"""The benchmark harness: its statistics, its refusals, and a smoke run from end to end."""

import dataclasses
import itertools
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import arms, cases, checks, draws, kernel_suite, numerics, replay, run, step, timing
from benchmarks import device as devices
from benchmarks.cases import Case, kernel_cases
from benchmarks.deadline import Deadline, Expectation
from benchmarks.numerics import Finding, Setting
from benchmarks.providers import (
    SLOW_TO_COMPILE,
    Compiler,
    make_inputs,
    mixflow_call,
    modes_to_try,
    plain_call,
)
from benchmarks.rows import KEYS, Writer, latest, read
from benchmarks.stats import paired_ratio, percentiles
from benchmarks.verify import verify
from mixflow_fast import MixFlow
from mixflow_fast.models import SiT, build

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}
GREEN = checks.Report([Finding("all", "x", "float32", 0.0, 0.0)])
RED = checks.Report([Finding("all", "x", "float32", 2.0, 1.0)])


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


def test_bytes_are_those_of_the_dtypes() -> None:
    def per_element(op: str, mode: str, dtype: torch.dtype) -> float:
        case = Case(op=op, mode=mode, shape=(2, 3, 4, 5), dtype=dtype)
        return case.algorithmic_bytes / 120

    half, single = torch.bfloat16, torch.float32
    assert per_element("interpolate", "forward", half) == 4
    assert per_element("velocity_loss", "forward", half) == 4
    assert per_element("velocity_loss", "full", half) == 6
    assert per_element("velocity_loss", "backward", half) == 6
    assert per_element("objective", "full", half) == 10
    assert per_element("interpolate", "forward", single) == 8
    assert per_element("objective", "full", single) == 16


def test_cells_cover_shapes_and_modes_main_ones_first() -> None:
    chosen = kernel_cases(cases.KERNEL_OPS)
    assert len(chosen) == len(set(chosen))
    for batches, sample in (
        ((32, 256), (4, 32, 32)),
        ((32, 256), (4, 64, 64)),
        ((64, 256), (768, 16, 16)),
        ((64, 256), (768, 32, 32)),
        ((64,), (3, 256, 256)),
    ):
        for batch, op in itertools.product(batches, cases.KERNEL_OPS):
            assert any(c.shape == (batch, *sample) and c.op == op for c in chosen)
    for op, modes in cases.MODES.items():
        assert {c.mode for c in chosen if c.op == op} == set(modes)
        assert {c.dtype for c in chosen if c.op == op} == {torch.bfloat16, torch.float32}
    assert {c.shape for c in chosen[:6]} == set(cases.MAIN_SHAPES)
    assert {c.op for c in kernel_cases(("interpolate", "step"))} == {"interpolate"}
    single = [c.dtype is torch.float32 for c in chosen]
    assert single == sorted(single) and any(single)  # float32 data come last


def test_slow_compilation_is_for_large_bf16_cells() -> None:
    slow = {c for c in kernel_cases(cases.KERNEL_OPS) if SLOW_TO_COMPILE in modes_to_try(c)}
    assert {c.dtype for c in slow} == {torch.bfloat16}
    assert (256, *cases.RAE) in {c.shape for c in slow}
    assert (256, *cases.SIT) not in {c.shape for c in slow}
    assert len(modes_to_try(_case())) == 2


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


@pytest.mark.parametrize(
    ("name", "side", "gigaflops"),
    [("SiT-XL/2", 32, 711.7), ("SiT-XL/2", 64, 3147.2), ("SiT-B/2", 32, 138.0)],
)
def test_train_flops_of_published_models(name, side, gigaflops) -> None:
    with torch.device("meta"):
        net = build(name, input_size=side)
    assert arms.train_flops(net) / 1e9 == pytest.approx(gigaflops, abs=0.05)


def test_train_flops_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net = SiT(**arms.TOY)
        x, t, y = torch.zeros(3, 4, 8, 8), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        net(x, t, y).sum().backward()
    # On the meta device attention is two plain products, forward and backward.
    assert counter.get_total_flops() == 3 * arms.train_flops(net)


def _case(op: str = "objective", mode: str = "full") -> Case:
    return Case(op=op, mode=mode, shape=(512, 4, 2, 2), dtype=torch.bfloat16)


@pytest.mark.parametrize("op", cases.KERNEL_OPS)
def test_providers_agree_with_float64(op) -> None:
    for mode in cases.MODES[op]:
        case = _case(op, mode)
        inputs = make_inputs(case, CPU)
        for call in (plain_call(case, inputs), mixflow_call(case, inputs, "reference")):
            assert verify(case, inputs, call()) == []


WRONG = {
    "gradient a hundredth too long": (lambda m, i: {"gradient": m["gradient"] * 1.01}, "gradient"),
    "gradient of another dtype": (lambda m, i: {"gradient": m["gradient"].double()}, "dtype"),
    "loss off": (lambda m, i: {"loss": m["loss"] * 1.001}, "loss"),
    "loss not a number": (lambda m, i: {"loss": m["loss"] * float("nan")}, "loss"),
    "wrong direction": (
        lambda m, i: {"x": (m["x0"].float() + i.x1.float() - m["x"].float()).bfloat16()},
        "x_m",
    ),
    "slowed to the data": (
        lambda m, i: {"slowed_t": m["t"] + 0.1 * (1 - m["t"])},
        "slowed_t is not in",
    ),
    "uniform t": (lambda m, i: {"t": m["t"] ** 2}, "mean of t"),
    "noise too small": (lambda m, i: {"x0": m["x0"] * 0.9}, "variance of x0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_verify_finds(name) -> None:
    case = _case()
    inputs = make_inputs(case, CPU)
    torch.manual_seed(0)
    made = plain_call(case, inputs)()
    change, message = WRONG[name]
    assert verify(case, inputs, made) == []
    assert any(message in line for line in verify(case, inputs, made | change(made, inputs)))


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
    monkeypatch.setattr(replay, "_capture", lambda step, device: (step(), lambda: None))
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


def test_an_interrupt_keeps_what_was_found(monkeypatch, capsys, tmp_path) -> None:
    def interrupted():
        yield Finding("second", "x", "float32", float("inf"), 0.0)
        raise KeyboardInterrupt

    first = [Finding("first", "x", "float32", 0.0, 0.0)]
    some = [("one", lambda: first), ("two", interrupted), ("three", lambda: first)]
    monkeypatch.setattr(checks, "tasks", lambda *_: some)
    (tmp_path / "correctness.jsonl").write_text("of another run\n")
    assert checks.main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    found = [json.loads(s) for s in (tmp_path / "correctness.jsonl").read_text().splitlines()]
    assert [(row["check"], row["error"]) for row in found] == [("first", 0.0), ("second", None)]
    out = capsys.readouterr().out
    assert "RED" in out and "two, and what follows (interrupted)" in out
    assert _smoke(tmp_path / "run") == 130
    assert not list(tmp_path.glob("run/*"))


def test_speed_needs_a_gpu(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--out", str(tmp_path)]) == 2
    assert "speeds need a GPU" in capsys.readouterr().err
    assert run.main(["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "speeds need a GPU" in capsys.readouterr().err
    assert run.main(["--suite", "step", "--op", "interpolate", "--out", str(tmp_path)]) == 2
    assert checks.main(["--device", "cuda"]) == 2
    assert list(tmp_path.iterdir()) == []


def _smoke(out: Path, *more: str) -> int:
    return run.main(["--smoke", "--device", "cpu", "--out", str(out), *more])


def test_nothing_is_timed_on_red(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(checks, "run", lambda *_: RED)
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed on red"))
    assert _smoke(tmp_path) == 1
    assert "no speed is measured until correctness is green" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("change", [1.01, None])
def test_a_wrong_provider_has_no_speed(monkeypatch, capsys, tmp_path, change) -> None:
    def wrong_call(case, inputs, impl):
        if change is None:
            raise RuntimeError("does not launch")
        right = mixflow_call(case, inputs, impl)
        return lambda: (made := right()) | {"gradient": made["gradient"] * change}

    monkeypatch.setattr(checks, "run", lambda *_: GREEN)
    monkeypatch.setattr(kernel_suite, "mixflow_call", wrong_call)
    assert _smoke(tmp_path, "--op", "objective") == 1
    out = capsys.readouterr().out
    assert "RED, no speed" in out and "no speed for, because of wrong results:" in out
    assert all(row["p50"] is None for row in read(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "objective.png").exists()


def test_a_provider_that_fails_is_said_and_the_others_are_timed(monkeypatch, tmp_path) -> None:
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 5 TiB")

    monkeypatch.setattr(checks, "run", lambda *_: GREEN)
    monkeypatch.setattr(kernel_suite, "plain_call", out_of_memory)
    assert _smoke(tmp_path, "--op", "objective") == 0
    found = [r for r in read(tmp_path / "rows.jsonl") if r["metric"] == "latency_ms"]
    by_provider = {row["provider"]: row for row in found}
    assert by_provider["eager"]["p50"] is None and "5 TiB" in by_provider["eager"]["note"]
    assert by_provider["mixflow_fast"]["p50"] > 0


def test_a_cell_that_breaks_does_not_take_the_others_along(monkeypatch, tmp_path) -> None:
    whole = kernel_suite.timing.measure
    monkeypatch.setattr(checks, "run", lambda *_: GREEN)
    monkeypatch.setattr(kernel_suite.timing, "measure", _fails_once(whole))
    assert _smoke(tmp_path, "--op", "velocity_loss") == 1
    modes = {row["mode"] for row in read(tmp_path / "rows.jsonl") if row["metric"] == "call_ms"}
    assert {"forward", "backward"} <= modes


def _fails_once(whole):
    calls = []

    def measure(*args):
        calls.append(args)
        if len(calls) == 1:
            raise AssertionError
        return whole(*args)

    return measure


def test_deadline_stops_before_a_cell(monkeypatch, tmp_path) -> None:
    clock = Clock()
    deadline = Deadline(10, clock)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = kernel_suite.KernelSuite(CPU, writer, deadline, "reference", smoke=True)
    chosen = kernel_cases(("velocity_loss",), smoke=True)
    whole = kernel_suite.timing.measure

    def measure(*args):
        clock.now += 9.5
        return whole(*args)

    monkeypatch.setattr(kernel_suite.timing, "measure", measure)
    suite.run(chosen)
    assert deadline.left_out == [case.label for case in chosen[1:]]
    assert {row["mode"] for row in read(writer.path)} == {chosen[0].mode}


def test_an_interrupt_keeps_what_was_measured(monkeypatch, capsys, tmp_path) -> None:
    cell = kernel_suite.KernelSuite._cell
    seen = []

    def interrupted(self, case):
        if seen:
            raise KeyboardInterrupt
        seen.append(case)
        cell(self, case)

    monkeypatch.setattr(checks, "run", lambda *_: GREEN)
    monkeypatch.setattr(kernel_suite.KernelSuite, "_cell", interrupted)
    assert _smoke(tmp_path, "--op", "velocity_loss") == 130
    count = len(read(tmp_path / "rows.jsonl"))
    assert count > 3 and f"interrupted: {count} rows" in capsys.readouterr().out


def test_step_is_refused_where_the_objectives_disagree(monkeypatch, capsys, tmp_path) -> None:
    loss = MixFlow.loss
    monkeypatch.setattr(MixFlow, "loss", lambda *a, **k: loss(*a, **k) * 1.05)
    suite = step.StepSuite(
        CPU, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline(), "reference", smoke=True
    )
    suite.run()
    assert suite.refused and "RED" in capsys.readouterr().out
    assert all(row["p50"] is None for row in read(tmp_path / "rows.jsonl"))


def test_step_accumulates_what_does_not_fit(monkeypatch, tmp_path) -> None:
    whole = arms.Arm.step

    def small_memory(self) -> None:
        if self.name == "eager_tf32" and self.micro > 1:
            raise torch.OutOfMemoryError("too much")
        whole(self)

    monkeypatch.setattr(arms.Arm, "step", small_memory)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline(), "reference", smoke=True)
    suite.run()
    notes = {row["provider"]: row["note"] for row in read(writer.path) if row["p50"]}
    assert not suite.refused
    assert "micro-batches of 1" in notes["eager_tf32"] and "micro" not in notes["eager_bf16"]


@pytest.mark.parametrize("other", ["", "ids", "seed"])
def test_step_is_refused_where_the_loss_takes_other_noise(monkeypatch, tmp_path, other) -> None:
    """With the kernels: the reference keeps the noise, and cannot take another."""
    loss = MixFlow.loss

    def of_others(self, pred, it, **options):
        if other == "ids" and it.ids is not None:
            it.ids.data.add_(100)  # where the objective's own check does not see it
        if other == "seed":
            it = dataclasses.replace(it, _seed=it._seed + 1)
        return loss(self, pred, it, **options)

    monkeypatch.setattr(MixFlow, "loss", of_others)
    device = torch.device(DEVICE)
    suite = step.StepSuite(device, Writer(tmp_path / "rows.jsonl", ENVIRONMENT), Deadline())
    net, x1 = arms.network(device, toy=True), torch.randn(2, 4, 8, 8, device=device)
    made = arms.losses(net, x1, *torch.zeros(2, 2, dtype=torch.int64, device=device), "triton")
    arm = arms.Arm("mixflow_fast", made["mixflow_fast"], None, False, 1, [], 2)
    wrong = suite._compare({"mixflow_fast": arm}, x1)
    assert ("other noise" in "".join(wrong)) == bool(other), wrong


def test_what_only_a_gpu_writes_comes_in_order(monkeypatch, tmp_path) -> None:
    """Stand-ins for the GPU: times, ratios, memory, and launches after all timing."""
    monkeypatch.setattr(timing, "peak_memory_mib", lambda *_, **__: 1.0)
    monkeypatch.setattr(timing, "count_launches", lambda call: 5 if call() is None else 6)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernel_suite.gc, "freeze", lambda: None)
    monkeypatch.setattr(step, "BATCHES", (2, 3))
    monkeypatch.setattr(step, "ROUNDS", 1)
    monkeypatch.setattr(step, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(step, "OPTIMIZER_SECONDS", 0.0)
    monkeypatch.setattr(arms, "XL", arms.TOY)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = kernel_suite.KernelSuite(CPU, writer, Deadline(), "reference", smoke=True)
    suite._on_gpu, suite._copy = True, 1e9
    suite._compiler = Compiler(lambda call: float(call() is None))
    suite.run(kernel_cases(("velocity_loss",), smoke=True))
    whole = step.StepSuite(CPU, writer, Deadline(), "reference")
    whole._on_gpu = True
    whole.run()
    assert not suite.refused and not whole.refused
    found = [row for row in read(writer.path) if row["p50"] is not None]
    kernels = [row["metric"] for row in found if row["op"] in cases.KERNEL_OPS]
    assert len({*kernels}) == 10
    assert {*kernels[kernels.index("launches") :]} == {"launches"}
    assert kernels.count("launches") == kernels.count("peak_memory_mib") == 12
    steps = [row["metric"] for row in found if row["op"] == "step"]
    assert {*steps[-3:]} == {"launches"} and steps.count("launches") == 3
    assert steps.index("speedup_over_eager_bf16") < steps.index("peak_memory_mib")
    assert sum(row["op"] == "optimizer" for row in found) == 3


def test_ratios_of_the_step_are_written_before_memory(monkeypatch, tmp_path) -> None:
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    suite = step.StepSuite(CPU, writer, Deadline())
    suite._on_gpu = True
    monkeypatch.setattr(timing, "peak_memory_mib", interrupted)
    monkeypatch.setattr(arms.PlainState, "state_bytes", lambda self: 0)
    state = arms.PlainState([torch.zeros(1)], fused=False)
    there = {name: arms.Arm(name, None, state, False, 4, [], 4) for name in arms.ARMS}
    with pytest.raises(KeyboardInterrupt):
        suite._report("label", [4], there, dict.fromkeys(there, [2.0, 3.0]), 1e9)
    metrics = {row["metric"] for row in read(writer.path)}
    assert {f"speedup_over_{name}" for name in arms.ARMS if name != "mixflow_fast"} < metrics
    assert {"latency_ms", "images_per_s", "percent_of_989"} < metrics


def test_smoke_run_from_end_to_end(capsys, tmp_path) -> None:
    """Correctness by the kernels themselves (interpreted on the CPU), rows, table, plots."""
    code = run.main(["--smoke", "--device", DEVICE, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0 and "correctness: green" in out, out
    found = read(tmp_path / "rows.jsonl")
    assert {row["op"] for row in found} == {*cases.OPS, "optimizer"}
    for row in found:
        assert set(row) == set(KEYS) and row["note"].startswith("smoke: not a speed")
        assert (row["p50"] is None) <= ("left out" in row["note"] or "saw no" in row["note"])
        if row["p50"] is not None and row["p20"] is not None:
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
    metrics = {row["metric"] for row in found if row["op"] == "objective"}
    assert {"latency_ms", "call_ms", "speedup_over_eager"} <= metrics
    for row in found:
        if row["metric"] == "speedup_over_eager":
            assert row["low95"] <= row["p50"] <= row["high95"]
    for op in cases.OPS:
        assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    environment = json.loads((tmp_path / "environment.json").read_text())["all"]
    assert environment["torch"] == torch.__version__
    assert environment["before"] and environment["after"]


def test_environment_of_each_suite_is_kept(tmp_path) -> None:
    for suite, state in (("kernels", "cold"), ("step", "cold"), ("step", "warm")):
        run._keep_state(tmp_path / "new", suite, {"before": state})
    kept = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert kept == {"kernels": {"before": "cold"}, "step": {"before": "warm"}}
    (tmp_path / "new" / "environment.json").write_text('{"cut o')
    run._keep_state(tmp_path / "new", "step", {})


def test_commit_without_git(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    monkeypatch.delenv("GIT_SHA", raising=False)
    assert devices.git_sha() == "unknown"
    monkeypatch.setenv("GIT_SHA", "abc")
    assert devices.git_sha() == "abc"


@pytest.mark.parametrize("probe", [0, 3])
def test_gpu_suite_fits_nine_minutes_and_reports_red(monkeypatch, tmp_path, probe) -> None:
    """The script with a stand-in for Python that notes its arguments and fails the second part."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!/bin/sh\necho $PYTORCH_CUDA_ALLOC_CONF, $@ >> {tmp_path}/calls\n"
        f'case "$*" in -c*) exit {probe} ;; *kernels*) exit 1 ;; esac\n'
    )
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    environment = os.environ | {"PYTHON": str(stand_in)}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    segments = "expandable_segments:True"
    assert calls.pop(0).startswith(f"{segments}, -c import")  # a GPU, and such segments
    assert [call.split("--deadline")[0].strip() for call in calls] == [
        ", -m benchmarks.checks",
        ", -m benchmarks.run --suite kernels",
        f"{'' if probe else segments}, -m benchmarks.run --suite step",
    ]
    assert all(f"--device cuda --out {out}" in call for call in calls)
    deadlines = [float(call.split("--deadline ")[1].split()[0]) for call in calls]
    assert "exit status 1" in (out / "suite.log").read_text()
    # Each part may overrun by 25 s; the last has what the others leave of 530 s, here all of it.
    assert deadlines[:2] == [115, 180] and 485 <= deadlines[2] <= 505
    assert "total=530\n" in (ROOT / "benchmarks" / "gpu_suite.sh").read_text()
