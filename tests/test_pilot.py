"""The arms of a pilot differ in gamma alone."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mixflow_fast import pilot
from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.evaluation.examples import Examples
from mixflow_fast.pilot import PilotPlan, arm_config, claim, planned_images, run_pilot
from mixflow_fast.sampling.samples import SampleResult


def test_arms_differ_in_gamma_alone(tmp_path: Path) -> None:
    config = load_config("photos", ["objective.gamma=0.5", "train.seed=6"])
    one, two = (
        flatten(arm_config(config, tmp_path / "w.pt", g, 1000, tmp_path / f"{g}").to_dict())
        for g in (0.0, 0.3)
    )
    changed = {name for name in one if one[name] != two[name]}
    assert changed == {"out", "objective.gamma"}
    assert one["objective.timesteps"] == "beta21" and one["train.init"] == str(tmp_path / "w.pt")
    # Whole batches, and other examples than the run's own.
    assert one["train.images"] == 15 * 64 and one["train.seed"] == 7
    assert planned_images(config) == 8000


def test_a_plan_of_nothing_is_refused() -> None:
    plan = PilotPlan(gammas=(0.0, 0.8), images=64, steps=5)
    for name in ("images", "steps", "samples", "batch_size"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            replace(plan, **{name: 0})


def test_a_kill_before_the_first_file_leaves_no_other_pilot(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".pilot.json.{dead.pid}.tmp").write_text('{"wei')
    claim(tmp_path, {"weights": "abc"}, PilotPlan(gammas=(0.0,), images=64, steps=5))
    assert [path.name for path in tmp_path.iterdir()] == ["pilot.json"]


class Recorded:
    """A network that only notes where it is taken."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def to(self, device: torch.device | str) -> Recorded:
        self.devices.append(torch.device(device).type)
        return self


def test_arms_are_sampled_on_the_grid_of_the_rule_and_kept_for_one_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow flow, which gives the rule's gamma, is measured on the objective's shifted grid."""
    torch.manual_seed(0)
    pytest.importorskip("sklearn")
    shifts: list[float] = []

    def train(arm: Config, quiet: bool) -> SimpleNamespace:
        Path(arm.out).mkdir()
        (Path(arm.out) / "config.yaml").write_text(arm.to_yaml())
        return SimpleNamespace(finished=True)

    def sample(model: object, *, num: int, shift: float = 1.0, **_: object) -> SampleResult:
        shifts.append(shift)
        return SampleResult(x=torch.randn(num, 3, 8, 8), labels=None, nfe=2)

    monkeypatch.setattr(pilot, "train", train)
    monkeypatch.setattr(pilot, "sample", sample)
    model = Recorded()
    monkeypatch.setattr(pilot, "load_model", lambda path: model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = ["data.size=8", "model.input_size=8", "objective.shift=3"]
    config = load_config("photos", settings)
    plan = PilotPlan(gammas=(0.0, 0.8), images=64, steps=2, samples=100)
    arguments = (tmp_path / "w.pt", plan, Examples(torch.randn(50, 3, 8, 8), None), tmp_path / "p")
    table = run_pilot(config, *arguments, quiet=True)
    assert shifts == [3.0, 3.0] and set(model.devices) == {"cuda"}
    assert run_pilot(config.replace(**{"train.log_every": 7}), *arguments, quiet=True) == table
    with pytest.raises(ValueError, match=r"p/gamma_0 .*objective.shift: 3.0 -> 2.0.*another --out"):
        run_pilot(config.replace(**{"objective.shift": 2.0}), *arguments, quiet=True)
    assert len(shifts) == 2
