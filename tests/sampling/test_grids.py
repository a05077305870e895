"""Grids of times: shift, ends, a last interval of its own size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from mixflow_fast.sampling.grids import sigma_grid, time_grid


def test_time_grid() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    grid = time_grid(4, shift=6.92820323)
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    # RAE's table: k = 6.928 maps 0.5 to 0.87387 in the clock where 1 is noise.
    assert float(grid[2]) == pytest.approx(1 - 0.87387, abs=1e-5)


def test_ends_and_last_interval() -> None:
    grid = time_grid(4, start=0.2, end=0.8)
    torch.testing.assert_close(grid, torch.tensor([0.2, 0.35, 0.5, 0.65, 0.8]))
    grid = time_grid(4, last_size=0.04)
    torch.testing.assert_close(grid, torch.tensor([0.0, 0.32, 0.64, 0.96, 1.0]))
    # All raw times are shifted, the last interval's too: s -> 3 s / (1 + 2 s).
    assert float(time_grid(4, 3.0, last_size=0.04)[3]) == pytest.approx(1 - 0.12 / 1.08, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start": 0.5, "end": 0.5}, "0 <= start < end <= 1"),
        ({"end": 1.5}, "0 <= start < end <= 1"),
        ({"start": float("nan")}, "0 <= start < end <= 1"),
        ({"last_size": 1.0}, "last_size"),
        ({"last_size": 0.0}, "last_size"),
        ({"steps": 1, "last_size": 0.04}, "at least 2 steps"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_grid(**({"steps": 4} | arguments))


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.5])
def test_sigma_grid_is_the_scheduler_s_to_the_bit(shift: float) -> None:
    for steps in (1, 2, 5, 10, 28, 40, 100):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        assert torch.equal(sigma_grid(steps, shift), scheduler.sigmas)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        assert torch.equal(sigma_grid(steps, shift, "linear"), scheduler.sigmas)


def test_sigma_grid_of_sd3() -> None:
    """Every grid ends 0.0089, 0: the last step moves almost nothing."""
    published = torch.tensor([1, 0.900, 0.751, 0.503, 0.0089, 0])
    torch.testing.assert_close(sigma_grid(5, 3.0), published, atol=5e-4, rtol=0)
    for steps in (2, 10, 40):
        assert float(sigma_grid(steps, 3.0)[-2]) == pytest.approx(0.0089, abs=5e-5)
    linear = torch.tensor([1, 0.923, 0.818, 0.667, 0.429, 0])
    torch.testing.assert_close(sigma_grid(5, 3.0, "linear"), linear, atol=5e-4, rtol=0)
    torch.testing.assert_close(sigma_grid(5, 3.0, "linear"), 1 - time_grid(5, 3.0))
    # The same grid as the table's row, in the other clock, where it is rounded otherwise.
    last = 3 * 0.001 / 1.002
    torch.testing.assert_close(sigma_grid(5, 3.0), 1 - time_grid(5, 3.0, last_size=last))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"grid": "karras"}, "grid must be one of diffusers, linear"),
        ({"steps": 0}, "steps must be"),
        ({"shift": 0.5}, "shift must be"),
    ],
)
def test_bad_sigma_grids(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sigma_grid(**({"steps": 4} | arguments))
