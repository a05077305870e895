"""Comparisons as a whole: a kill at any moment, and the published sign on networks of real size."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from mixflow_fast.comparison.plan import Arm, Plan, ToSample, check_plan
from mixflow_fast.comparison.work import compare
from mixflow_fast.config.loading import load_config
from mixflow_fast.evaluation.features.extractor import PixelFeatures, extract
from mixflow_fast.evaluation.protocol import Protocol
from mixflow_fast.evaluation.reference import Reference, read_reference, write_reference
from mixflow_fast.evaluation.sample_sets import Made, SetPlan
from mixflow_fast.reports.comparison_report import render
from mixflow_fast.reports.comparison_result import ArmRecord, record
from mixflow_fast.training.trainer import train
from tests.support.command_line import run
from tests.support.sample_sets import ended, in_child

pytest.importorskip("matplotlib")
N, SHARD = 60, 20


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def arm(key: str, weights: str, shade: int, n: int = N) -> Arm:
    """Pictures by id alone, brighter by `shade`."""
    every = images(N, 1)

    def make(ids: torch.Tensor) -> Made:
        return Made((every[ids] // 2) + shade, ids % 2)

    sampler = {"method": "euler", "intervals": 4, "nfe": 4, "network_calls": 4, "remedy": None}
    protocol = Protocol({"sampler": sampler, "set": {"n": n, "seed": 0}, "image": {"size": 8}})
    plan = SetPlan(protocol=protocol, shape=(3, 8, 8), origin={"weights": weights}, shard=SHARD)
    said = ArmRecord(key=key, label=key, path=key, sha256=weights, average="ema", config=None)
    return Arm(record=said, sets={4: ToSample(plan=plan, make=make, batch_size=SHARD)})


def plan(reference: Reference, **changed: object) -> Plan:
    arms = {"before": arm("before", "a" * 64, 0), "after": arm("after", "b" * 64, 90)}
    options = {"arms": arms, "extractors": [PixelFeatures("pooled_pixels")], **changed}
    return Plan(reference=reference, command="mixflow-fast compare", **options)


@pytest.fixture
def reference(tmp_path: Path) -> Reference:
    path = tmp_path / "real" / "reference.npz"
    path.parent.mkdir()
    found = extract([images(500, 2)], PixelFeatures("pooled_pixels"), source="real")
    write_reference(path, [found], "noise", 0)
    return read_reference(path)


def twin(of: Plan, folder: Path) -> str:
    return json.dumps(record(compare(of, folder, lambda text: None)))


def test_a_kill_at_any_file_loses_nothing(tmp_path: Path, reference: Reference) -> None:
    """The process kills itself at every fourth rename; the next start ends in the same bytes."""
    whole = twin(plan(reference), tmp_path / "whole")
    killed = 0
    for moment in range(1, 40, 4):
        folder = tmp_path / f"killed_{moment}"

        def work(moment: int = moment, folder: Path = folder) -> None:
            replace, passed = os.replace, [0]

            def stepping(source: object, target: object, **options: object) -> None:
                passed[0] += 1
                if passed[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target, **options)

            os.replace = stepping
            twin(plan(reference), folder)

        killed += ended(in_child(work)) == -signal.SIGKILL
        assert twin(plan(reference), folder) == whole, moment
    assert killed >= 5


def test_a_folder_takes_more_arms_and_refuses_others(tmp_path: Path, reference: Reference) -> None:
    folder = tmp_path / "files"
    twin(plan(reference), folder)
    there = plan(reference).arms
    more = {"before": there["before"], "control": arm("control", "c" * 64, 5), **there}
    found = compare(plan(reference, arms=more), folder, lambda text: None)
    assert list(found.arms) == ["before", "control", "after"]
    assert "no control" not in render(found).lower()
    with pytest.raises(ValueError, match="another comparison .other weights of after.*--fresh"):
        twin(plan(reference, arms={**there, "after": arm("after", "d" * 64, 3)}), folder)
    (folder / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged"):
        twin(plan(reference), folder)


def test_sets_of_different_sizes_are_never_compared(reference: Reference) -> None:
    arms = {"before": arm("before", "a" * 64, 0, 40), "after": arm("after", "b" * 64, 0)}
    with pytest.raises(ValueError, match="have different protocols"):
        check_plan(plan(reference, arms=arms))
    with pytest.raises(ValueError, match="different sizes, 40, 60"):
        check_plan(plan(reference, arms=arms, allow=["set.n"]))


@pytest.mark.long
def test_the_published_sign_on_photo_crops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against plain training slowing wins at 5 steps and loses at 50, in averaged pixels."""
    base = load_config("photos", [f"out={tmp_path / 'base'}", "train.seed=0"])
    train(base, quiet=True)
    for name, objective in (
        ("control", {"objective.gamma": 0.0, "objective.timesteps": "uniform"}),
        ("mixflow", {"objective.gamma": 0.3, "objective.timesteps": "beta21"}),
    ):
        further = {"out": str(tmp_path / name), "train.init": str(tmp_path / "base/weights.pt")}
        more = {"train.images": 64_000, "train.seed": 1, "optim.lr": 5e-4, **objective}
        train(base.replace(**further, **more), quiet=True)
    out = tmp_path / "report.html"
    arms = [tmp_path / name for name in ("base", "mixflow", "control")]
    command = ["compare", *arms[:2], "--control", arms[2], "--steps", "5,50", "--out", out]
    code, said, err = run(*command, capsys=capsys)
    assert code == 0, err
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["primary"] == "fd_pooled_pixels"
    verdicts = {
        v["steps"]: v["verdict"]
        for v in found["verdicts"]
        if v["primary"] and (v["a"], v["b"]) == ("after", "control")
    }
    assert verdicts == {5: "better", 50: "worse"}
    first = out.read_bytes(), out.with_suffix(".json").read_bytes()
    assert run(*command, capsys=capsys)[0] == 0
    assert run(*command, "--fresh", capsys=capsys)[0] == 0
    assert (out.read_bytes(), out.with_suffix(".json").read_bytes()) == first
