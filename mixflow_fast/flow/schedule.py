"""The times of a training example: the network's t and the slowed m, from two uniform numbers.

    t = shift(distribution(u)),   m ~ U[(1 - gamma) t, t] by v      (MixFlow, arXiv 2512.19311)

A `Schedule` holds everything that this takes, as plain numbers and names, so that the PyTorch code
here and the device code of `kernels/schedule.py` compute the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, engine_times
from mixflow_fast.flow.timesteps import TimeDistribution, shift_time, slow_time

Interval = Literal["shifted", "raw", "full"]
INTERVALS = get_args(Interval)
# Which time the target, the score's scale and the loss weight are taken at.
TargetAt = Literal["slowed", "label"]


@dataclass(frozen=True)
class Schedule:
    """Distribution of the times, in all its parameters.

    Attributes:
        clock: the caller's clock, of every time that goes in or comes out.
        distribution: of t before the shift, truncated so that shifted times keep the bounds.
        gamma: slowing range in [0, 1].
        shift: RAE's k >= 1.
        interval: "shifted" slows in shifted time, "raw" before the shift, "full" draws
            m ~ U[0, 1] whatever t is.
        low, high: bounds of shifted times, engine's clock.
    """

    clock: str
    distribution: TimeDistribution
    gamma: float
    shift: float
    interval: str
    low: float
    high: float

    @classmethod
    def of(
        cls,
        clock: str,
        timesteps: str,
        gamma: float,
        shift: float,
        interval: str,
        bounds: tuple[float, float],
    ) -> Schedule:
        """The schedule whose shifted times lie in `bounds`; arguments as `MixFlow`."""
        low, high = bounds
        # The distribution is that of times before the shift, so the bounds are shifted back.
        first, last = (shift_time(bound, 1 / shift, DATA_AT_1) for bound in bounds)
        return cls(
            clock,
            TimeDistribution.parse(timesteps, clock, first, last),
            gamma,
            shift,
            interval,
            low,
            high,
        )

    def numbers(self) -> list[float]:
        """All numbers of the schedule as one argument of an operator; see `from_parts`."""
        d = self.distribution
        return [self.gamma, self.shift, self.low, self.high, d.mu, d.sigma, d.low, d.high]

    @classmethod
    def from_parts(
        cls, clock: str, distribution: str, interval: str, numbers: list[float]
    ) -> Schedule:
        """The inverse of (clock, distribution.name, interval, numbers())."""
        gamma, shift, low, high, mu, sigma, first, last = numbers
        return cls(
            clock,
            TimeDistribution(distribution, mu, sigma, first, last),
            gamma,
            shift,
            interval,
            low,
            high,
        )

    def time(self, u: Tensor) -> Tensor:
        """(B,) times t for uniform numbers u in (0, 1)."""
        return shift_time(self._raw(u), self.shift, self.clock)

    def slowed(self, t: Tensor, u: Tensor | None, v: Tensor) -> Tensor:
        """(B,) slowed times.

        Args:
            t: (B,) times of the network.
            u: the uniform numbers that gave t; None where the caller gave t.
            v: (B,) uniform numbers in (0, 1).
        """
        if self.interval == "full":
            return engine_times(v.clamp(self.low, self.high), self.clock)[0]
        if self.gamma == 0:
            return t  # exactly: shifting back and forth would round
        if self.interval == "shifted":
            return self._within_bounds(slow_time(t, v, self.gamma, self.clock), t)
        # A time that the caller gave is a shifted one: slow it in raw time, then shift back.
        raw = self._raw(u) if u is not None else shift_time(t, 1 / self.shift, self.clock)
        m = slow_time(raw, v, self.gamma, self.clock)
        return self._within_bounds(shift_time(m, self.shift, self.clock), t)

    def _raw(self, u: Tensor) -> Tensor:
        """Times before the shift, in the caller's clock."""
        return engine_times(self.distribution.quantile(u), self.clock)[0]

    def _within_bounds(self, m: Tensor, t: Tensor) -> Tensor:
        """m off the noise end where path or prediction are singular, but never past t."""
        if self.clock == DATA_AT_1:
            return torch.minimum(m.clamp(min=self.low), t)
        return torch.maximum(m.clamp(max=1 - self.low), t)
