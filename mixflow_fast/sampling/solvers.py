"""ODE solvers: Euler, Heun, dopri5, and their grids of times.

The engine's clock runs here: t = 0 is noise, t = 1 is data, and a velocity is dx/dt in that clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1
from mixflow_fast.flow.timesteps import shift_time

# (x, t) -> dx/dt: x (B, ...), t (B,) float32.
Velocity = Callable[[Tensor, Tensor], Tensor]

METHODS = ("euler", "heun", "dopri5")
DOPRI5_ATOL, DOPRI5_RTOL = 1e-6, 1e-3  # SiT's defaults


def time_grid(steps: int, shift: float = 1.0) -> Tensor:
    """The times of `steps` intervals, noise to data, with RAE's time shift k = `shift` applied.

    t -> t / (k - (k - 1) t), which is s -> k s / (1 + (k - 1) s) in the opposite clock s = 1 - t:
    k > 1 spends more of the steps near the noise. Official RAE stops at s = shift(0.001); this grid
    ends at the data, t = 1.

    Returns:
        (steps + 1,) float32, from exactly 0 to exactly 1, increasing.
    """
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"steps must be an integer >= 1, got {steps!r}")
    if not (math.isfinite(shift) and shift >= 1.0):
        raise ValueError(
            f"shift must be >= 1 (1 = no shift, RAE uses sqrt(latent size / 4096)), got {shift!r}"
        )
    t = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
    return shift_time(t, shift, DATA_AT_1).to(torch.float32)


def integrate(velocity: Velocity, x: Tensor, times: Tensor, method: str) -> tuple[Tensor, int]:
    """Integrate dx/dt = velocity(x, t) along `times`.

    "euler":  x += h v(x, t)                                                    N evaluations
    "heun":   k = v(x, t); x += h/2 (k + v(x + h k, t + h)), every interval    2N evaluations
              (the explicit trapezoid; torchdiffeq and SiT call it heun2)
    "dopri5": adaptive Dormand-Prince 5(4) of torchdiffeq, atol 1e-6, rtol 1e-3. The step size is
              controlled over the whole batch, so samples of one batch are coupled within it.

    N is the number of intervals. SiT's and RAE's `num_steps` counts grid points: their num_steps=10
    is our 9 intervals.

    Args:
        velocity: (x, t) -> dx/dt of x's shape; t is (B,) float32 in the engine's clock.
        x: (B, ...) state at times[0]; kept in float32, or in float64 when it comes in float64.
        times: (N + 1,) strictly increasing floats.
        method: one of METHODS.

    Returns:
        the state at times[-1], and the number of velocity evaluations.

    Raises:
        ValueError: bad times, unknown method, velocity of another shape, torchdiffeq missing.
    """
    grid = _check_problem(x, times, method)
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    nfe = 0

    def evaluate(state: Tensor, t: float | Tensor) -> Tensor:
        nonlocal nfe
        nfe += 1
        # A fill, because a tensor made of a number on the host would be copied to the device.
        own_t = torch.empty(state.shape[0], dtype=torch.float32, device=state.device).fill_(t)
        v = velocity(state, own_t)
        if v.shape != state.shape:
            raise ValueError(
                f"velocity must have the shape of x, {tuple(state.shape)}, got {tuple(v.shape)}"
            )
        return v.to(state.dtype)

    if method == "dopri5":
        return _dopri5(evaluate, x, times), nfe
    for t, t_next in zip(grid, grid[1:], strict=False):
        h = t_next - t
        v = evaluate(x, t)
        if method == "heun":
            v = (v + evaluate(x + h * v, t_next)) / 2
        x = x + h * v
    return x, nfe


def _check_problem(x: Tensor, times: Tensor, method: str) -> list[float]:
    """The times as numbers; ValueError for arguments that do not fit."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
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


def _dopri5(evaluate: Callable[[Tensor, Tensor], Tensor], x: Tensor, times: Tensor) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ValueError(
            "method 'dopri5' needs torchdiffeq: pip install \"mixflow_fast[eval]\", "
            "or use method 'heun'"
        ) from error
    # Interior points change only where the solver reports, so the two ends are enough.
    ends = times[[0, -1]].to(x)
    path = odeint(
        lambda t, state: evaluate(state, t),
        x,
        ends,
        method="dopri5",
        atol=DOPRI5_ATOL,
        rtol=DOPRI5_RTOL,
    )
    return path[-1]
