"""Which gamma a network's slow flow asks for, and which of a pilot's arms to take.

    gamma_rec(N) = 2 (delta(N) - delta(fine))        clipped to [0, 0.9]

delta is the mean of 1 - m/t by the marginal estimator (E3). m ~ U[(1 - gamma) t, t] has the mean
(1 - gamma/2) t, so training with gamma meets a deficit of gamma/2 on average; the part that a fine
solve has too is the network's own error, which slowing does not mend.

The rule was found on one small network and data set: it is a lead and not a law, and the paper's
best gammas on ImageNet are larger (0.7 to 1 for SiT, 0.4 for RAE). A pilot trains and compares, but
briefly: it learns a part of the slowing, and may prefer larger gammas than the whole training
(docs/evidence).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

import torch

from mixflow_fast.evaluation.slow_flow import NULLS, SlowFlow, deficit

HIGHEST = 0.9
PAPER = 0.8  # the paper's gamma for SiT, an arm of every pilot
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Gamma:
    """A recommended gamma.

    Attributes:
        value: the rule's.
        low, high: its 95% interval over draws of the states; the rule itself is not in doubt there.
        why: the numbers behind it, in words.
        steps: number of intervals that it is for.
    """

    value: float
    low: float
    high: float
    why: str
    steps: int

    def to_record(self) -> dict[str, float | int | str]:
        """Plain numbers for a JSON file."""
        return asdict(self)


def recommend_gamma(slow: SlowFlow, steps: int | None = None) -> Gamma:
    """gamma_rec for a number of steps.

    Args:
        slow: slow flow of the network that is to be trained further.
        steps: intervals that it will be sampled with; None: the fewest that were measured.

    Raises:
        ValueError: a number of steps that was not measured.
    """
    steps = min(slow.by_steps) if steps is None else steps
    if steps not in slow.by_steps:
        raise ValueError(
            f"steps must be one of {', '.join(map(str, slow.by_steps))}, which were measured, "
            f"got {steps}"
        )
    flow = slow.by_steps[steps]
    coarse, coarse_influence = deficit(flow.marginal)
    fine, fine_influence = deficit(flow.fine)
    # Of the same noise: what both solves share cancels.
    influence = 2 * (coarse_influence - fine_influence)
    half = _NORMAL_95 * float(influence.std()) / math.sqrt(len(influence))
    # The nulls are of as many states each, and vary between the two times as these do.
    half *= math.sqrt(1 + 1 / NULLS)
    value = 2 * (coarse - fine)
    # Not finite where the estimator found no minimum: then nothing is known.
    low, high = (value - half, value + half) if math.isfinite(half) else (0.0, HIGHEST)
    settings = slow.settings
    why = (
        f"{settings.method} with {steps} steps lacks {100 * coarse:.1f}% of the signal, heun with "
        f"{settings.fine_steps} lacks {100 * fine:.1f}%: twice the difference"
    )
    if low <= 0 < value:
        why += ", which is within its own noise"
    if value <= 0:
        why += " is below zero: nothing for slowing to fill"
    elif value > HIGHEST:
        why += f", cut at {HIGHEST:g}"
    return Gamma(*(_clip(v) for v in (value, low, high)), why, steps)


def _clip(value: float) -> float:
    return min(max(value, 0.0), HIGHEST)


def pilot_gammas(recommended: float) -> tuple[float, ...]:
    """The arms of a pilot: none, the rule's, twice the rule's, the paper's; each once, in order."""
    found = {0.0, recommended, 2 * recommended, PAPER}
    return tuple(sorted({round(min(gamma, 1.0), 2) for gamma in found}))


class Score(Protocol):
    """A distance of a sample set, lower is better, with what each sample adds to it.

    Attributes:
        value: the distance.
        influence: (n,) numbers with mean 0, whose standard deviation over sqrt(n) is the standard
            error; of sample i in the order of ids.
    """

    @property
    def value(self) -> float: ...

    @property
    def influence(self) -> object: ...


@dataclass(frozen=True)
class PilotArm:
    """A gamma against the best one.

    Attributes:
        gamma: of this arm.
        value: its distance.
        difference: to the best arm's; low, high: its 95% interval, paired by sample.
        worse: whether all of the interval is above zero.
    """

    gamma: float
    value: float
    difference: float
    low: float
    high: float
    worse: bool


@dataclass(frozen=True)
class Choice:
    """The gamma that a pilot recommends.

    Attributes:
        gamma: the smallest that is not significantly worse than the best; of a choice that is not
            conclusive it is the smallest of all and says nothing.
        best: the one with the lowest distance.
        arms: all of them, by gamma.
    """

    gamma: float
    best: float
    arms: tuple[PilotArm, ...]

    @property
    def conclusive(self) -> bool:
        """Whether any arm is significantly worse: else the arms cannot be told apart."""
        return any(arm.worse for arm in self.arms)


def choose_gamma(scores: Mapping[float, Score]) -> Choice:
    """Choose between arms that were sampled with the same ids.

    One training run stands behind each arm: the intervals cover the drawing of samples, not of
    another training.

    Args:
        scores: distance of each gamma's samples.

    Raises:
        ValueError: no arms, or sets of different sizes.
    """
    influences = {
        gamma: torch.as_tensor(score.influence, dtype=torch.float64)
        for gamma, score in scores.items()
    }
    sizes = {len(influence) for influence in influences.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"the arms of a pilot must have the same samples, got sets of {sorted(sizes)}"
        )
    best = min(sorted(scores), key=lambda gamma: scores[gamma].value)
    arms = []
    for gamma in sorted(scores):
        between = influences[gamma] - influences[best]
        half = _NORMAL_95 * float(between.std()) / math.sqrt(len(between))
        gap = scores[gamma].value - scores[best].value
        worse = gamma != best and gap > half
        arms.append(PilotArm(gamma, scores[gamma].value, gap, gap - half, gap + half, worse))
    chosen = next(arm.gamma for arm in arms if not arm.worse)
    return Choice(chosen, best, tuple(arms))
