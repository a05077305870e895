"""Interpolation paths x_t = alpha_t x1 + sigma_t x0 on the engine's clock (t = 1 is data).

| path   | alpha_t       | sigma_t             | source                     |
|--------|---------------|---------------------|----------------------------|
| linear | t             | 1 - t               | SiT, RAE, SD3, MixFlow     |
| gvp    | sin(pi t / 2) | cos(pi t / 2)       | SiT; REPA calls it cosine  |
| vp     | exp(L(t))     | sqrt(1 - exp(2 L))  | SiT, beta_min 0.1, max 20  |

with L(t) = -(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2. Formulas: SiT (arXiv
2401.08740), section 2 and appendix. A path is written in t and s = 1 - t so that both ends keep
their precision.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

PathName = Literal["linear", "gvp", "vp"]
Prediction = Literal["velocity", "noise", "data", "score"]
PREDICTIONS = get_args(Prediction)
LossWeight = Literal["velocity", "likelihood"]
LOSS_WEIGHTS = (None, *get_args(LossWeight))


class Coefficients(NamedTuple):
    """Path coefficients at given times, each of the shape and dtype of the times."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor
    d_log_alpha: Tensor


class Path:
    """Coefficients of a path, and formulas that follow from them. Times are in the engine's clock.

    Attributes:
        name: "linear", "gvp" or "vp".
    """

    name = ""

    def coefficients(self, t: Tensor, s: Tensor | None = None) -> Coefficients:
        """alpha, sigma, their derivatives in t, and d(log alpha)/dt.

        Args:
            t: times in [0, 1], any shape, float32 or float64; 0 = noise.
            s: 1 - t where the caller knows it more precisely.
        """
        raise NotImplementedError

    def train_bounds(self, prediction: str) -> tuple[float, float]:
        """Interval [low, high] of training times, as SiT's `check_interval` sets it."""
        return (0.0, 1.0) if prediction in ("velocity", "data") else (1e-3, 1 - 1e-3)

    def interpolate(self, x1: Tensor, x0: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """x_t = alpha_t x1 + sigma_t x0 for (B, ...) tensors and (B,) times."""
        c = self.coefficients(t, s)
        return per_sample(c.alpha, x1) * x1 + per_sample(c.sigma, x1) * x0

    def velocity(self, x1: Tensor, x0: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        """u* = d_alpha x1 + d_sigma x0, the velocity d x_t / d t (SiT equation 4)."""
        c = self.coefficients(t, s)
        return per_sample(c.d_alpha, x1) * x1 + per_sample(c.d_sigma, x1) * x0

    def loss_weight(self, weight: str, t: Tensor, s: Tensor | None = None) -> Tensor:
        """SiT's weight of the noise and score losses at times t, shape of t.

        "velocity": (g / sigma)^2, which turns the noise loss into a velocity loss;
        "likelihood": g / sigma^2; with g = (d log alpha) sigma^2 - sigma d_sigma.
        """
        c = self.coefficients(t, s)
        g = c.d_log_alpha * c.sigma**2 - c.sigma * c.d_sigma
        if weight == "velocity":
            return (g / c.sigma) ** 2
        if weight == "likelihood":
            return g / c.sigma**2
        raise ValueError(f"loss_weight must be one of {LOSS_WEIGHTS}, got {weight!r}")

    def to_velocity(self, out: Tensor, x: Tensor, t: Tensor, prediction: str) -> Tensor:
        """The velocity that a noise, data or score prediction `out` at (x, t) stands for.

        Solves x = alpha x1 + sigma x0 for the end that was not predicted. Singular where its
        coefficient vanishes: alpha = 0 (t = 0) for noise and score, sigma = 0 (t = 1) for data.
        """
        if prediction == "velocity":
            return out
        c = self.coefficients(t)
        alpha, sigma = per_sample(c.alpha, x), per_sample(c.sigma, x)
        if prediction == "data":
            x1, x0 = out, (x - alpha * out) / sigma
        elif prediction in ("noise", "score"):
            x0 = out if prediction == "noise" else -sigma * out
            x1 = (x - sigma * x0) / alpha
        else:
            raise ValueError(f"prediction must be one of {PREDICTIONS}, got {prediction!r}")
        return per_sample(c.d_alpha, x) * x1 + per_sample(c.d_sigma, x) * x0


class LinearPath(Path):
    name = "linear"

    def coefficients(self, t: Tensor, s: Tensor | None = None) -> Coefficients:
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t if s is None else s, one, -one, 1 / t)

    def velocity(self, x1: Tensor, x0: Tensor, t: Tensor, s: Tensor | None = None) -> Tensor:
        # The same bits as with products by 1 and -1, each of which would be a pass over memory.
        return x1 - x0


class GVPPath(Path):
    name = "gvp"

    def coefficients(self, t: Tensor, s: Tensor | None = None) -> Coefficients:
        half_pi = math.pi / 2
        s = 1 - t if s is None else s
        # Each of sin and cos is evaluated at the argument that is small where it vanishes.
        alpha, sigma = torch.sin(half_pi * t), torch.sin(half_pi * s)
        d_alpha, d_sigma = half_pi * sigma, -half_pi * alpha
        return Coefficients(alpha, sigma, d_alpha, d_sigma, d_alpha / alpha)


class VPPath(Path):
    name = "vp"
    beta_min = 0.1
    beta_max = 20.0

    def coefficients(self, t: Tensor, s: Tensor | None = None) -> Coefficients:
        s = 1 - t if s is None else s
        spread = self.beta_max - self.beta_min
        # In log alpha, so that sigma = sqrt(1 - alpha^2) keeps its digits at the data end.
        log_alpha = -(s**2) * (spread / 4) - s * (self.beta_min / 2)
        d_log_alpha = s * (spread / 2) + self.beta_min / 2
        alpha = torch.exp(log_alpha)
        sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
        d_sigma = -(alpha**2) * d_log_alpha / sigma
        return Coefficients(alpha, sigma, alpha * d_log_alpha, d_sigma, d_log_alpha)

    def train_bounds(self, prediction: str) -> tuple[float, float]:
        return (0.0, 1 - 1e-5)  # d sigma / dt is infinite at the data


PATHS: dict[PathName, Path] = {path.name: path for path in (LinearPath(), GVPPath(), VPPath())}


def get_path(name: str) -> Path:
    """The path called `name`; ValueError that lists the names otherwise."""
    if name not in PATHS:
        raise ValueError(f"path must be one of {tuple(PATHS)}, got {name!r}")
    return PATHS[name]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) values shaped to broadcast over the (B, ...) tensor `like`."""
    return values.view(-1, *([1] * (like.dim() - 1)))
