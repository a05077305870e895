"""Grids of times, from noise (t = 0) to data (t = 1) in the engine's clock.

Raw times are evenly spaced and then shifted. Official grids as arguments of `time_grid`, N the
number of intervals (their `num_steps` often counts points):

| source               | points                         | arguments                            |
|----------------------|--------------------------------|--------------------------------------|
| SiT, REPA ODE        | N + 1                          | N                                    |
| SiT, REPA SDE        | N, then the data               | N, last_size=0.04                    |
| RAE ODE              | N + 1, stops before the data   | N, shift=k, end=0.999                |
| LightningDiT         | N + 1, t -> q t / (1+(q-1) t)  | N, shift=1/q                         |
| diffusers flow Euler | N, then the data               | N, shift, last_size=shifted 0.001    |
| diffusers DPM-Solver | N + 1, starts after the noise  | N, shift, start=0.001                |

diffusers' flow Euler shifts its smallest noise level twice, which is how its last interval gets
its size. `sigma_grid` has its levels to the bit, in its own clock.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.timesteps import SigmaGrid, shift_time

_TRAINING_LEVELS = 1000  # of diffusers' flow-matching scheduler


def time_grid(
    steps: int,
    shift: float = 1.0,
    start: float = 0.0,
    end: float = 1.0,
    last_size: float | None = None,
) -> Tensor:
    """The times of `steps` intervals, noise to data, with RAE's time shift k = `shift` applied.

    t -> t / (k - (k - 1) t), which is s -> k s / (1 + (k - 1) s) in the opposite clock s = 1 - t:
    k > 1 spends more of the steps near the noise.

    Args:
        steps: number of intervals N.
        shift: k >= 1; 1 is none.
        start, end: ends of the raw times, 0 <= start < end <= 1. Official RAE stops at end=0.999.
        last_size: raw size of the last interval, the others sharing the rest evenly; None: as
            long as the others. It needs two intervals.

    Returns:
        (steps + 1,) float32, increasing; from exactly 0 to exactly 1 by default.

    Raises:
        ValueError: an argument out of range.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not (math.isfinite(shift) and shift >= 1.0):
        raise ValueError(
            f"shift must be >= 1 (1 = no shift, RAE uses sqrt(latent size / 4096)), got {shift!r}"
        )
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            "the grid's ends must be 0 <= start < end <= 1 (0 = noise, 1 = data), got "
            f"start={start} and end={end}"
        )
    if last_size is None:
        t = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    else:
        if not 0.0 < last_size < end - start or steps < 2:
            raise ValueError(
                f"last_size must lie between 0 and the grid's length {end - start:g}, with at "
                f"least 2 steps, got {last_size} and {steps} steps"
            )
        t = torch.linspace(start, end - last_size, steps, dtype=torch.float64)
        t = torch.cat([t, t.new_tensor([end])])
    return shift_time(t, shift, DATA_AT_1).to(torch.float32)


def sigma_grid(steps: int, shift: float = 1.0, grid: SigmaGrid = "diffusers") -> Tensor:
    """The noise levels of diffusers' `FlowMatchEulerDiscreteScheduler`, to the bit.

    "diffusers"  what `set_timesteps(N)` makes: from 1 to the smallest of the 1000 training levels,
                 evenly, shifted once more; then 0. That smallest one has been shifted before, so
                 for shift 3 every grid ends 0.0089, 0, and N steps are N - 1 real intervals.
    "linear"     what callers get who pass sigmas = linspace(1, 1/N, N): `time_grid(N, shift)` in
                 the other clock.

    Few-step results on the two are not comparable: a report names the grid.

    Args:
        steps: number of intervals N.
        shift: the scheduler's, >= 1; 3 for SD3 and SD3.5.

    Returns:
        (steps + 1,) float32, decreasing from 1 to 0 (noise_at_1, the clock of adapters).

    Raises:
        ValueError: an argument out of range.
    """
    if grid not in get_args(SigmaGrid):
        raise ValueError(f"grid must be one of {', '.join(get_args(SigmaGrid))}, got {grid!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not (math.isfinite(shift) and shift >= 1.0):
        raise ValueError(f"shift must be >= 1 (1 = no shift, SD3: 3), got {shift!r}")
    if grid == "linear":
        levels = np.linspace(1, 1 / steps, steps).astype(np.float32)
    else:
        # The scheduler's table is float32, and what it makes of its ends is float64.
        ends = torch.tensor([_TRAINING_LEVELS, 1], dtype=torch.float32) / _TRAINING_LEVELS
        first, last = shift_time(ends, shift, NOISE_AT_1).tolist()
        levels = np.linspace(first * _TRAINING_LEVELS, last * _TRAINING_LEVELS, steps)
        levels = levels / _TRAINING_LEVELS
    # By rounding, the first could lie above 1 for a shift such as 1.58.
    levels = np.minimum(shift * levels / (1 + (shift - 1) * levels), 1.0)
    return torch.cat([torch.from_numpy(levels).to(torch.float32), torch.zeros(1)])
