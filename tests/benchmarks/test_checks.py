"""`python -m benchmarks.checks`: what it reports, and what it says of a timed call."""

import pytest
import torch

from benchmarks import checks
from benchmarks.checks import verify
from benchmarks.ops import REGISTRY, Cell
from benchmarks.rows import Deadline
from mixflow_fast.diagnostics.block_cases import BLOCK_OPS
from mixflow_fast.diagnostics.kernel_checks import Finding
from mixflow_fast.diagnostics.kernel_plan import Task
from tests.support.kernels import DEVICE

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_checks_that_raise_or_do_not_fit_are_not_green(monkeypatch) -> None:
    def explode():
        raise RuntimeError("no such kernel")

    def pass_():
        return [Finding("gelu", "fine", "x", "float32", 0.0, 0.0)]

    def plan(*runs) -> None:
        some = [Task(("gelu",), name, run) for name, run in zip(("one", "two"), runs, strict=True)]
        monkeypatch.setattr(checks, "tasks", lambda *_: some)

    plan(pass_, explode)
    report = checks.run(CPU)
    assert not report.green and len(report.findings) == 2
    assert [finding.op for finding in report.failures] == ["gelu"]
    assert "no such kernel" in report.table() and "RED" in report.table()
    plan(pass_, pass_)
    assert checks.run(CPU).green
    clock = Clock()

    def slow():
        clock.now += 9
        return pass_()

    plan(slow, slow)
    report = checks.run(CPU, deadline=Deadline(10, clock))
    assert report.left_out == ["two"] and not report.failures and not report.green
    assert not checks.Report().green


def test_families_write_files_of_their_own(tmp_path) -> None:
    """Two processes of the suite write at the same time. With the kernels themselves."""
    options = ["--device", DEVICE.type, "--family", "blocks", "--level", "timed"]
    assert checks.main([*options, "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["correctness_blocks.jsonl"]
    text = (tmp_path / "correctness_blocks.jsonl").read_text()
    assert all(f'"op": "{op}"' in text for op in BLOCK_OPS) and "velocity" not in text


WRONG = {
    "gradient a hundredth too long": (lambda m, x1: {"dpred": m["dpred"] * 1.01}, "dpred"),
    "gradient of another dtype": (lambda m, x1: {"dpred": m["dpred"].double()}, "dpred is"),
    "loss off": (lambda m, x1: {"loss": m["loss"] * 1.001}, "loss"),
    "loss not a number": (lambda m, x1: {"loss": m["loss"] * float("nan")}, "loss"),
    "wrong direction": (
        lambda m, x1: {"x": (m["x0"].float() + x1.float() - m["x"].float()).bfloat16()},
        "x: ",
    ),
    "x of another dtype": (lambda m, x1: {"x": m["x"].float()}, "x is"),
    "slowed to the data": (
        lambda m, x1: {"slowed_t": m["t"] + 0.1 * (1 - m["t"])},
        "slowed_t is not in",
    ),
    "no times": (lambda m, x1: {"slowed_t": m["slowed_t"] * float("nan")}, "slowed_t"),
    "uniform t": (lambda m, x1: {"t": m["t"] ** 2}, "mean of t"),
    "noise too small": (lambda m, x1: {"x0": m["x0"] * 0.9}, "variance of x0"),
    "noise off": (lambda m, x1: {"x0": m["x0"] + 0.2}, "mean of x0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_verify_finds_what_is_wrong_with_the_objective(name) -> None:
    cell = Cell(op="objective", mode="full", shape=(512, 4, 2, 2))
    op = REGISTRY["objective"]
    inputs = op.inputs(cell, CPU)
    torch.manual_seed(0)
    made = op.plain(cell, inputs)()
    change, message = WRONG[name]
    assert verify(cell, inputs, made, "eager") == []
    wrong = made | change(made, inputs.tensors["x1"])
    assert any(message in line for line in verify(cell, inputs, wrong, "eager"))


@pytest.mark.parametrize("op", BLOCK_OPS)
def test_verify_finds_what_is_wrong_in_each_tensor(op) -> None:
    variant = {"gelu": "bias", "swiglu": "bias", "attention": "plain", "qk_norm_rope": "rope"}
    shape = (4, 9, 2, 16) if op in ("attention", "qk_norm_rope") else (4, 8, 64)
    cell = Cell(op=op, mode="full", shape=shape, variant=variant.get(op, "rms per sample"))
    inputs = REGISTRY[op].inputs(cell, CPU)
    made = REGISTRY[op].plain(cell, inputs)()
    kept = {}
    assert verify(cell, inputs, made, "eager", kept) == [] and kept
    for name in made:
        for wrong in (made[name] * 1.05, made[name].double(), made[name] * float("nan")):
            lines = verify(cell, inputs, made | {name: wrong}, "eager", kept)
            assert len(lines) == 1 and lines[0].startswith(name), (name, lines)
