"""ODE solvers, in a table: a new one is a function and a row of `SOLVERS`.

The engine's clock runs here: t = 0 is noise, t = 1 is data, and a velocity is dx/dt in that clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import torch
from torch import Tensor

# (x, t) -> dx/dt: x (B, ...), t (B,) float32.
Velocity = Callable[[Tensor, Tensor], Tensor]
# (state, time, time at which the step began) -> dx/dt.
Evaluate = Callable[[Tensor, float | Tensor, float | Tensor], Tensor]

Method = Literal[
    "euler", "heun", "heun_last_euler", "midpoint", "rk4", "dopri5", "dpmpp2m", "unipc"
]
METHODS: tuple[Method, ...] = get_args(Method)
DOPRI5_ATOL, DOPRI5_RTOL = 1e-6, 1e-3  # SiT's defaults


@runtime_checkable
class StepVelocity(Protocol):
    """A velocity that may depend on when the solver's step began (REPA's guidance interval)."""

    def in_step(self, x: Tensor, t: Tensor, began: Tensor) -> Tensor: ...


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
        if isinstance(self.velocity, StepVelocity):
            v = self.velocity.in_step(x, times, torch.empty_like(times).fill_(began))
        else:
            v = self.velocity(x, times)
        if v.shape != x.shape:
            raise ValueError(
                f"velocity must have the shape of x, {tuple(x.shape)}, got {tuple(v.shape)}"
            )
        return v.to(x.dtype)


def integrate(velocity: Velocity, x: Tensor, times: Tensor, method: str) -> tuple[Tensor, int]:
    """Integrate dx/dt = velocity(x, t) along `times`.

    With an interval from t to t + h, k1 = v(x, t), and N the number of intervals:

    "euler"            x += h k1                                                 N evaluations
    "heun"             x += h/2 (k1 + v(x + h k1, t + h))                       2N
                       (the explicit trapezoid; torchdiffeq and SiT call it heun2)
    "heun_last_euler"  heun, and euler in the last interval (REPA, EDM)         2N - 1
    "midpoint"         x += h v(x + h/2 k1, t + h/2)                            2N
    "rk4"              Kutta's 3/8 rule, which torchdiffeq calls rk4            4N
    "dopri5"           adaptive Dormand-Prince 5(4) of torchdiffeq, atol 1e-6, rtol 1e-3, between
                       the ends of `times`. The step size is controlled over the whole batch, so
                       samples of one batch are coupled within it.
    "dpmpp2m"          DPM-Solver++(2M) (arXiv 2211.01095) for the linear path   N
    "unipc"            UniPC of order 2 (arXiv 2302.04867) for the linear path,  N
                       by diffusers' scheduler

    SiT's and RAE's `num_steps` counts grid points: their num_steps=10 is our 9 intervals.

    Args:
        velocity: (x, t) -> dx/dt of x's shape; t is (B,) float32 in the engine's clock.
        x: (B, ...) state at times[0]; kept in float32, or in float64 when it comes in float64.
        times: (N + 1,) strictly increasing floats.
        method: one of METHODS.

    Returns:
        the state at times[-1], and the number of velocity evaluations.

    Raises:
        ValueError: bad times, unknown method, velocity of another shape, torchdiffeq or diffusers
            missing.
    """
    evaluate = Counted(velocity)
    for state in states(evaluate, x, times, method):
        x = state
    return x, evaluate.calls


def states(evaluate: Evaluate, x: Tensor, times: Tensor, method: str) -> Iterator[Tensor]:
    """The states that `integrate` passes through: one after each interval (dopri5: the last)."""
    if method not in SOLVERS:
        raise ValueError(f"method must be one of {', '.join(SOLVERS)}, got {method!r}")
    grid = check_problem(x, times)
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    return SOLVERS[method].states(evaluate, x, grid)


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


def _euler(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    for t, t_next in _intervals(grid):
        x = x + (t_next - t) * evaluate(x, t, t)
        yield x


def _heun(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    for t, t_next in _intervals(grid):
        h = t_next - t
        v = evaluate(x, t, t)
        v = (v + evaluate(x + h * v, t_next, t)) / 2
        x = x + h * v
        yield x


def _heun_last_euler(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    state = x
    for state in _heun(evaluate, x, grid[:-1]):
        yield state
    yield from _euler(evaluate, state, grid[-2:])


def _midpoint(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    for t, t_next in _intervals(grid):
        h = t_next - t
        middle = x + h / 2 * evaluate(x, t, t)
        x = x + h * evaluate(middle, t + h / 2, t)
        yield x


def _rk4(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    for t, t_next in _intervals(grid):
        h = t_next - t
        k1 = evaluate(x, t, t)
        k2 = evaluate(x + h / 3 * k1, t + h / 3, t)
        k3 = evaluate(x + h * (k2 - k1 / 3), t + h * 2 / 3, t)
        k4 = evaluate(x + h * (k1 - k2 + k3), t_next, t)
        x = x + h / 8 * (k1 + 3 * (k2 + k3) + k4)
        yield x


def _dopri5(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
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
        atol=DOPRI5_ATOL,
        rtol=DOPRI5_RTOL,
    )
    yield path[-1]


def _dpmpp2m(evaluate: Evaluate, x: Tensor, grid: list[float]) -> Iterator[Tensor]:
    """With s = 1 - t, L = log(t / s), r = (L' - L) / (L - L_before) and D = x + s v, the data:

    x' = (s'/s) x - t' (exp(L - L') - 1) [D + r/2 (D - D_before)].

    The first step, one from t = 0 and one to t = 1 have no second term; the last gives x' = D.
    """
    if grid[0] < 0.0 or grid[-1] > 1.0:
        raise ValueError(f"dpmpp2m needs times in [0, 1], got {grid[0]} to {grid[-1]}")
    before: tuple[Tensor, float] | None = None
    for t, t_next in _intervals(grid):
        s, s_next = 1.0 - t, 1.0 - t_next
        data = x + s * evaluate(x, t, t)
        log_ratio = -math.inf if t == 0.0 else math.log(t / s)
        mixed = data
        if before is not None and s_next > 0.0:
            earlier, earlier_ratio = before
            r = (math.log(t_next / s_next) - log_ratio) / (log_ratio - earlier_ratio)
            mixed = data + r / 2 * (data - earlier)
        # t' exp(L - L') = t s'/s, which is finite at both ends.
        x = s_next / s * x + (t_next - t * s_next / s) * mixed
        before = data, log_ratio
        yield x


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
        states: (evaluate, x, grid) -> the state after each interval of the grid.
        evaluations: how many velocities N intervals take; None where that is not known before.
        linear_path: its formula holds for the linear path alone.
    """

    states: Callable[[Evaluate, Tensor, list[float]], Iterator[Tensor]]
    evaluations: Callable[[int], int] | None
    linear_path: bool = False


SOLVERS: dict[str, Solver] = {
    "euler": Solver(_euler, lambda n: n),
    "heun": Solver(_heun, lambda n: 2 * n),
    "heun_last_euler": Solver(_heun_last_euler, lambda n: 2 * n - 1),
    "midpoint": Solver(_midpoint, lambda n: 2 * n),
    "rk4": Solver(_rk4, lambda n: 4 * n),
    "dopri5": Solver(_dopri5, None),
    "dpmpp2m": Solver(_dpmpp2m, lambda n: n, linear_path=True),
    "unipc": Solver(_unipc, lambda n: n, linear_path=True),
}
