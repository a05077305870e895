"""The benchmark programs from end to end, and what they do when something goes wrong."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import cases, checks, kernel_suite, run, step, timing
from benchmarks import step_variants as variants
from benchmarks.block_ops import TIMED_BACKENDS
from benchmarks.cases import kernel_cases
from benchmarks.numerics import Finding
from benchmarks.providers import (
    Compiler,
    mixflow_call,
)
from benchmarks.rows import KEYS, Deadline, Writer, read

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


def _report(error: float, op: str = "gelu") -> checks.Report:
    found = {"check": "all", "tensor": "x", "dtype": "float32", "error": error, "limit": 1.0}
    return checks.Report([Finding(op=op, **found)])


GREEN = _report(0.0)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


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


@pytest.mark.parametrize("red", ["gelu", "velocity_loss"])
def test_a_red_op_stops_only_itself(monkeypatch, capsys, tmp_path, red) -> None:
    timed, steps = [], []
    monkeypatch.setattr(checks, "run", lambda *_: _report(2.0, red))
    monkeypatch.setattr(kernel_suite.KernelSuite, "_cell", lambda _, case: timed.append(case.op))
    monkeypatch.setattr(step.StepSuite, "run", lambda self: steps.append(self._red))
    assert _smoke(tmp_path) == 1
    gone = {"gelu": {"gelu"}, "velocity_loss": {"velocity_loss", "objective"}}[red]
    assert set(timed) == set(cases.KERNEL_OPS) - gone and steps == [gone]
    out = capsys.readouterr().out
    assert f"without a speed: {', '.join(sorted(gone))}" in out
    assert f"  {red}: not correct on this device" in out


def test_nothing_is_timed_where_all_is_red(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(checks, "run", lambda *_: _report(2.0, "of every op"))
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed on red"))
    assert _smoke(tmp_path, "--suite", "kernels") == 1
    assert "without a speed: attention, gelu" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()
    assert run.red_ops(["normal"]) == run.red_ops(["objective"]) == set(cases.OBJECTIVE_OPS)
    assert run.red_ops(["block"]) == set(cases.KERNEL_OPS) - set(cases.OBJECTIVE_OPS)


def test_checks_that_were_left_out_are_no_red_but_no_success(monkeypatch, tmp_path) -> None:
    report = checks.Report(GREEN.findings, left_out=["what did not fit"])
    monkeypatch.setattr(checks, "run", lambda *_: report)
    assert _smoke(tmp_path, "--op", "interpolate") == 1
    assert any(row["p50"] for row in read(tmp_path / "rows.jsonl"))


def test_deepspeed_is_a_suite(capsys, tmp_path) -> None:
    tiny = ["model.depth=1", "model.hidden_size=32", "model.num_heads=2"]
    tiny += ["train.global_batch_size=4", "train.zero_stage=1"]
    assert _smoke(tmp_path, "--suite", "deepspeed", "photos", *tiny) == 0
    assert {row["op"] for row in read(tmp_path / "rows.jsonl")} == {"deepspeed"}
    assert not list(tmp_path.glob("*.png"))
    assert _smoke(tmp_path, "--suite", "deepspeed") == 2
    assert _smoke(tmp_path, "--suite", "deepspeed", "photos", "train.microbatch_size=2") == 2
    assert _smoke(tmp_path, "--suite", "step", "photos") == 2
    err = capsys.readouterr().err
    for message in ("needs a recipe", "one micro-batch", "only --suite deepspeed takes a recipe"):
        assert message in err


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


def test_what_only_a_gpu_writes_comes_in_order(monkeypatch, tmp_path) -> None:
    """Stand-ins for the GPU: times, ratios, memory, and launches after all timing."""
    monkeypatch.setattr(timing, "peaks_mib", lambda *_: (1.0, 3.0, 2.0))
    monkeypatch.setattr(timing, "host_idle_percent", lambda *_: 50.0)
    monkeypatch.setattr(timing, "matmul_tflops", lambda size: 790.0)
    monkeypatch.setattr(timing, "count_launches", lambda call: 5 if call() is None else 6)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": 0})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(kernel_suite.gc, "freeze", lambda: None)
    monkeypatch.setattr(step, "ROUNDS", 1)
    monkeypatch.setattr(step, "ROUND_SECONDS", 0.0)
    monkeypatch.setattr(step, "OPTIMIZER_SECONDS", 0.0)
    sit = dict(name="toy SiT", network=variants.SiT, options=variants.TOY)
    three = ("eager_bf16", "fused", "mixflow_fast")
    first = variants.Workload(**sit, batch=2, arms=("eager_tf32", *variants.LADDER))
    second = variants.Workload(**sit, batch=3, arms=three, details=True)
    last = variants.Workload(**sit, batch=4, arms=three)
    monkeypatch.setattr(step, "workloads", lambda smoke: (first, second, last))
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
    steps = [row for row in found if row["op"] == "step"]
    metrics = [row["metric"] for row in steps]
    # Of the middle workload, after the timing of all three.
    assert {row["shape"][0] for row in steps[-3:]} == {3} and metrics.count("launches") == 3
    assert {*metrics[-3:]} == {"launches"}
    assert metrics.index("speedup_over_eager_bf16") < metrics.index("peak_memory_mib")
    assert {"peak_reserved_mib", "host_idle_percent", "percent_of_matmul"} < set(metrics)
    matmul = [row for row in found if row["op"] == "matmul"]
    assert [row["p50"] for row in matmul] == [790.0] and found.index(matmul[0]) < len(kernels) + 1
    # Two latencies, two rates, a ratio.
    assert sum(row["op"] == "optimizer" for row in found) == 5
    # Each row of the ladder over the one before, where both are there (compile is not, on a CPU).
    ladder = {r["provider"]: r["metric"] for r in steps if r["metric"].startswith("speedup_over")}
    assert ladder["eager_tuned"] == "speedup_over_eager_bf16"
    assert ladder["fused"] == "speedup_over_fused_flash"
    assert ladder["mixflow_fast_adamwema"] == "speedup_over_mixflow_fast"
    assert ladder["mixflow_fast_recompute"] == "speedup_over_mixflow_fast_adamwema"


def test_smoke_run_from_end_to_end(capsys, tmp_path) -> None:
    """Correctness by the kernels themselves (interpreted on the CPU), rows, table, plots."""
    code = run.main(["--smoke", "--device", DEVICE, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert code == 0 and "correctness: green" in out, out
    found = read(tmp_path / "rows.jsonl")
    assert {row["op"] for row in found} == {*cases.OPS, "optimizer"}
    for row in found:
        assert set(row) == set(KEYS) and row["note"].startswith("smoke: not a speed")
        # On a GPU a backend may refuse the toy's shape in other words.
        there = row["op"] == "attention" and row["provider"] in TIMED_BACKENDS
        reasons = ("left out", "saw no", "not installed")
        assert (row["p50"] is None) <= (there or any(reason in row["note"] for reason in reasons))
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
    writer = Writer(tmp_path / "new" / "rows.jsonl", ENVIRONMENT)

    def keep(suite: str, state: str) -> None:
        options = dict(config=None, device=CPU, deadline=Deadline(), smoke=True, environment={})
        job = run.Job(suite=suite, ops=(), writer=writer, plots=tmp_path, **options)
        run._keep_state(job, {"before": state})

    for suite, state in (("kernels", "cold"), ("step", "cold"), ("step", "warm")):
        keep(suite, state)
    kept = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert kept == {"kernels": {"before": "cold"}, "step": {"before": "warm"}}
    (tmp_path / "new" / "environment.json").write_text('{"cut o')
    keep("step", "cold")
