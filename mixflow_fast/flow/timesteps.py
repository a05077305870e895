"""Distributions of the training times: pure functions of uniform numbers.

The network's time t follows a `TimeDistribution` on the engine's clock (t = 1 is data):

    uniform           t = u
    beta21            t = sqrt(u), density 2 t                     (MixFlow, arXiv 2512.19311)
    logit-normal      t = sigmoid(mu + sigma Phi^-1(u))            (SD3, RAE)

RAE's shift k >= 1 moves t to the noise, and slowing draws the time m of the network's input:

    shift     data_at_1: t / (k - (k-1) t)        noise_at_1: k t / (1 + (k-1) t)
    slowing   data_at_1: m = t (1 - gamma v)      noise_at_1: m = t + gamma v (1 - t)

so m ~ U[(1-gamma) t, t] in the paper's clock: the input is never less noisy than t says.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1

TIME_DISTRIBUTIONS = ("uniform", "beta21", "logit-normal")
# Noise levels of a text-to-image sampler, see `mixflow_fast.sampling.sigma_grid`.
SigmaGrid = Literal["diffusers", "linear"]
Times = TypeVar("Times", Tensor, float)
_NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
_LOGIT_NORMAL = re.compile(rf"logit-normal(?:\(({_NUMBER}),\s*({_NUMBER})\))?")
_RAE_LOGIT_NORMAL = re.compile(rf"logit-normal_({_NUMBER})_({_NUMBER})")


@dataclass(frozen=True)
class TimeDistribution:
    """A distribution of t on [low, high], sampled by inverting its CDF.

    Truncation is conditioning: the distribution restricted to [low, high], not clipped to it.

    Attributes:
        name: "uniform", "beta21" or "logit-normal".
        mu, sigma: location and scale of the logit-normal distribution, engine's clock; sigma > 0.
        low, high: bounds in the engine's clock.
    """

    name: str
    mu: float = 0.0
    sigma: float = 1.0
    low: float = 0.0
    high: float = 1.0

    @classmethod
    def parse(
        cls, text: str, clock: str = DATA_AT_1, low: float = 0.0, high: float = 1.0
    ) -> TimeDistribution:
        """Read "uniform", "beta21", "logit-normal", "logit-normal(mu, sigma)" (RAE: _mu_sigma).

        mu is the mean of logit(t) in the caller's clock; t -> 1 - t changes its sign.
        """
        text = str(text)
        match = _LOGIT_NORMAL.fullmatch(text) or _RAE_LOGIT_NORMAL.fullmatch(text)
        if match:
            mu, sigma = float(match[1] or 0.0), float(match[2] or 1.0)
            if sigma <= 0:
                raise ValueError(f"logit-normal's sigma must be > 0, got {sigma}")
            return cls("logit-normal", mu if clock == DATA_AT_1 else -mu, sigma, low, high)
        if text not in TIME_DISTRIBUTIONS:
            raise ValueError(
                f"timesteps must be one of {TIME_DISTRIBUTIONS} or 'logit-normal(mu, sigma)', "
                f"got {text!r}"
            )
        return cls(text, low=low, high=high)

    def cdf(self, t: float) -> float:
        """Cumulative distribution function without the truncation, at an engine time t."""
        # The ends before any formula: the logit of 0 or 1 is infinite.
        if self.name == "uniform" or t in (0.0, 1.0):
            return t
        if self.name == "beta21":
            return t * t
        z = (math.log(t / (1 - t)) - self.mu) / self.sigma
        return (1 + math.erf(z / math.sqrt(2))) / 2

    def quantile(self, u: Tensor) -> Tensor:
        """Engine times t in [low, high] for uniform numbers u in (0, 1); dtype and shape of u."""
        if (self.low, self.high) != (0.0, 1.0):
            first, last = self.cdf(self.low), self.cdf(self.high)
            u = first + (last - first) * u
        if self.name == "uniform":
            t = u
        elif self.name == "beta21":
            t = torch.sqrt(u)
        else:
            t = torch.sigmoid(self.mu + self.sigma * torch.special.ndtri(u))
        # Rounding may leave the bounds, where paths and predictions are singular.
        return t.clamp(self.low, self.high)


def shift_time(t: Times, k: float, clock: str) -> Times:
    """RAE's time-distribution shift: the odds t / (1 - t) of the data end are divided by k.

    Args:
        t: times in [0, 1] in the clock `clock`, a tensor or a number.
        k: RAE uses sqrt(C h w / 4096) >= 1. 1 leaves t as it is, 1 / k undoes k.
        clock: "data_at_1" or "noise_at_1".
    """
    if k == 1:
        return t
    return t / (k - (k - 1) * t) if clock == DATA_AT_1 else k * t / (1 + (k - 1) * t)


def slow_time(t: Tensor, v: Tensor, gamma: float, clock: str) -> Tensor:
    """The slowed time m of the network's input for its time t (MixFlow, arXiv 2512.19311).

    Args:
        t: (B,) times of the network in the clock `clock`.
        v: (B,) uniform numbers in (0, 1).
        gamma: slowing range in [0, 1]; 0 returns t exactly.
        clock: "data_at_1" (m <= t) or "noise_at_1" (m >= t).
    """
    return t * (1 - gamma * v) if clock == DATA_AT_1 else t + gamma * v * (1 - t)


def resolution_shift(
    tokens: int,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift k = exp(mu) of a resolution, mu linear in the number of the image's tokens.

    For `shift` of `MixFlow` and grids. FLUX.1's and Qwen-Image's pipelines sample with it
    (diffusers: `calculate_shift`, and `use_dynamic_shifting` with exponential `time_shift_type`).

    Args:
        tokens: of the transformer, (h / 2) (w / 2) for h x w latents: 4096 for 1024 px.
        base_tokens, max_tokens, base_shift, max_shift: mu is base_shift at base_tokens and
            max_shift at max_tokens; the scheduler's configuration has them.

    Raises:
        ValueError: fewer tokens than one, equal ends, or a shift below 1.
    """
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"tokens must be an integer >= 1, (h / 2) (w / 2), got {tokens!r}")
    if not base_tokens < max_tokens:
        raise ValueError(
            f"base_tokens must be below max_tokens, got {base_tokens} and {max_tokens}"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    mu = base_shift + slope * (tokens - base_tokens)
    if not mu >= 0:
        raise ValueError(f"the shift exp({mu:.4g}) of {tokens} tokens is below 1: see base_shift")
    return math.exp(mu)
