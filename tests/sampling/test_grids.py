"""Grids of times: shift, ends, a last interval of its own size."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.sampling.grids import time_grid


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
