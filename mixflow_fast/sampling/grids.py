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
its size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1
from mixflow_fast.flow.timesteps import shift_time


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
