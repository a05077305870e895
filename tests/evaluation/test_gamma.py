"""The rule for gamma on states whose deficit is known, and the choice between a pilot's arms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.gamma import choose_gamma, pilot_gammas, recommend_gamma
from mixflow_fast.evaluation.slow_flow import (
    NULLS,
    Band,
    MarginalPoint,
    Settings,
    SlowFlow,
    StepFlow,
)
from mixflow_fast.evaluation.slowed_times import LinearFeatures, Marginal, MarginalTime

TIMES = (0.4, 0.6, 0.8, 1.0)
SHAPE = (1, 8, 8)


def images(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fall = 1 / (1 + torch.arange(64.0, dtype=torch.float64)) ** 0.5
    return (2 * fall * torch.randn(count, 64, generator=generator).double()).view(count, *SHAPE)


def flow_of(c: float, c_fine: float, count: int = 4000, most: int = 64, seed: int = 0) -> SlowFlow:
    """As if the coarse states were those of (1 - c) t, and the fine ones of (1 - c_fine) t."""
    features = LinearFeatures(SHAPE, most)
    data = features(images(20_000, 999))
    estimate = MarginalTime(data.mean(0), data.T.cov(), features.noise_variance)
    ends = {}
    for place in range(1 + NULLS):
        own = 10 * seed + place
        generator = torch.Generator().manual_seed(10_000 + own)
        noise = torch.randn(count, *SHAPE, generator=generator)
        ends[place] = features(images(count, own)), features(noise)

    def at(place: int, m: float, t: float) -> Marginal:
        return estimate(m * ends[place][0] + (1 - m) * ends[place][1], t)

    def points(slow: float) -> tuple[MarginalPoint, ...]:
        found = []
        for t in TIMES:
            m = (1 - slow) * t
            null = sum(at(1 + draw, m, m).m / m for draw in range(NULLS)) / NULLS
            found.append(MarginalPoint(t, at(0, m, t), null, 0.0))
        return tuple(found)

    band = Band([], [], [], [])
    flow = StepFlow(5, band, band, (0.0, 0.0), points(c), points(c_fine), band)
    return SlowFlow(Settings(steps=(5,)), {5: flow}, features.dim, "images", 50_000)


@pytest.mark.parametrize(("c", "c_fine"), [(0.1, 0.0), (0.12, 0.04), (0.0, 0.0)])
def test_the_rule_is_twice_what_the_coarse_grid_adds(c: float, c_fine: float) -> None:
    found = recommend_gamma(flow_of(c, c_fine))
    assert found.value == pytest.approx(2 * (c - c_fine), abs=0.02)
    assert found.low <= 2 * (c - c_fine) + 0.01 and found.high >= 2 * (c - c_fine) - 0.01
    assert f"{100 * c:.0f}" in found.why and found.steps == 5


def test_the_interval_is_the_spread_between_draws() -> None:
    """Of coarse and fine states that share their noise, as those of a measurement do."""
    found = [
        recommend_gamma(flow_of(0.12, 0.02, count=300, most=16, seed=seed)) for seed in range(1, 41)
    ]
    spread = float(torch.tensor([one.value for one in found]).std())
    half = sum(one.high - one.value for one in found) / len(found)
    assert half == pytest.approx(1.96 * spread, rel=0.35)


def test_the_rule_is_clipped_and_says_so() -> None:
    slow = flow_of(0.1, 0.0, count=500)
    flow = slow.by_steps[5]
    swapped = replace(slow, by_steps={5: replace(flow, marginal=flow.fine, fine=flow.marginal)})
    found = recommend_gamma(swapped)
    assert (found.value, found.low) == (0.0, 0.0) and "below zero" in found.why
    with pytest.raises(ValueError, match="one of 5, which were measured, got 7"):
        recommend_gamma(slow, 7)


def test_without_a_minimum_nothing_is_known() -> None:
    slow = flow_of(0.1, 0.0, count=500)
    flow = slow.by_steps[5]
    lost = replace(flow.fine[0].estimate, influence=torch.full((500,), torch.nan))
    fine = (replace(flow.fine[0], estimate=lost), *flow.fine[1:])
    found = recommend_gamma(replace(slow, by_steps={5: replace(flow, fine=fine)}))
    assert (found.low, found.high) == (0.0, 0.9)
    assert fine[0].to_record()["se"] is None and not fine[0].overshoots


def test_pilot_arms() -> None:
    assert pilot_gammas(0.154) == (0.0, 0.15, 0.31, 0.8)
    assert pilot_gammas(0.0) == (0.0, 0.8)
    assert pilot_gammas(0.4) == (0.0, 0.4, 0.8)
    assert pilot_gammas(0.6) == (0.0, 0.6, 0.8, 1.0)


@dataclass
class Scored:
    value: float
    influence: Tensor


def test_the_smallest_gamma_that_is_not_worse() -> None:
    """Differences are judged by what differs: a noise that all arms share says nothing."""
    generator = torch.Generator().manual_seed(0)
    shared, own = (torch.randn(400, generator=generator) for _ in range(2))
    shared, own = 10 * (shared - shared.mean()), (own - own.mean()) / own.std()
    scores = {
        0.8: Scored(1.00, shared),
        0.3: Scored(1.05, shared + own),  # 0.05 is one standard error of the difference
        0.0: Scored(1.20, shared + own),  # four of them
    }
    found = choose_gamma(scores)
    assert (found.gamma, found.best) == (0.3, 0.8)
    assert [arm.gamma for arm in found.arms] == [0.0, 0.3, 0.8]
    assert [arm.worse for arm in found.arms] == [True, False, False]
    assert found.arms[1].high == pytest.approx(0.05 + 1.96 * 0.05, abs=1e-3)
    # The same numbers without pairing could not be told apart.
    other = {
        g: Scored(s.value, s.influence.flip(0) if g else s.influence) for g, s in scores.items()
    }
    assert choose_gamma(other).gamma == 0.0
    # Then nothing is told: which arm is the best may be chance.
    assert found.conclusive and not choose_gamma(other).conclusive
    with pytest.raises(ValueError, match=r"sets of \[399, 400\]"):
        choose_gamma({0.0: scores[0.0], 0.8: Scored(1.0, shared[1:])})
