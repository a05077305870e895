"""The arms of a pilot differ in gamma alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.pilot import PilotPlan, arm_config, planned_images


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
