"""Presets: the official grids, and everything of them in print."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.flow.timesteps import shift_time
from mixflow_fast.sampling.presets import PRESETS, get_preset


def test_official_grids() -> None:
    """In the clock of each repository, from the formulas of its own code."""
    grids = {name: preset.sampler.grid().double() for name, preset in PRESETS.items()}
    noise_times = {name: 1 - grid for name, grid in grids.items()}

    def near(value: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(value, expected.double(), rtol=0, atol=2e-7)

    near(grids["sit-paper-ode"], torch.linspace(0, 1, 126))
    near(grids["sit-ode-250x2"], torch.linspace(0, 1, 251))
    near(grids["sit-paper-sde"][:-1], torch.linspace(0, 0.96, 250))
    near(noise_times["repa-ode"], torch.linspace(1, 0, 51))
    near(noise_times["repa-sde"], torch.cat([torch.linspace(1, 0.04, 250), torch.zeros(1)]))
    for name, k in (("rae-ag", 48**0.5), ("rae-ag-512", 192**0.5)):
        t = 1 - torch.linspace(0, 0.999, 50, dtype=torch.float64)
        near(noise_times[name], k * t / (1 + (k - 1) * t))
    # The smallest times that the networks of RAE see.
    assert float(noise_times["rae"][-1]) == pytest.approx(0.0068874, abs=1e-7)
    assert float(noise_times["rae-ag-512"][-1]) == pytest.approx(0.0136805, abs=1e-7)
    t = torch.linspace(0, 1, 250, dtype=torch.float64)
    near(grids["lightningdit"], 0.3 * t / (1 + (0.3 - 1) * t))
    for steps in (250, 50, 20):
        sampler = PRESETS[f"mixflow-table4-{steps}"].sampler
        assert (sampler.method, sampler.nfe) == ("heun", 2 * steps)


def test_grids_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    preset = PRESETS["diffusers-flow-euler"]
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(preset.sampler.steps)
    torch.testing.assert_close(1 - preset.sampler.grid(), theirs.sigmas, rtol=0, atol=3e-7)
    twice = shift_time(shift_time(torch.tensor(1e-3), 3.0, "noise_at_1"), 3.0, "noise_at_1")
    assert float(theirs.sigmas[-2]) == pytest.approx(float(twice), abs=1e-6)
    preset = PRESETS["diffusers-dpmpp2m"]
    solver = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    solver.set_timesteps(preset.sampler.steps)
    torch.testing.assert_close(1 - preset.sampler.grid(), solver.sigmas, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_prints_itself(name: str) -> None:
    preset = get_preset(name)
    text = preset.describe()
    sampler, guidance = preset.sampler, preset.guidance
    assert f"{sampler.method}, {sampler.steps} intervals, {sampler.nfe} network calls" in text
    assert preset.labels in text and f"pixels: {preset.quantisation}" in text
    assert len(preset.note) > 10 and preset.note in text
    assert ("no guidance" in text) == (guidance.scale == 1)
    if guidance.scale != 1:
        assert f"guidance {guidance.scale:g} on " in text


def test_another_name() -> None:
    with pytest.raises(ValueError, match="preset must be one of sit-paper-ode"):
        get_preset("sit-paper")
