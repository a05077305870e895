"""The benchmark programs from end to end, and what they do when something goes wrong."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import checks, ops, rows, run, step, timing
from benchmarks import step_variants as variants
from benchmarks import suite as kernel_suite
from benchmarks.ops import FAMILIES, KERNEL_OPS, OBJECTIVE_OPS, TIMED_BACKENDS, kernel_cells
from benchmarks.rows import KEYS, Deadline, Writer, read
from mixflow_fast.diagnostics.kernel_checks import Finding
from mixflow_fast.diagnostics.kernel_plan import Task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


def _report(error: float, op: str = "gelu") -> checks.Report:
    found = {"check": "all", "tensor": "x", "dtype": "float32", "error": error, "limit": 1.0}
    return checks.Report([Finding(op=op, **found)])


GREEN = _report(0.0)


def test_an_interrupt_keeps_what_was_found(monkeypatch, capsys, tmp_path) -> None:
    def finding(check: str, error: float) -> Finding:
        return Finding("gelu", check, "x", "float32", error, 0.0)

    def interrupted():
        yield finding("second", float("inf"))
        raise KeyboardInterrupt

    first = [finding("first", 0.0)]
    runs = {"one": lambda: first, "two": interrupted, "three": lambda: first}
    some = [Task(("gelu",), name, run) for name, run in runs.items()]
    monkeypatch.setattr(checks, "tasks", lambda *_: some)
    (tmp_path / "correctness.jsonl").write_text("of another run\n")
    assert checks.main(["--device", "cpu", "--out", str(tmp_path)]) == 130
    found = [json.loads(s) for s in (tmp_path / "correctness.jsonl").read_text().splitlines()]
    assert [(row["check"], row["error"]) for row in found] == [("first", 0.0), ("second", None)]
    assert {row["op"] for row in found} == {"gelu"}
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
    monkeypatch.setattr(kernel_suite.KernelSuite, "_cell", lambda _, cell: timed.append(cell.op))
    monkeypatch.setattr(step.StepSuite, "run", lambda self: steps.append(self._red))
    assert _smoke(tmp_path) == 1
    gone = {"gelu": {"gelu"}, "velocity_loss": {"velocity_loss", "objective"}}[red]
    assert set(timed) == set(KERNEL_OPS) - gone and steps == [gone]
    out = capsys.readouterr().out
    assert f"without a speed: {', '.join(sorted(gone))}" in out
    assert f"  {red}: wrong on this device" in out


def test_nothing_is_timed_where_all_is_red(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr(checks, "run", lambda *_: _report(2.0, "of every op"))
    monkeypatch.setattr(timing, "measure", lambda *_: pytest.fail("timed on red"))
    assert _smoke(tmp_path, "--suite", "kernels") == 1
    assert "without a speed: attention, gelu" in capsys.readouterr().out
    assert not (tmp_path / "rows.jsonl").exists()
    assert run.red_ops(["interpolate"]) == set(OBJECTIVE_OPS)
    assert run.red_ops(["normal"]) == set(FAMILIES["objective"])
    assert run.red_ops(["objective"]) == {"objective"} and run.red_ops([]) == set()
    assert run.red_ops(["mixed_source"]) == {"mixed_source"}
    assert run.red_ops(["block"]) == set(KERNEL_OPS) - set(FAMILIES["objective"])


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


def test_an_interrupt_keeps_what_was_measured(monkeypatch, capsys, tmp_path) -> None:
    cell = kernel_suite.KernelSuite._cell
    seen = []

    def interrupted(self, one):
        if seen:
            raise KeyboardInterrupt
        seen.append(one)
        cell(self, one)

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
    whole_kernels = kernel_suite.KernelSuite(CPU, writer, Deadline(), "reference", smoke=True)
    whole_kernels._on_gpu, whole_kernels._copy = True, 1e9
    whole_kernels._compiler = kernel_suite.Compiler(lambda call: float(call() is None))
    whole_kernels.run(kernel_cells(("velocity_loss",), smoke=True))
    whole = step.StepSuite(CPU, writer, Deadline(), "reference")
    whole._on_gpu = True
    whole.run()
    assert not whole_kernels.refused and not whole.refused
    found = [row for row in read(writer.path) if row["p50"] is not None]
    kernels = [row["metric"] for row in found if row["op"] in KERNEL_OPS]
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
    assert {row["op"] for row in found} == {*ops.OPS, "optimizer"}
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
    for op in ops.OPS:
        assert (tmp_path / f"{op}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    environment = json.loads((tmp_path / "environment.json").read_text())["all"]
    assert environment["torch"] == torch.__version__
    assert environment["before"] and environment["after"]


def test_environment_of_each_suite_is_kept(tmp_path) -> None:
    for suite, state in (("kernels", "cold"), ("step", "cold"), ("step", "warm")):
        rows.keep_state(tmp_path / "new", suite, {"before": state})
    kept = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert kept == {"kernels": {"before": "cold"}, "step": {"before": "warm"}}
    (tmp_path / "new" / "environment.json").write_text('{"cut o')
    rows.keep_state(tmp_path / "new", "step", {})
