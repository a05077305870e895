"""Remedies of sampling errors that need no training: the rivals of post-training.

In the engine's clock, t = 0 noise; epsilon and time_shift for the linear path. At the constants
that mean "off" none of them changes a bit.

| name        | what changes                             | source                             |
|-------------|------------------------------------------|------------------------------------|
| ssc         | v' = (1 + a (1-t)^b) v                   | "The Velocity Deficit", 2605.14819 |
| label_scale | the network is told kappa t              | the simple form of time_shift      |
| time_shift  | it is told the time whose variance x has | Li et al. ICLR 2024, 2305.15583    |
| epsilon     | v' = v + (1 - 1/lambda) (x - t v) / t    | Ning et al. ICLR 2024, 2308.15321  |

The form of ssc follows summaries of the paper, whose own constants were not at hand; a = 0.1,
b = 1 were picked on this project's demo.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor

from mixflow_fast.flow.path import per_sample


@dataclass(frozen=True)
class Remedy:
    """What is done to the time that the network is told, and to the (guided) velocity.

    Attributes:
        name: in a protocol and on the command line.
        linear_path: its formula holds for the linear path alone.
    """

    name = "none"
    linear_path = False

    def told(self, x: Tensor, t: Tensor) -> Tensor:
        """The time that the network is told at the state x (B, ...), t (B,)."""
        return t

    def corrected(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The velocity to follow, given the network's v at x and the true time t."""
        return v

    def to_record(self) -> dict[str, float | str]:
        """Name and constants, for a protocol."""
        return {"name": self.name, **asdict(self)}

    def describe(self) -> str:
        constants = ", ".join(f"{key} {value:g}" for key, value in asdict(self).items())
        return f"{self.name} ({constants})"


def _check(remedy: Remedy, field: str, low: float, high: float = math.inf) -> None:
    """ValueError unless the field lies in (low, high]."""
    value = getattr(remedy, field)
    if not (math.isfinite(value) and low < value <= high):
        bound = f"> {low:g}" if high == math.inf else f"in ({low:g}, {high:g}]"
        raise ValueError(f"{remedy.name}: {field} must be {bound}, got {value!r}")


@dataclass(frozen=True)
class VelocityScale(Remedy):
    """SSC: v' = (1 + a (1-t)^b) v, a > -1, b > 0; a = 0 is off."""

    a: float = 0.1
    b: float = 1.0
    name = "ssc"

    def __post_init__(self) -> None:
        _check(self, "a", -1.0)
        _check(self, "b", 0.0)

    def corrected(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return per_sample(1.0 + self.a * (1.0 - t) ** self.b, v).to(v.dtype) * v


@dataclass(frozen=True)
class LabelScale(Remedy):
    """The network is told min(kappa t, 1), kappa > 0; 1 is off."""

    kappa: float = 0.9
    name = "label_scale"

    def __post_init__(self) -> None:
        _check(self, "kappa", 0.0)

    def told(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.kappa * t).clamp(max=1.0)


@dataclass(frozen=True)
class EpsilonScale(Remedy):
    """The predicted noise x - t v divided by `scale` (lambda) > 0, the state kept; 1 is off.

    Papers: 1.017 CIFAR-10, 1.005 FFHQ, 1.006 LSUN tower, 1.006 and 1.004 ImageNet 64 and 128 at 100
    steps. At t = 0, where the state is all noise, nothing changes.
    """

    scale: float = 1.005
    name = "epsilon"
    linear_path = True

    def __post_init__(self) -> None:
        _check(self, "scale", 0.0)

    def corrected(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        factor = torch.where(t > 0, (1.0 - 1.0 / self.scale) / t, torch.zeros_like(t))
        return v + per_sample(factor, v).to(v.dtype) * (x - per_sample(t, v).to(v.dtype) * v)


@dataclass(frozen=True)
class TimeShift(Remedy):
    """The network is told the time near t at which a true state has the variance that x has.

    tau minimises |Var(x) - V(tau)| over [t - window, t + window], with Var(x) the variance of one
    sample's values and V(tau) = tau^2 S + (1 - tau)^2 that of true states. V falls until
    tau = 1/(1+S) and rises after it: tau stays on t's side. For t >= 1 - cutoff nothing changes.

    Attributes:
        window: half the width of the interval of times; 0 is off. Papers: 0.005 to 0.03.
        cutoff: in (0, 1]; the paper's 0.3 to 0.9.
        variance: S, the mean over the data of one sample's variance (about 1 for SD-VAE latents).
    """

    window: float = 0.03
    cutoff: float = 0.5
    variance: float = 1.0
    name = "time_shift"
    linear_path = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.window <= 1.0:
            raise ValueError(f"time_shift: window must be in [0, 1], got {self.window!r}")
        _check(self, "cutoff", 0.0, 1.0)
        _check(self, "variance", 0.0)

    def told(self, x: Tensor, t: Tensor) -> Tensor:
        weight = 1.0 + self.variance
        lowest = 1.0 / weight
        found = x.flatten(1).double().var(dim=1)
        # Roots of (1+S) tau^2 - 2 tau + 1 - Var = 0; without one, V's minimum is the nearest.
        root = (1.0 - weight * (1.0 - found)).clamp(min=0.0).sqrt() / weight
        before = t.double() < lowest
        tau = torch.where(before, lowest - root, lowest + root)
        # On one branch |Var - V| has no second minimum: the nearest end of the window is best.
        near = t.double()
        tau = torch.minimum(torch.maximum(tau, near - self.window), near + self.window)
        low = torch.where(before, 0.0, lowest).to(tau)
        high = torch.where(before, lowest, 1.0).to(tau)
        tau = torch.minimum(torch.maximum(tau, low), high).to(t.dtype)
        return torch.where(t < 1.0 - self.cutoff, tau, t)


REMEDIES: dict[str, type[Remedy]] = {
    kind.name: kind for kind in (VelocityScale, LabelScale, TimeShift, EpsilonScale)
}


def parse_remedy(text: str) -> Remedy:
    """Read NAME or NAME=NUMBER,NUMBER: "ssc", "ssc=0.1,1", "label_scale=0.9".

    Raises:
        ValueError: another name, too many numbers, what is no number, or one out of range.
    """
    name, _, numbers = text.partition("=")
    if name not in REMEDIES:
        raise ValueError(f"remedy must be one of {', '.join(REMEDIES)}, got {name!r}")
    kind = REMEDIES[name]
    names = [field.name for field in fields(kind)]
    given = numbers.split(",") if numbers else []
    form = f"{name}={','.join(names)}".upper().replace(name.upper(), name)
    if len(given) > len(names):
        raise ValueError(f"{name} takes {len(names)} numbers, {form}, got {text!r}")
    try:
        constants = [float(number) for number in given]
    except ValueError as error:
        raise ValueError(f"remedy must be written {form} with numbers, got {text!r}") from error
    return kind(**dict(zip(names, constants, strict=False)))
