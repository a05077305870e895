"""Ours against SiT's official sampler loops: the loops are right, and a wrong one has no speed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import plain_sampling, sampling
from benchmarks.rows import Deadline, Writer, read
from benchmarks.sampling import Cell, cells, difference, make_network
from tests.support.golden import load
from tests.support.networks import Toy, relative

CPU = torch.device("cpu")
TOY = cells(CPU, smoke=True)


def test_the_sde_loop_is_the_official_one() -> None:
    """Against the recorded official run with its own noise."""
    tensors, _ = load("sit_sde_euler_10")
    noise = iter(tensors["noise"])
    out = plain_sampling.sample_sde(
        Toy("data_at_1"), tensors["z"], tensors["y"], 10, 1.0, lambda _: next(noise)
    )
    assert relative(out, tensors["out.sigma.Mean"]) < 2e-5


@pytest.mark.parametrize("cell", TOY, ids=lambda cell: f"{cell.method}, {cell.cfg_scale:g}")
def test_both_end_at_the_same_samples(cell: Cell) -> None:
    pytest.importorskip("torchdiffeq")
    more = dataclasses.replace(cell, steps=5)
    assert difference(more, make_network(more, CPU, torch.float32)) < 1e-5


def test_the_official_sde_asks_twice_a_step(monkeypatch) -> None:
    cell = next(cell for cell in TOY if cell.method == "sde_euler" and cell.cfg_scale == 1.0)
    model = make_network(cell, CPU, torch.float32)
    calls: list[int] = []
    velocity = type(model).velocity

    def counted(self, x, t, y):
        calls.append(len(x))
        return velocity(self, x, t, y)

    monkeypatch.setattr(type(model), "velocity", counted)
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, t, y: type(model).velocity(self, x, t, y)
    )
    sampling.ours(cell, model, "eager")()
    assert len(calls) == cell.steps
    calls.clear()
    sampling.official(cell, model)()
    assert len(calls) == 2 * cell.steps


def test_smoke_run(tmp_path, capsys) -> None:
    pytest.importorskip("torchdiffeq")
    assert sampling.main(["--smoke", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path / "rows.jsonl")
    assert {row["op"] for row in rows} == {"sampling"}
    ratios = [row for row in rows if row["metric"] == "speedup_over_official"]
    assert {(row["mode"], row["variant"]) for row in ratios} == {
        (cell.method, cell.label) for cell in TOY
    }
    assert all(row["low95"] <= row["p50"] <= row["high95"] for row in ratios)
    assert "not a speed" in rows[0]["note"] and "times faster" in capsys.readouterr().out


def test_a_wrong_result_has_no_speed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sampling, "difference", lambda *_: 0.3)
    environment = {"device": "d", "torch": "1", "triton": None, "cuda": None, "git_sha": "0"}
    writer = Writer(tmp_path / "rows.jsonl", environment)
    suite = sampling.SamplingSuite(CPU, writer, Deadline(), smoke=True)
    suite.run()
    assert len(suite.refused) == len(TOY) and "differ by 0.3" in suite.refused[0]
    assert writer.count == 0 and "RED" in capsys.readouterr().out


def test_where_there_is_no_gpu(capsys) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert sampling.main(["--device", "cuda"]) == 2
    assert "device cuda is not there" in capsys.readouterr().err


def test_a_mode_with_other_samples_has_no_speed(tmp_path, monkeypatch, capsys) -> None:
    """Where a GPU compiles and captures: here a mode that is wrong, beside one that is right."""
    pytest.importorskip("torchdiffeq")
    made = sampling.ours

    def ours(cell: Cell, model: torch.nn.Module, mode: str) -> object:
        call = made(cell, model, "eager")
        return (lambda: 1.1 * call()) if mode == "graph" else call

    monkeypatch.setattr(sampling, "ours", ours)
    monkeypatch.setattr(sampling.SamplingSuite, "_modes", lambda self: ("compile", "graph"))
    monkeypatch.setattr(sampling, "cells", lambda *_: TOY[:1])
    assert sampling.main(["--smoke", "--out", str(tmp_path)]) == 1
    rows = read(tmp_path / "rows.jsonl")
    timed = {row["provider"] for row in rows if row["metric"] == "speedup_over_official"}
    assert timed == {"mixflow_fast", "mixflow_fast_compile"}
    (refused,) = (row for row in rows if row["provider"] == "mixflow_fast_graph")
    assert refused["p50"] is None and "differ from those of the eager loop" in refused["note"]
    assert "mixflow_fast_graph: RuntimeError" in capsys.readouterr().out
