"""SiT's stochastic samplers: dX = [v + w s] dt + sqrt(2 w) dW, in the engine's clock.

s is the score, which the velocity determines; w(t) >= 0 is free (arXiv 2401.08740, section 2.4).
One call of the network gives both v and s. REPA's SDE is the form "sigma" on the linear path
("linear" on the others) with the last step "mean".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mixflow_fast.flow.path import Path
from mixflow_fast.sampling.solvers import (
    At,
    Evaluate,
    Number,
    States,
    Step,
    check_problem,
    plan_euler,
    run_plan,
)

# Number of a step -> standard normal noise of the state's shape.
Noise = Callable[[int], Tensor]

SdeMethod = Literal["sde_euler", "sde_heun"]
SDE_METHODS: tuple[SdeMethod, ...] = get_args(SdeMethod)
Form = Literal["sigma", "linear", "constant", "sbdm", "decreasing", "increasing-decreasing"]
FORMS: tuple[Form, ...] = get_args(Form)
LastStep = Literal["mean", "euler", "tweedie", "none"]
LAST_STEPS: tuple[LastStep, ...] = get_args(LastStep)
LAST_SIZE = 0.04  # SiT's default, and REPA's last interval


@dataclass(frozen=True)
class Diffusion:
    """The free choices of the stochastic samplers.

    Attributes:
        path: of the interpolation that the network was trained on.
        form: of w(t): sigma norm sigma_t; linear norm (1 - t); constant norm; sbdm norm times
            sigma^2 alpha'/alpha - sigma sigma', (1 - t)/t on the linear path; decreasing
            (norm cos(pi t) + 1)^2 / 4; increasing-decreasing norm sin^2(pi t).
        norm: >= 0.
        last: what the last interval does, without noise: mean x + (v + w s) h, euler x + v h,
            tweedie x/alpha + (sigma^2/alpha) s, none: it is a step like the others.
    """

    path: Path
    form: Form = "sigma"
    norm: float = 1.0
    last: LastStep = "mean"

    def weight(self, t: float) -> float:
        """w(t)."""
        if self.form == "constant":
            return self.norm
        if self.form == "linear":
            return self.norm * (1.0 - t)
        if self.form == "decreasing":
            return 0.25 * (self.norm * math.cos(math.pi * t) + 1.0) ** 2
        if self.form == "increasing-decreasing":
            return self.norm * math.sin(math.pi * t) ** 2
        c = _at(self.path, t)
        if self.form == "sigma":
            return self.norm * c.sigma
        return self.norm * (c.sigma**2 * c.d_alpha / c.alpha - c.sigma * c.d_sigma)

    def score(self, v: Tensor, x: Tensor, t: float) -> Tensor:
        """(r v - x) / (sigma^2 - r sigma sigma'), r = alpha/alpha'; linear: (t v - x) / (1 - t)."""
        c = _at(self.path, t)
        r = c.alpha / c.d_alpha
        return (r * v - x) / (c.sigma**2 - r * c.sigma * c.d_sigma)

    def drift(self, t: float) -> tuple[float, float]:
        """(a, b) of the drift v + w s = a v + b x."""
        c, w = _at(self.path, t), self.weight(t)
        r = c.alpha / c.d_alpha
        variance = c.sigma**2 - r * c.sigma * c.d_sigma
        return 1.0 + w * r / variance, -w / variance


class _Coefficients(NamedTuple):
    alpha: float
    sigma: float
    d_alpha: float
    d_sigma: float


def _at(path: Path, t: float) -> _Coefficients:
    """The path's coefficients at a time, as numbers computed in float64."""
    c = path.coefficients(torch.tensor(t, dtype=torch.float64))
    return _Coefficients(float(c.alpha), float(c.sigma), float(c.d_alpha), float(c.d_sigma))


def sde_states(
    evaluate: Evaluate,
    x: Tensor,
    times: Tensor,
    method: SdeMethod,
    diffusion: Diffusion,
    noise: Noise,
) -> Iterator[Tensor]:
    """The states after each interval of `times`.

    "sde_euler"  Euler-Maruyama: x += h b(x, t) + sqrt(2 w h) noise, b the drift
    "sde_heun"   the noise first, x^ = x + sqrt(2 w h) noise; then the trapezoid of the drift,
                 K1 = b(x^, t), x = x^ + h/2 (K1 + b(x^ + h K1, t + h))

    The last interval is `diffusion.last`; "none" makes it a step like the others.

    Args:
        evaluate: (state, t, time at which the step began) -> velocity.
        x: (B, ...) state at times[0]; kept in float32, or in float64 when it comes in float64.
        times: (N + 1,) strictly increasing floats.
        method: one of SDE_METHODS.
        diffusion: form, norm, last step, path.
        noise: k -> noise of interval k, k = 0 .. N - 1 (N - 2 with a last step).

    Raises:
        ValueError: bad times.
    """
    grid = check_problem(x, times)
    x = x if x.dtype == torch.float64 else x.to(torch.float32)
    return run_plan(sde_plan(grid, method, diffusion), evaluate, x, noise=noise)


def sde_plan(grid: list[float], method: SdeMethod, diffusion: Diffusion) -> list[Step]:
    """The steps of a grid."""
    end = len(grid) - 1 - (diffusion.last != "none")
    of_interval = _euler_maruyama if method == "sde_euler" else _stochastic_heun
    plan = [
        of_interval(diffusion, t, t_next)
        for t, t_next in zip(grid[:end], grid[1 : end + 1], strict=True)
    ]
    return plan if diffusion.last == "none" else [*plan, _last_step(diffusion, *grid[-2:])]


def _euler_maruyama(diffusion: Diffusion, t: float, t_next: float) -> Step:
    h, (a, b) = t_next - t, diffusion.drift(t)
    kick = math.sqrt(2.0 * diffusion.weight(t) * h)
    return Step(_noisy_euler, (t,), (h * a, h * b, kick))


def _noisy_euler(
    at: At, states: States, numbers: Sequence[Number], noise: Callable[[], Tensor]
) -> States:
    (x,), (of_v, of_x, kick) = states, numbers
    return (x + (of_v * at(x, 0) + of_x * x) + kick * noise(),)


def _stochastic_heun(diffusion: Diffusion, t: float, t_next: float) -> Step:
    h = t_next - t
    kick = math.sqrt(2.0 * diffusion.weight(t) * h)
    numbers = (kick, *diffusion.drift(t), h, *diffusion.drift(t_next), h / 2)
    return Step(_noisy_heun, (t, t_next), numbers)


def _noisy_heun(
    at: At, states: States, numbers: Sequence[Number], noise: Callable[[], Tensor]
) -> States:
    (x,), (kick, a, b, h, a_next, b_next, half) = states, numbers
    x = x + kick * noise()
    first = a * at(x, 0) + b * x
    ahead = x + h * first
    second = a_next * at(ahead, 1) + b_next * ahead
    return (x + half * (first + second),)


def _last_step(diffusion: Diffusion, t: float, t_next: float) -> Step:
    h, c = t_next - t, _at(diffusion.path, t)
    if diffusion.last == "euler":
        (step,) = plan_euler([t, t_next])
        return step
    if diffusion.last == "mean":
        a, b = diffusion.drift(t)
        return Step(_mean, (t,), (h * a, h * b))
    r = c.alpha / c.d_alpha
    # sigma^2 / alpha over the score's denominator.
    share = c.sigma / (c.alpha * (c.sigma - r * c.d_sigma))
    return Step(_tweedie, (t,), (share * r, 1.0 / c.alpha - share))


def _mean(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (of_v, of_x) = states, numbers
    return (x + (of_v * at(x, 0) + of_x * x),)


def _tweedie(at: At, states: States, numbers: Sequence[Number], _: object) -> States:
    (x,), (of_v, of_x) = states, numbers
    return (of_v * at(x, 0) + of_x * x,)


def sde_evaluations(method: SdeMethod, steps: int, last: LastStep) -> int:
    """Velocity evaluations of `steps` intervals."""
    ordinary = steps - (last != "none")
    return ordinary * (1 if method == "sde_euler" else 2) + (last != "none")
