"""`Sampler`: a method, its grid and, for stochastic methods, its diffusion, as one value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.flow.path import PathName, get_path
from mixflow_fast.sampling.grids import time_grid
from mixflow_fast.sampling.sde import (
    FORMS,
    LAST_SIZE,
    LAST_STEPS,
    SDE_METHODS,
    Diffusion,
    Form,
    LastStep,
    Noise,
    SdeMethod,
    sde_evaluations,
    sde_plan,
    sde_states,
)
from mixflow_fast.sampling.solvers import (
    METHODS,
    SOLVERS,
    Counted,
    Method,
    Number,
    PlannedVelocity,
    Step,
    StepVelocity,
    Tolerances,
    Velocity,
)
from mixflow_fast.sampling.solvers import states as solver_states

ALL_METHODS: tuple[str, ...] = (*METHODS, *SDE_METHODS)
_EDGE = 1e-3  # SiT's distance from an end at which a coefficient is infinite
_SIT_TOLERANCES = SOLVERS["dopri5"].tolerances
_TIMES = 1000  # diffusers' number of training times


@dataclass(frozen=True)
class Sampler:
    """How states are moved from noise to data. Times are in the engine's clock, 0 = noise.

    Attributes:
        method: one of ALL_METHODS; see `integrate` and `sde_states`.
        steps: intervals N, the last one of a stochastic method included (SiT's and REPA's
            num_steps of an SDE, SiT's and RAE's num_steps - 1 of an ODE).
        shift: RAE's k >= 1; LightningDiT's q is 1/k.
        start, end: raw ends of the grid; None: 0 and 1, or 0.001 before an end that is singular
            (sbdm at 0; sde_heun without a last step at 1).
        last_size: raw size of the last interval; None: as the others, and 0.04 for a stochastic
            method with a last step.
        form, norm, last: of `Diffusion`, stochastic methods only.
        path: of the network's training; dpmpp2m takes the linear one alone.
        integer_times: the network is told the time cut to thousandths of noise, as diffusers' cut
            to whole training times does.
        rtol, atol: tolerances of an adaptive method; None: dopri5 1e-3 and 1e-6, rk45 1e-5 and
            1e-5.
    """

    method: Method | SdeMethod = "euler"
    steps: int = 50
    shift: float = 1.0
    start: float | None = None
    end: float | None = None
    last_size: float | None = None
    form: Form = "sigma"
    norm: float = 1.0
    last: LastStep = "mean"
    path: PathName = "linear"
    integer_times: bool = False
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ALL_METHODS:
            raise ValueError(f"method must be one of {', '.join(ALL_METHODS)}, got {self.method!r}")
        get_path(self.path)
        if self.stochastic:
            self._check_diffusion()
        elif (self.form, self.norm, self.last) != ("sigma", 1.0, "mean"):
            raise ValueError(
                f"form, norm and last have no meaning for {self.method}: they belong to "
                f"{', '.join(SDE_METHODS)}"
            )
        elif SOLVERS[self.method].linear_path and self.path != "linear":
            raise ValueError(f"{self.method} needs path='linear', got {self.path!r}")
        # Made here, because it refuses numbers that are none.
        if self.tolerances is None and (self.rtol, self.atol) != (None, None):
            raise ValueError(
                f"rtol and atol have no meaning for {self.method}, whose steps are given by its "
                "grid: they belong to dopri5 and rk45"
            )
        self.grid()

    def _check_diffusion(self) -> None:
        for name, value, known in (("form", self.form, FORMS), ("last", self.last, LAST_STEPS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if not 0.0 <= self.norm < float("inf"):
            raise ValueError(f"norm must be finite and >= 0, got {self.norm!r}")
        start, end = self.ends
        if self.form == "sbdm" and start == 0.0:
            raise ValueError("the form sbdm is infinite at t = 0: start must be > 0 (SiT: 0.001)")
        if self.last == "none" and self.method == "sde_heun" and end == 1.0:
            raise ValueError(
                "sde_heun without a last step evaluates the score at its end, which is singular "
                "at t = 1: end must be < 1 (SiT: 0.999)"
            )

    @property
    def stochastic(self) -> bool:
        """Whether the method draws noise on its way."""
        return self.method in SDE_METHODS

    @property
    def path_matters(self) -> bool:
        """Whether the steps use the path, beside the velocity."""
        return self.method in SDE_METHODS or SOLVERS[self.method].linear_path

    @property
    def tolerances(self) -> Tolerances | None:
        """Of an adaptive method; None for the others."""
        own = None if self.stochastic else SOLVERS[self.method].tolerances
        if own is None:
            return None
        rtol = own.rtol if self.rtol is None else self.rtol
        return Tolerances(rtol, own.atol if self.atol is None else self.atol)

    @property
    def ends(self) -> tuple[float, float]:
        """Raw ends of the grid."""
        start, end = self.start, self.end
        if start is None:
            start = _EDGE if self.stochastic and self.form == "sbdm" else 0.0
        if end is None:
            singular = self.method == "sde_heun" and self.last == "none"
            end = 1.0 - _EDGE if singular else 1.0
        return start, end

    @property
    def last_interval(self) -> float | None:
        """Raw size of the last interval where it has its own."""
        if self.last_size is None and self.stochastic and self.last != "none":
            return LAST_SIZE
        return self.last_size

    def grid(self) -> Tensor:
        """(steps + 1,) float32 times, increasing."""
        start, end = self.ends
        return time_grid(self.steps, self.shift, start, end, self.last_interval)

    @property
    def nfe(self) -> int | None:
        """Velocity evaluations of one sample; None for an adaptive method."""
        if self.method in SDE_METHODS:
            return sde_evaluations(self.method, self.steps, self.last)
        evaluations = SOLVERS[self.method].evaluations
        return None if evaluations is None else evaluations(self.steps)

    @property
    def network_calls(self) -> int | None:
        """Calls of the network that is sampled: one an evaluation.

        A call under classifier-free guidance has two rows a sample; autoguidance calls the guide
        beside it. SiT's own SDE code calls the network twice an evaluation.
        """
        return self.nfe

    def trajectory(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> Trajectory:
        """Start moving x; iterate over what comes back for the state after each interval.

        Args:
            velocity: (x, t) -> dx/dt of x's shape; t is (B,) float32.
            x: (B, ...) state at the grid's first time; kept in float32, or in float64.
            noise: k -> standard normal noise of interval k; needed by stochastic methods.
        """
        counted = Counted(self.told(velocity))
        if self.method not in SDE_METHODS:
            states = solver_states(counted, x, self.grid(), self.method, self.tolerances)
            return Trajectory(states, counted)
        if noise is None:
            raise ValueError(f"{self.method} needs noise, a function of the number of the interval")
        states = sde_states(counted, x, self.grid(), self.method, self._diffusion, noise)
        return Trajectory(states, counted)

    @property
    def _diffusion(self) -> Diffusion:
        return Diffusion(get_path(self.path), self.form, self.norm, self.last)

    def told(self, velocity: Velocity) -> Velocity:
        """A velocity as this sampler asks it: of the time, or of the time cut to thousandths."""
        if not self.integer_times:
            return velocity
        planned = isinstance(velocity, PlannedVelocity)
        return _PlannedWholeTimes(velocity) if planned else _WholeTimes(velocity)

    def plan(self) -> list[Step] | None:
        """The steps from the grid's start to its end; None for a method that goes its own way."""
        grid = self.grid().tolist()
        if self.method in SDE_METHODS:
            return sde_plan(grid, self.method, self._diffusion)
        of_grid = SOLVERS[self.method].plan
        return None if of_grid is None else of_grid(grid)

    @property
    def memory(self) -> int:
        """How many tensors the plan's formulas remember beside the state."""
        return 0 if self.stochastic else SOLVERS[self.method].memory

    def run(self, velocity: Velocity, x: Tensor, noise: Noise | None = None) -> tuple[Tensor, int]:
        """The state at the grid's end, and the number of velocity evaluations."""
        trajectory = self.trajectory(velocity, x, noise)
        for state in trajectory:
            x = state
        return x, trajectory.evaluations

    def to_record(self) -> dict[str, object]:
        """What the samples depend on, for a protocol; plain JSON values."""
        start, end = self.ends
        # An adaptive method uses the grid's ends alone.
        adaptive = self.nfe is None
        record: dict[str, object] = {
            "method": self.method,
            "intervals": None if adaptive else self.steps,
            "grid": {
                "shift": float(self.shift),
                "start": start,
                "end": end,
                "last_size": None if adaptive else self.last_interval,
            },
            "nfe": self.nfe,
            "network_calls": self.network_calls,
            "integer_times": self.integer_times,
        }
        # Records of dopri5 are older than the choice of its tolerances and do not name its own.
        if (chosen := self.tolerances) and (self.method, chosen) != ("dopri5", _SIT_TOLERANCES):
            record["tolerances"] = {"rtol": chosen.rtol, "atol": chosen.atol}
        if self.stochastic:
            record["sde"] = {
                "form": self.form,
                "norm": float(self.norm),
                "last": self.last,
                "size": self.last_interval,
                "path": self.path,
            }
        return record

    def describe(self) -> str:
        """The whole sampler in a sentence, its grid's ends included."""
        grid = self.grid().tolist()
        if self.nfe is None:
            words = [f"{self.method}, which chooses its steps itself"]
            words.append(f"rtol {self.tolerances.rtol:g}, atol {self.tolerances.atol:g}")
            words.append(f"from {grid[0]:g} to {grid[-1]:g} (0 = noise)")
        else:
            words = [f"{self.method}, {self.steps} intervals, {self.nfe} network calls"]
            times = [f"{t:g}" for t in grid]
            if len(times) > 4:
                times[1:-1] = [f"{times[1]} .. {times[-2]}"]
            words.append(f"grid {', '.join(times)} (0 = noise)")
        if self.shift != 1.0:
            words.append(f"shift {self.shift:g}")
        if self.stochastic:
            words.append(f"form {self.form}, norm {self.norm:g}, last step {self.last}")
            words.append(f"{self.path} path")
        if self.integer_times:
            words.append("times cut to thousandths")
        return "; ".join(words)


class Trajectory:
    """The states after each interval, made while they are iterated over.

    Attributes:
        evaluations: velocity evaluations so far.
    """

    def __init__(self, states: Iterator[Tensor], counted: Counted) -> None:
        self._states, self._counted = states, counted

    def __iter__(self) -> Iterator[Tensor]:
        return self._states

    @property
    def evaluations(self) -> int:
        return self._counted.calls


class _WholeTimes:
    """A velocity that is told times of whole thousandths of noise."""

    def __init__(self, velocity: Velocity) -> None:
        self._velocity = velocity

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self._velocity(x, _cut(t))

    def in_step(self, x: Tensor, t: Tensor, began: Tensor) -> Tensor:
        if isinstance(self._velocity, StepVelocity):
            return self._velocity.in_step(x, _cut(t), began)
        return self(x, t)


class _PlannedWholeTimes(_WholeTimes):
    """The same of a velocity whose way the host can decide."""

    _velocity: PlannedVelocity

    def guided_at(self, t: float, began: float) -> bool:
        return self._velocity.guided_at(float(_cut(torch.tensor(t))), began)

    def planned(self, x: Tensor, t: Tensor, guided: bool, scale: Number | None = None) -> Tensor:
        return self._velocity.planned(x, _cut(t), guided, scale)


def _cut(t: Tensor) -> Tensor:
    noise = 1.0 - t.double()
    # A time that float32 put just below a whole one is that one.
    return (1.0 - torch.floor(noise * _TIMES + 1e-3) / _TIMES).to(t.dtype)
