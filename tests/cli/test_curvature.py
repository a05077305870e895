"""`mixflow-fast curvature` on small runs, and on wrong input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mixflow_fast.cli.main import main
from mixflow_fast.evaluation import curvature as measured
from mixflow_fast.models import build, load_model
from mixflow_fast.models.weights.digest import weights_sha256
from mixflow_fast.models.weights.sources import load_source
from mixflow_fast.sampling import Guidance, PreparedSampling, Sampler, sample_source
from tests.support.command_line import run
from tests.support.sources import train_kinds

pytest.importorskip("scipy")
SMALL = ["-n", 10, "--steps", 4, "--batch-size", 4, "--seed", 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return train_kinds(tmp_path_factory.mktemp("curvature"))


def test_numbers_of_three_side_by_side(capsys, tmp_path: Path, runs) -> None:
    paths, out = [runs[kind] for kind in ("standard", "data", "class")], tmp_path / "c.json"
    code, said, err = run(
        "curvature", *paths, *SMALL, "--solver-samples", 6, "--out", out, capsys=capsys
    )
    assert code == 0, err
    found = json.loads(out.read_text())
    values = []
    for path, record in zip(paths, found["checkpoints"], strict=True):
        model, stored = load_model(path), load_source(path)
        source = None
        if path == runs["class"]:
            source = sample_source(stored.source, 0.5)
        assert record["source"] == (None if source is None else source.to_record())
        assert record["weights_sha256"] == weights_sha256(model)
        prepared = PreparedSampling(
            model, Sampler("euler", 4), Guidance(), batch_size=4, source=source
        )
        own = measured.network_curvature(prepared, 10, seed=2, steps=4)
        assert record["curvature"] == pytest.approx(own.to_record())
        assert own.mean > 1e-4 and own.se == pytest.approx(own.std / math.sqrt(9))
        assert f"{path}: curvature {own.mean:.6g} (se {own.se:.2g})" in said
        values.append(own.values)
        last = record["solvers"][-1]
        # Batches of four and two, a mean over them; the last is filled up to four.
        counts = [prepared.with_sampler(Sampler("rk45")).draw(ids, seed=2, balanced=True).nfe
                  for ids in torch.arange(6).split(4)]  # fmt: skip
        assert last["method"] == "rk45" and last["apart"] is None and last["steps"] is None
        assert last["nfe"] == sum(counts) / 2
    assert "source: mixed source, kappa class, mode moments, w 0.5" in said
    assert "source: N(0, I): its source sees the data" in said
    for number, pair in enumerate(found["differences"], 1):
        apart = values[number] - values[0]
        assert (pair["of"], pair["minus"]) == (str(paths[number]), str(paths[0]))
        assert pair["value"] == pytest.approx(float(apart.mean()))
        assert pair["se"] == pytest.approx(float(apart.std()) / math.sqrt(10))
        assert pair["high"] - pair["low"] == pytest.approx(2 * 1.959964 * pair["se"])
        assert f"{paths[number]} minus {paths[0]}: {pair['value']:+.4g} (95%" in said
    nfe = {(row["method"], row["steps"]): row["nfe"] for row in found["checkpoints"][0]["solvers"]}
    assert nfe[("heun_last_euler", 3)] == 5 and nfe[("heun_last_euler", 5)] == 9
    assert all(nfe[("euler", n)] == n for n in (4, 5, 10, 20, 32, 64, 128))
    errors = [
        row["apart"] for row in found["checkpoints"][0]["solvers"] if row["steps"] is not None
    ]
    assert errors[0] > errors[3] > errors[6] > 0  # Euler's, with more and more steps
    assert "heun_last_euler, 3 steps" in said and "NFE" in said


def test_one_without_a_table(capsys, runs) -> None:
    options = ["--solver-samples", 0, "--cfg-scale", 2, "--weights", "model"]
    code, said, err = run("curvature", runs["noise"], *SMALL, *options, capsys=capsys)
    assert code == 0, err
    assert "NFE" not in said and "minus" not in said and "w uniform, as in training" in said
    code, other, _ = run("curvature", runs["noise"], *SMALL, *options, "--source-w", 0,
                         capsys=capsys)  # fmt: skip
    assert code == 0 and "w 0\n" in other and other.split("\n")[0] != said.split("\n")[0]


def test_tolerances_decide_the_count(capsys, runs) -> None:
    counts = []
    for tolerance in ("1e-2", "1e-8"):
        options = ["--solver-samples", 4, "--rtol", tolerance, "--atol", tolerance]
        code, said, _ = run("curvature", runs["standard"], *SMALL, *options, capsys=capsys)
        (line,) = [line for line in said.splitlines() if line.strip().startswith("rk45 ")]
        counts.append(int(line.split()[1]))
        assert code == 0
    assert counts[0] < counts[1]


def test_an_interrupt_writes_nothing(monkeypatch, tmp_path: Path, runs) -> None:
    """Neither half of a file, nor an older file that it was to replace."""
    out, calls = tmp_path / "c.json", []
    plain = measured.network_curvature

    def stop_at_the_second(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(*arguments, **options)

    monkeypatch.setattr(measured, "network_curvature", stop_at_the_second)
    out.write_text("older")
    command = ["curvature", runs["standard"], runs["data"], *SMALL, "--out", out, "--force"]
    assert main([str(part) for part in command]) == 130
    assert len(calls) == 2 and out.read_text() == "older"
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-n", 0], "--num must be >= 1, got 0"),
        (["--steps", 0], "--steps must be >= 1"),
        (["--solver-samples", -1], "--solver-samples must be >= 0"),
        (["--rtol", 0], "--rtol must be a number > 0"),
        (["--out", "c.txt"], "--out must end in .json"),
        (["--source-w", 0.5], "--source-w has no effect"),
    ],
)
def test_refusals(capsys, runs, options: list[object], message: str) -> None:
    code, _, err = run("curvature", runs["data"], *options, capsys=capsys)
    assert code == 2 and message in err


def test_networks_of_other_sizes_are_no_pair(capsys, tmp_path: Path, runs) -> None:
    torch.save(build("SiT-S/8", input_size=16, depth=1).state_dict(), tmp_path / "other.pt")
    code, _, err = run(
        "curvature", runs["standard"], tmp_path / "other.pt", *SMALL, "--solver-samples", 0,
        capsys=capsys,
    )  # fmt: skip
    assert code == 2 and "measure them one by one" in err


def test_values_that_are_not_finite_are_refused() -> None:
    class Broken(torch.nn.Module):
        config = {"in_channels": 1, "input_size": 2, "num_classes": 0}
        clock = "data_at_1"

        def forward(self, x, t, y=None):
            return x / torch.zeros_like(x)

    prepared = PreparedSampling(Broken(), Sampler("euler", 2), Guidance(), batch_size=2)
    with pytest.raises(ValueError, match="2 of 2 trajectories have values that are not finite"):
        measured.network_curvature(prepared, 2, steps=2)
    with pytest.raises(ValueError, match="num must be >= 1"):
        measured.network_curvature(prepared, 0)
