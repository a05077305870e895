"""ODE solvers, in a table: a new one is a row of `SOLVERS`.

The engine's clock runs here: t = 0 is noise, t = 1 is data, and a velocity is dx/dt in that clock.

A solver of a fixed grid is a plan: a `Step` an interval, which names a formula and holds the
numbers that it takes, worked out in float64 beforehand. Eagerly the numbers are Python's; in a CUDA
graph (`mixflow_fast/sampling/graphs.py`) they are read from a table on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

# (x, t) -> dx/dt: x (B, ...), t (B,) float32.
Velocity = Callable[[Tensor, Tensor], Tensor]
# (state, time, time at which the step began) -> dx/dt.
Evaluate = Callable[[Tensor, float | Tensor, float | Tensor], Tensor]

Method = Literal[
    "euler", "heun", "heun_last_euler", "midpoint", "rk4", "dopri5", "rk45", "dpmpp2m", "unipc"
]
METHODS: tuple[Method, ...] = get_args(Method)


# A number of a step: Python's, or a () tensor on the state's device.
Number = float | Tensor
# (state, which of the step's evaluations) -> dx/dt there.
At = Callable[[Tensor, int], Tensor]
# The state, and what a method of several steps remembers beside it.
States = tuple[Tensor, ...]
# (dx/dt, the states before, the step's numbers, standard normal noise) -> the states after it.
Formula = Callable[[At, States, Sequence[Number], Callable[[], Tensor]], States]


@dataclass(frozen=True)
class Tolerances:
    """How small an adaptive method keeps the error of a step, atol + rtol |state|, by its RMS."""

    rtol: float
    atol: float

    def __post_init__(self) -> None:
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be a number > 0, such as 1e-5, got {value!r}")


@dataclass(frozen=True)
class Step:
    """One interval of a fixed grid. Steps of one formula differ in their numbers only.

    Attributes:
        formula: how the state is moved.
        times: of the evaluations, in their order; the first is when the step begins.
        numbers: what the formula multiplies by.
    """

    formula: Formula
    times: tuple[float, ...]
    numbers: tuple[float, ...]


@runtime_checkable
class StepVelocity(Protocol):
    """A velocity that may depend on when the solver's step began (REPA's guidance interval)."""

    def in_step(self, x: Tensor, t: Tensor, began: Tensor) -> Tensor: ...


@runtime_checkable
class PlannedVelocity(StepVelocity, Protocol):
    """A velocity with two ways of being computed, which the times alone decide between.

    Where all samples share their times and the host knows them, nothing has to be read from the
    device: `guided_at` says which way, and `planned` is `in_step` on that way.
    """

    def guided_at(self, t: float, began: float) -> bool: ...

    def planned(
        self, x: Tensor, t: Tensor, guided: bool, scale: Number | None = None
    ) -> Tensor: ...


class Counted:
    """A velocity as the solvers call it: with numbers as times, checked, counted.

    Attributes:
        calls: evaluations so far.
    """

    def __init__(self, velocity: Velocity) -> None:
        self.velocity = velocity
        self.calls = 0

    def __call__(self, x: Tensor, t: float | Tensor, began: float | Tensor) -> Tensor:
        self.calls += 1
        # Filled, because a tensor made of a number on the host would be copied to the device.
        times = torch.empty(x.shape[0], dtype=torch.float32, device=x.device).fill_(t)
        velocity = self.velocity
        on_host = not isinstance(t, Tensor) and not isinstance(began, Tensor)
        if on_host and isinstance(velocity, PlannedVelocity):
            v = velocity.planned(x, times, velocity.guided_at(t, began))
        elif isinstance(velocity, StepVelocity):
            v = velocity.in_step(x, times, torch.empty_like(times).fill_(began))
        else:
            v = velocity(x, times)
        return checked_velocity(v, x)


def checked_velocity(v: Tensor, x: Tensor) -> Tensor:
    """A velocity in the dtype of the state x; ValueError unless it has its shape."""
    if v.shape != x.shape:
        raise ValueError(
            f"velocity must have the shape of x, {tuple(x.shape)}, got {tuple(v.shape)}"
        )
    return v.to(x.dtype)


def integrate(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    method: str,
    tolerances: Tolerances | None = None,
) -> tuple[Tensor, int]:
    """Integrate dx/dt = velocity(x, t) along `times`.

    With an interval from t to t + h, k1 = v(x, t), and N the number of intervals:

    "euler"            x += h k1                                                 N evaluations
    "heun"             x += h/2 (k1 + v(x + h k1, t + h))                       2N
                       (the explicit trapezoid; torchdiffeq and SiT call it heun2)
    "heun_last_euler"  heun, and euler in the last interval (REPA, EDM)         2N - 1
    "midpoint"         x += h v(x + h/2 k1, t + h/2)                            2N
    "rk4"              Kutta's 3/8 rule, which torchdiffeq calls rk4            4N
    "dopri5"           adaptive Dormand-Prince 5(4) of torchdiffeq, rtol 1e-3, atol 1e-6 (SiT's),
                       between the ends of `times`. The step size is controlled over the whole
                       batch, so samples of one batch are coupled within it.
    "rk45"             the same formulas in scipy's RK45, rtol = atol = 1e-5 (arXiv 2209.03003 and
                       2604.09181), which chooses its steps otherwise; the state is float64 on the
                       host between evaluations. 2 + 6 for each step that is tried
    "dpmpp2m"          DPM-Solver++(2M) (arXiv 2211.01095) for the linear path   N
    "unipc"            UniPC of order 2 (arXiv 2302.04867) for the linear path,  N
                       by diffusers' scheduler

    SiT's and RAE's `num_steps` counts grid points: their num_steps=10 is our 9 intervals.

    Args:
        velocity: (x, t) -> dx/dt of x's shape; t is (B,) float32 in the engine's clock.
        x: (B, ...) state at times[0]; kept in float32, or in float64 when it comes in float64.
        times: (N + 1,) strictly increasing floats.
        method: one of METHODS.
        tolerances: of an adaptive method; None: its own.

    Returns:
        the state at times[-1], and the number of velocity evaluations.

    Raises:
        ValueError: bad times, unknown method, tolerances for a method that has none, velocity of
            another shape, torchdiffeq, scipy or diffusers missing; rk45 cannot go on.
    """
    evaluate = Counted(velocity)
    for state in states(evaluate, x, times, method, tolerances):
        x = state
    return x, evaluate.calls


def states(
    evaluate: Evaluate,
    x: Tensor,
    times: Tensor,
    method: str,
    tolerances: Tolerances | None = None,
) -> Iterator[Tensor]:
    """The states that `integrate` passes through: one after each interval (adaptive: the last)."""
    if method not in SOLVERS:
        raise ValueError(f"method must be one of {', '.join(SOLVERS)}, got {method!r}")
    own = SOLVERS[method].tolerances
    if tolerances is not None and own is None:
        raise ValueError(f"{method} has a fixed grid and takes no tolerances: leave them out")
    grid = check_problem(x, times)
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    solver = SOLVERS[method]
    if solver.plan is not None:
        return run_plan(solver.plan(grid), evaluate, x, solver.memory)
    if solver.adaptive is not None:
        return solver.adaptive(evaluate, x, grid, tolerances or own)
    return solver.states(evaluate, x, grid)


def check_problem(x: Tensor, times: Tensor) -> list[float]:
    """The times as numbers; ValueError for arguments that do not fit."""
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be a (B, ...) float tensor, got {tuple(x.shape)} {x.dtype}")
    if times.dim() != 1 or times.numel() < 2 or not times.is_floating_point():
        raise ValueError(
            "times must be a 1-D float tensor of at least two points (N intervals need N + 1), got "
            f"shape {tuple(times.shape)} and dtype {times.dtype}"
        )
    grid = times.tolist()
    # Written so that a NaN fails it too.
    if not all(b > a for a, b in zip(grid, grid[1:], strict=False)):
        raise ValueError(f"times must increase strictly (0 = noise, 1 = data), got {grid}")
    return grid


def _intervals(grid: list[float]) -> Iterator[tuple[float, float]]:
    return zip(grid, grid[1:], strict=False)


def _euler(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (h,) = states, numbers
    return (x + h * at(x, 0),)


def _heun(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (h,) = states, numbers
    v = at(x, 0)
    v = (v + at(x + h * v, 1)) / 2
    return (x + h * v,)


def _midpoint(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (half, h) = states, numbers
    return (x + h * at(x + half * at(x, 0), 1),)


def _rk4(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (third, h, eighth) = states, numbers
    k1 = at(x, 0)
    k2 = at(x + third * k1, 1)
    k3 = at(x + h * (k2 - k1 / 3), 2)
    k4 = at(x + h * (k1 - k2 + k3), 3)
    return (x + eighth * (k1 + 3 * (k2 + k3) + k4),)


def _dpmpp2m_first(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x, _before), (s, keep, move) = states, numbers
    data = x + s * at(x, 0)
    return keep * x + move * data, data


def _dpmpp2m_next(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x, before), (s, keep, move, half_r) = states, numbers
    data = x + s * at(x, 0)
    return keep * x + move * (data + half_r * (data - before)), data


def plan_euler(grid: list[float]) -> list[Step]:
    return [Step(_euler, (t,), (t_next - t,)) for t, t_next in _intervals(grid)]


def _plan_heun(grid: list[float]) -> list[Step]:
    return [Step(_heun, (t, t_next), (t_next - t,)) for t, t_next in _intervals(grid)]


def _plan_heun_last_euler(grid: list[float]) -> list[Step]:
    return _plan_heun(grid[:-1]) + plan_euler(grid[-2:])


def _plan_midpoint(grid: list[float]) -> list[Step]:
    return [
        Step(_midpoint, (t, t + (t_next - t) / 2), ((t_next - t) / 2, t_next - t))
        for t, t_next in _intervals(grid)
    ]


def _plan_rk4(grid: list[float]) -> list[Step]:
    plan = []
    for t, t_next in _intervals(grid):
        h = t_next - t
        times = (t, t + h / 3, t + h * 2 / 3, t_next)
        plan.append(Step(_rk4, times, (h / 3, h, h / 8)))
    return plan


def _plan_dpmpp2m(grid: list[float]) -> list[Step]:
    """With s = 1 - t, L = log(t / s), r = (L' - L) / (L - L_before) and D = x + s v, the data:

    x' = (s'/s) x - t' (exp(L - L') - 1) [D + r/2 (D - D_before)].

    The first step, one from t = 0 and one to t = 1 have no second term; the last gives x' = D.
    """
    if grid[0] < 0.0 or grid[-1] > 1.0:
        raise ValueError(f"dpmpp2m needs times in [0, 1], got {grid[0]} to {grid[-1]}")
    plan: list[Step] = []
    earlier: float | None = None
    for t, t_next in _intervals(grid):
        s, s_next = 1.0 - t, 1.0 - t_next
        log_ratio = -math.inf if t == 0.0 else math.log(t / s)
        # t' exp(L - L') = t s'/s, which is finite at both ends.
        numbers = (s, s_next / s, t_next - t * s_next / s)
        if earlier is None or s_next == 0.0:
            plan.append(Step(_dpmpp2m_first, (t,), numbers))
        else:
            r = (math.log(t_next / s_next) - log_ratio) / (log_ratio - earlier)
            plan.append(Step(_dpmpp2m_next, (t,), (*numbers, r / 2)))
        earlier = log_ratio
    return plan


def run_plan(
    plan: Sequence[Step],
    evaluate: Evaluate,
    x: Tensor,
    memory: int = 0,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[Tensor]:
    """The states after each step of a plan, with the numbers of Python.

    Args:
        evaluate: (state, t, time at which the step began) -> dx/dt.
        x: the state at the first time.
        memory: tensors that the formulas remember beside the state.
        noise: number of a step -> standard normal noise of the state's shape.
    """
    states = (x, *(torch.zeros_like(x) for _ in range(memory)))
    for k, step in enumerate(plan):
        at = partial(_evaluate_at, evaluate, step)
        states = step.formula(at, states, step.numbers, partial(_noise_at, noise, k, x))
        yield states[0]


def _evaluate_at(evaluate: Evaluate, step: Step, state: Tensor, number: int) -> Tensor:
    return evaluate(state, step.times[number], step.times[0])


def _noise_at(noise: Callable[[int], Tensor] | None, k: int, x: Tensor) -> Tensor:
    if noise is None:
        raise ValueError("a stochastic method needs noise, a function of the step's number")
    return noise(k).to(x)


def _dopri5(
    evaluate: Evaluate, x: Tensor, grid: list[float], tolerances: Tolerances
) -> Iterator[Tensor]:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError(
            "method 'dopri5' needs torchdiffeq: pip install \"mixflow_fast[eval]\", "
            "or use method 'heun'"
        ) from error
    # Interior points change only where the solver reports, so the two ends are enough.
    ends = torch.tensor([grid[0], grid[-1]], dtype=x.dtype, device=x.device)
    path = odeint(
        lambda t, state: evaluate(state, t, t),
        x,
        ends,
        method="dopri5",
        atol=tolerances.atol,
        rtol=tolerances.rtol,
    )
    yield path[-1]


def _rk45(
    evaluate: Evaluate, x: Tensor, grid: list[float], tolerances: Tolerances
) -> Iterator[Tensor]:
    try:
        from scipy.integrate import RK45
    except ImportError as error:
        raise ValueError(
            "method 'rk45' needs scipy: pip install \"mixflow_fast[eval]\", or use method 'heun'"
        ) from error

    def velocity(t: float, flat: np.ndarray) -> np.ndarray:
        # A copy: scipy goes on writing into its arrays.
        state = torch.from_numpy(flat.copy()).view(x.shape).to(x.device, x.dtype)
        return evaluate(state, t, t).reshape(-1).double().cpu().numpy()

    flat = x.detach().reshape(-1).double().cpu().numpy()
    # Stepped by hand: solve_ivp would keep every state on the way, and only the last is asked for.
    solver = RK45(velocity, grid[0], flat, grid[-1], rtol=tolerances.rtol, atol=tolerances.atol)
    with np.errstate(invalid="ignore", over="ignore"):  # said below
        while solver.status == "running":
            problem = solver.step()
    if solver.status == "failed":
        raise ValueError(
            f"rk45 cannot keep its tolerances at t = {solver.t:g} ({problem}): the velocity is not "
            "finite or changes too abruptly there; take larger tolerances, or method 'heun'"
        )
    yield torch.from_numpy(solver.y).view(x.shape).to(x.device, x.dtype)


def _unipc(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    try:
        from diffusers import UniPCMultistepScheduler
    except ImportError as error:
        raise ValueError(
            "method 'unipc' needs diffusers: pip install \"mixflow_fast[vae]\", or use method "
            "'dpmpp2m'"
        ) from error
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=1.0 - np.array(grid[:-1]))
    scheduler.sigmas[-1] = 1.0 - grid[-1]
    # Its whole times may repeat on a fine grid: it must count steps instead of looking them up.
    scheduler.set_begin_index(0)
    for t, theirs in zip(grid[:-1], scheduler.timesteps, strict=True):
        # Its velocity points to the noise.
        x = scheduler.step(-evaluate(x, t, t), theirs, x).prev_sample
        yield x


@dataclass(frozen=True)
class Solver:
    """A row of the table.

    Attributes:
        evaluations: how many velocities N intervals take; None where that is not known before.
        plan: the steps of a grid; None for a method that chooses them on its way.
        states: (evaluate, x, grid) -> the state after each interval; for a method without a plan.
        adaptive: (evaluate, x, grid, tolerances) -> the state at the end, for a method that chooses
            its steps itself.
        tolerances: of such a method, if nothing else is said.
        memory: tensors that the formulas of the plan remember beside the state.
        linear_path: its formula holds for the linear path alone.
    """

    evaluations: Callable[[int], int] | None
    plan: Callable[[list[float]], list[Step]] | None = None
    states: Callable[[Evaluate, Tensor, list[float]], Iterator[Tensor]] | None = None
    adaptive: Callable[[Evaluate, Tensor, list[float], Tolerances], Iterator[Tensor]] | None = None
    tolerances: Tolerances | None = None
    memory: int = 0
    linear_path: bool = False


SOLVERS: dict[str, Solver] = {
    "euler": Solver(lambda n: n, plan_euler),
    "heun": Solver(lambda n: 2 * n, _plan_heun),
    "heun_last_euler": Solver(lambda n: 2 * n - 1, _plan_heun_last_euler),
    "midpoint": Solver(lambda n: 2 * n, _plan_midpoint),
    "rk4": Solver(lambda n: 4 * n, _plan_rk4),
    "dopri5": Solver(None, adaptive=_dopri5, tolerances=Tolerances(1e-3, 1e-6)),
    "rk45": Solver(None, adaptive=_rk45, tolerances=Tolerances(1e-5, 1e-5)),
    "dpmpp2m": Solver(lambda n: n, _plan_dpmpp2m, memory=1, linear_path=True),
    "unipc": Solver(lambda n: n, states=_unipc, linear_path=True),
}
