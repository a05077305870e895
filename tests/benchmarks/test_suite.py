"""The kernel suite: a wrong result has no speed, and takes nothing else along."""

import dataclasses

import pytest
import torch

from benchmarks import ops, suite
from benchmarks.ops import (
    OBJECTIVE_OPS,
    SMOKE_SHAPES,
    BlockEntry,
    Cell,
    ObjectiveEntry,
    kernel_cells,
)
from benchmarks.rows import Deadline, Writer, read
from benchmarks.suite import SLOW_TO_COMPILE, Compiler, KernelSuite, modes_to_try

CPU = torch.device("cpu")
ENVIRONMENT = {"device": "here", "torch": "1", "triton": None, "cuda": None, "git_sha": "0" * 40}


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def kernel_suite(tmp_path) -> KernelSuite:
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    return KernelSuite(CPU, writer, Deadline(), "reference", smoke=True)


def rows_of(kernel_suite: KernelSuite, metric: str = "latency_ms") -> list[dict]:
    return [row for row in read(kernel_suite._writer.path) if row["metric"] == metric]


@pytest.mark.parametrize("change", [1.01, None])
def test_a_wrong_provider_has_no_speed(monkeypatch, capsys, kernel_suite, change) -> None:
    right = ObjectiveEntry.ours

    def wrong(self, cell, inputs, impl):
        if change is None:
            raise RuntimeError("does not launch")
        call, note = right(self, cell, inputs, impl)
        return lambda: (made := call()) | {"dpred": made["dpred"] * change}, note

    monkeypatch.setattr(ObjectiveEntry, "ours", wrong)
    cells = kernel_cells(("objective",), smoke=True)
    kernel_suite.run(cells)
    assert kernel_suite.refused == [cell.label for cell in cells]
    assert "RED, no speed" in capsys.readouterr().out
    assert all(row["p50"] is None for row in rows_of(kernel_suite))


def test_a_provider_that_fails_is_said_and_the_others_are_timed(monkeypatch, kernel_suite) -> None:
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("tried to allocate 5 TiB")

    monkeypatch.setattr(ObjectiveEntry, "plain", out_of_memory)
    kernel_suite.run(kernel_cells(("objective",), smoke=True))
    by_provider = {row["provider"]: row for row in rows_of(kernel_suite)}
    assert by_provider["eager"]["p50"] is None and "5 TiB" in by_provider["eager"]["note"]
    assert by_provider["mixflow_fast"]["p50"] > 0 and not kernel_suite.refused


def test_a_wrong_backend_does_not_take_the_others_along(monkeypatch, kernel_suite) -> None:
    whole = BlockEntry.other

    def wrong(self, provider, cell, inputs, impl):
        call, note = whole(self, provider, cell, inputs, impl)
        return lambda: {name: value * 1.1 for name, value in call().items()}, note

    monkeypatch.setattr(BlockEntry, "other", wrong)
    kernel_suite.run(kernel_cells(("attention",), smoke=True)[:1])
    found = {row["provider"]: row for row in rows_of(kernel_suite)}
    assert found["flash"]["p50"] is None and "wrong result: flash: out" in found["flash"]["note"]
    assert found["mixflow_fast"]["p50"] > 0 and not kernel_suite.refused


def test_a_cell_that_breaks_does_not_take_the_others_along(monkeypatch, kernel_suite) -> None:
    whole, calls = suite.timing.measure, []

    def measure(*args):
        calls.append(args)
        if len(calls) == 1:
            raise AssertionError
        return whole(*args)

    monkeypatch.setattr(suite.timing, "measure", measure)
    cells = kernel_cells(("velocity_loss",), smoke=True)
    kernel_suite.run(cells)
    assert len(kernel_suite.refused) == 1 and cells[0].label in kernel_suite.refused[0]
    assert {"forward", "backward"} <= {row["mode"] for row in rows_of(kernel_suite, "call_ms")}


def test_deadline_stops_before_a_cell(monkeypatch, tmp_path) -> None:
    clock = Clock()
    deadline = Deadline(10, clock)
    writer = Writer(tmp_path / "rows.jsonl", ENVIRONMENT)
    kernel_suite = KernelSuite(CPU, writer, deadline, "reference", smoke=True)
    chosen = kernel_cells(("velocity_loss",), smoke=True)
    whole = suite.timing.measure

    def measure(*args):
        clock.now += 9.5
        return whole(*args)

    monkeypatch.setattr(suite.timing, "measure", measure)
    kernel_suite.run(chosen)
    assert deadline.left_out == [cell.label for cell in chosen[1:]]
    assert {row["mode"] for row in read(writer.path)} == {chosen[0].mode}


def test_slow_compilation_is_for_large_bf16_cells() -> None:
    slow = {c for c in kernel_cells(OBJECTIVE_OPS) if SLOW_TO_COMPILE in modes_to_try(c)}
    assert {c.dtype for c in slow} == {torch.bfloat16}
    assert (256, 768, 16, 16) in {c.shape for c in slow}
    assert (256, 4, 32, 32) not in {c.shape for c in slow}
    assert len(modes_to_try(Cell(op="objective", mode="full", shape=(512, 4, 2, 2)))) == 2


def test_the_fastest_way_to_compile_serves_the_class(monkeypatch) -> None:
    """Two modes are tried at the first cell, the second of the class takes the winner."""
    timed, compiled = [], []

    def quick_ms(call) -> float:
        timed.append(call())
        return 2.0 - len(timed)

    def compile_(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile_)
    compiler = Compiler(quick_ms)
    first = Cell(op="objective", mode="full", shape=SMOKE_SHAPES[0])
    for cell in (first, dataclasses.replace(first, shape=(3, 4, 4, 4))):
        inputs = ops.REGISTRY["objective"].inputs(cell, CPU)
        call, note = compiler.call(cell, inputs)
        assert set(call()) == {"x", "t", "slowed_t", "loss", "dpred", "x0"}
        assert "max-autotune without coordinate descent, chosen at 2x4x4x4" in note
        assert f"not tried: {SLOW_TO_COMPILE}" in note
    assert len(timed) == 2 and len(compiled) == 4
