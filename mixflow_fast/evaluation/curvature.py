"""Curvature of a network's paths from noise to data: how far from straight, at constant speed.

    C = (1/N) sum_k (1/D) || (z_N - z_0) - N (z_{k+1} - z_k) ||^2

of each trajectory z_0 .. z_N of N Euler steps, D numbers in a state: a mean over steps and numbers.
It is zero exactly where the path is straight and its speed constant, that is where one Euler step
ends where N do. The mean and the population's standard deviation over trajectories are what
arXiv 2604.09181 and Fast-ODE report (N = 128, 10,000 trajectories).

Of an Euler step N (z_{k+1} - z_k) is the velocity v_k, and z_N - z_0 the mean of all v_k, so C is
the variance of v_k along the path, averaged over the state's numbers. It is summed as the steps are
made (Welford), without keeping them: the difference of two large sums would not be zero where it
has to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.sampling import time_grid
from mixflow_fast.sampling.solvers import Counted, Velocity, states

STEPS = 128
TRAJECTORIES = 10_000


@dataclass(frozen=True)
class Curvature:
    """The curvature of some trajectories.

    Attributes:
        values: (n,) float64 on the CPU, of each trajectory.
        steps: Euler steps N of each.
    """

    values: Tensor
    steps: int

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or not len(self.values):
            raise ValueError(
                f"values must be (n,), one of each trajectory, got {tuple(self.values.shape)}"
            )

    @property
    def mean(self) -> float:
        """Over trajectories."""
        return float(self.values.mean())

    @property
    def std(self) -> float:
        """Of the trajectories as a population: divided by n."""
        return float(self.values.std(correction=0))

    @property
    def se(self) -> float:
        """Standard error of the mean; not a number of a single trajectory."""
        if len(self.values) < 2:
            return math.nan
        return float(self.values.std(correction=1)) / math.sqrt(len(self.values))

    @property
    def estimate(self) -> Estimate:
        """The mean as `uncertainty.py` takes it, for paired differences."""
        values = np.asarray(self.values, dtype=np.float64)
        return Estimate(self.mean, len(values), values - values.mean())

    def to_record(self) -> dict[str, float | int | None]:
        """Plain numbers for a JSON file; an error that is not known is None."""
        se = self.se
        return {
            "mean": self.mean,
            "std": self.std,
            "se": se if math.isfinite(se) else None,
            "n": len(self.values),
            "steps": self.steps,
        }


def path_curvature(velocity: Velocity, x0: Tensor, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Curvature of the Euler paths of a velocity that start at x0.

    Args:
        velocity: (x, t) -> dx/dt, as `integrate` takes it.
        x0: (B, ...) states at t = 0; kept in float32, or in float64 when they come in float64.
        steps: N.

    Returns:
        (B,) float64 curvatures on the device of x0, and (B, ...) states at t = 1.

    Raises:
        ValueError: steps < 1, and what `integrate` refuses.
    """
    counted, spread = Counted(velocity), _Spread()

    def watched(x: Tensor, t: float | Tensor, began: float | Tensor) -> Tensor:
        v = counted(x, t, began)
        spread.add(v)
        return v

    x = x0
    for state in states(watched, x0, time_grid(steps), "euler"):
        x = state
    return spread.variance(), x


class _Spread:
    """Variance over the velocities that were added, a mean over the numbers of a state."""

    def __init__(self) -> None:
        self._count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, v: Tensor) -> None:
        """Welford's update; of equal velocities every difference is exactly zero."""
        v = v.double()
        self._count += 1
        if self._mean is None or self._squares is None:
            self._mean, self._squares = v.clone(), v.new_zeros(len(v))
            return
        before = v - self._mean
        self._mean += before / self._count
        self._squares += (before * (v - self._mean)).flatten(1).mean(dim=1)

    def variance(self) -> Tensor:
        """(B,) float64, divided by the number of velocities."""
        assert self._squares is not None
        return self._squares / self._count
