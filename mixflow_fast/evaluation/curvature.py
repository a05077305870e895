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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.sampling import PreparedSampling, Sampler, time_grid
from mixflow_fast.sampling.solvers import Counted, Velocity, states

STEPS = 128
TRAJECTORIES = 10_000
# Euler's and Heun's numbers of steps in the official tables, and the adaptive solver beside them.
TABLE = (
    *(Sampler("euler", steps) for steps in (4, 5, 10, 20, 32, 64, 128)),
    *(Sampler("heun_last_euler", steps) for steps in (3, 5)),
)
ADAPTIVE = Sampler("rk45")


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


def network_curvature(
    prepared: PreparedSampling,
    num: int,
    *,
    seed: int = 0,
    balanced: bool = True,
    steps: int = STEPS,
    progress: bool = False,
) -> Curvature:
    """Curvature of the paths that a network's samples 0 .. num - 1 take from where they begin.

    Args:
        prepared: the network, with its guidance and its source; its sampler is not used.
        seed: of the samples.
        balanced: labels are id mod classes; else drawn.
        steps: N.
        progress: say on stderr how far it is.

    Raises:
        ValueError: num < 1, or states that are not finite.
    """
    if num < 1:
        raise ValueError(f"num must be >= 1 trajectories, got {num}")
    values: list[Tensor] = []
    counted = Progress(num, "curvature", "trajectories", quiet=not progress)
    with prepared.evaluating(), counted:
        for batch in prepared.batches(torch.arange(num), seed=seed, balanced=balanced):
            found, _ = path_curvature(prepared.velocity(batch.y), batch.x0, steps)
            values.append(found[: batch.wanted].cpu())
            counted.advance(batch.wanted)
    joined = torch.cat(values)
    if not bool(joined.isfinite().all()):
        raise ValueError(
            f"{int((~joined.isfinite()).sum())} of {num} trajectories have values that are not "
            "finite: check the clock and the weights"
        )
    return Curvature(joined, steps)


@dataclass(frozen=True)
class SolverRow:
    """What one solver needs and reaches.

    Attributes:
        method: its name.
        steps: intervals; None for an adaptive method.
        nfe: evaluations of the network for one sample, a mean over batches.
        apart: RMS over samples and their numbers of the difference of its ends from those of the
            adaptive solver; None for that itself.
    """

    method: str
    steps: int | None
    nfe: float
    apart: float | None

    def to_record(self) -> dict[str, str | float | int | None]:
        """Plain values for a JSON file."""
        return {"method": self.method, "steps": self.steps, "nfe": self.nfe, "apart": self.apart}


def solver_rows(
    prepared: PreparedSampling,
    num: int,
    *,
    seed: int = 0,
    balanced: bool = True,
    samplers: Sequence[Sampler] = TABLE,
    adaptive: Sampler = ADAPTIVE,
    progress: bool = False,
) -> list[SolverRow]:
    """Evaluations and error of solvers on the same samples, the adaptive one last.

    Args:
        prepared, num, seed, balanced, progress: as `network_curvature`.
        samplers: of fixed steps.
        adaptive: what their ends are held against; it controls the error of a batch as a whole.

    Raises:
        ValueError: num < 1.
    """
    if num < 1:
        raise ValueError(f"num must be >= 1 samples, got {num}")
    batches = torch.arange(num).split(prepared.batch_size)
    rows: list[SolverRow] = []
    exact: list[Tensor] = []
    total = num * (len(samplers) + 1)
    with Progress(total, "solvers", "samples", quiet=not progress, even=False) as counted:
        for sampler in (adaptive, *samplers):
            own, calls, squares = prepared.with_sampler(sampler), [], 0.0
            for number, ids in enumerate(batches):
                drawn = own.draw(ids, seed=seed, balanced=balanced)
                calls.append(drawn.nfe)
                if sampler is adaptive:
                    exact.append(drawn.x)
                squares += float((drawn.x - exact[number]).double().square().sum())
                counted.advance(len(ids))
            apart = (
                None if sampler is adaptive else math.sqrt(squares / (num * exact[0][0].numel()))
            )
            steps = None if sampler.nfe is None else sampler.steps
            rows.append(SolverRow(sampler.method, steps, sum(calls) / len(calls), apart))
    return [*rows[1:], rows[0]]
