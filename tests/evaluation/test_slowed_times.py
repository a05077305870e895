"""The estimators of slow flow on states whose time is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.slowed_times import (
    STEP,
    LinearFeatures,
    MarginalTime,
    NoiseLevel,
    _parabola,
    coefficients,
    dct,
    effective_time,
    pair_time,
    projection,
)
from mixflow_fast.flow.path import get_path

SHAPE = (2, 8, 8)


def images(count: int, seed: int) -> Tensor:
    """Smooth random images with a mean: most variance in the low frequencies."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 2, 4, 4, generator=generator, dtype=torch.float64)
    fine = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return 0.6 * torch.nn.functional.interpolate(coarse, 8) + 0.15 * fine + 0.2


def noise(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)


def true_states(count: int, seed: int, m: float, path: str = "linear") -> Tensor:
    alpha, sigma = coefficients(get_path(path), torch.tensor(m))
    return float(alpha) * images(count, seed) + float(sigma) * noise(count, seed)


def marginal(path: str = "linear") -> tuple[LinearFeatures, MarginalTime]:
    features = LinearFeatures(SHAPE, 40)
    data = features(images(20_000, 99))
    return features, MarginalTime(data.mean(0), data.T.cov(), features.noise_variance, path)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_pair_time_of_states_on_the_way(path: str) -> None:
    x1, x0 = images(50, 0), noise(50, 0)
    for m in (0.1, 0.37, 0.9):
        alpha, sigma = coefficients(get_path(path), torch.tensor(m))
        found = pair_time(float(alpha) * x1 + float(sigma) * x0, x1, x0, path)
        # Other paths go through a grid of step 0.005 and a parabola.
        near = 1e-6 if path == "linear" else 3e-4
        assert torch.allclose(found, torch.full_like(found, m), atol=near)
    # The linear path's grid and formula agree where the state is not on the way.
    beside = 0.4 * x1 + 0.6 * x0 + 0.3 * noise(50, 7)
    u = x1 - x0
    by_hand = ((beside - x0) * u).flatten(1).sum(1) / u.square().flatten(1).sum(1)
    assert torch.allclose(pair_time(beside, x1, x0), by_hand.clamp(0, 1), atol=1e-12)


def test_effective_time_of_a_delayed_trajectory() -> None:
    """States of an exact solution at (1 - c) t are found there."""
    times = torch.linspace(0, 1, 201, dtype=torch.float64)
    reached = torch.stack([times**2, times, (times * 1.2).clamp_max(1.0)])
    for t in (0.2, 0.5, 0.8):
        m = 0.9 * t
        states = torch.tensor([m**2, m, 1.2 * m], dtype=torch.float64)
        found = effective_time(reached, times, states, t)
        assert torch.allclose(found, torch.full((3,), m).double(), atol=1e-4)


def test_effective_time_of_a_trajectory_that_turns_back() -> None:
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    reached = torch.tensor([[0.0, 0.5, 0.4, 0.6, 1.0]], dtype=torch.float64)
    states = torch.tensor([0.45], dtype=torch.float64)
    found = [float(effective_time(reached, times, states, t)) for t in (0.1, 0.4, 0.9)]
    assert found == pytest.approx([0.225, 0.375, 0.5625])
    # Beyond its end it is the end, and before its beginning the beginning.
    for state, time in ((1.2, 1.0), (-0.1, 0.0)):
        beyond = torch.tensor([state], dtype=torch.float64)
        assert float(effective_time(reached, times, beyond, 0.5)) == time


@pytest.mark.parametrize(("path", "t"), [("linear", 0.4), ("linear", 0.8), ("gvp", 0.4)])
def test_marginal_time_over_its_null(path: str, t: float) -> None:
    features, estimate = marginal(path)
    nulls = [estimate(features(true_states(20_000, s, t, path)), t).m / t for s in (1, 2, 3)]
    for c in (0.0, 0.1, 0.2):
        found = estimate(features(true_states(20_000, 5, (1 - c) * t, path)), t)
        # The tolerance is some three standard errors of this many states.
        assert found.se < 0.0033
        assert found.m / (sum(nulls) / 3) == pytest.approx((1 - c) * t, abs=0.01)


def test_marginal_time_sees_too_much_signal() -> None:
    features, estimate = marginal()
    null = estimate(features(images(1000, 1)), 1.0).m
    assert estimate(features(1.1 * images(1000, 2)), 1.0).m / null == pytest.approx(1.1, abs=0.02)


def test_marginal_standard_error_is_the_spread_between_draws() -> None:
    features, estimate = marginal()
    found = [estimate(features(true_states(400, seed, 0.6)), 0.6) for seed in range(120)]
    spread = torch.tensor([one.m for one in found]).std()
    mean_se = sum(one.se for one in found) / len(found)
    assert mean_se == pytest.approx(float(spread), rel=0.2)
    assert all(abs(float(one.influence.mean())) < 1e-12 for one in found)


def test_marginal_needs_more_states_than_features() -> None:
    features, estimate = marginal()
    with pytest.raises(ValueError, match=r"got 20 states of 32 features: take more states"):
        estimate(features(images(20, 0)), 0.5)


def test_noise_level_after_calibration() -> None:
    z = dct(images(20_000, 99))
    level = NoiseLevel(z.mean(0), z.var(0))
    for t in (0.4, 0.8):
        bias = level(true_states(1000, 1, t)).median() - t
        for c in (0.0, 0.1, 0.2):
            m = (1 - c) * t
            found = level(true_states(1000, 2, m)).median() - bias
            assert float(found) == pytest.approx(m, abs=0.01)


def test_dct_is_scipys() -> None:
    fft = pytest.importorskip("scipy.fft")
    x = noise(3, 0)[:, :, :6]
    wanted = torch.from_numpy(fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")).flatten(1)
    assert torch.allclose(dct(x), wanted, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "most", "dim"),
    [((3, 16, 16), 400, 192), ((3, 16, 16), 100, 48), ((768, 4, 4), 100, 100), ((1, 6, 9), 50, 9)],
)
def test_noise_stays_white_in_the_features(
    shape: tuple[int, int, int], most: int, dim: int
) -> None:
    features = LinearFeatures(shape, most)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, *shape, generator=generator)
    found = features(x)
    assert found.shape == (4000, dim) == (4000, features.dim)
    cov = found.T.cov() / features.noise_variance
    assert (cov - torch.eye(dim)).abs().max() < 6 / math.sqrt(4000) * 1.5
    # Linear, exactly.
    assert torch.allclose(features(2 * x[:5] - x[5:10]), 2 * found[:5] - found[5:10], atol=1e-6)


def test_projection_of_the_ends() -> None:
    x1, x0 = images(4, 0), noise(4, 0)
    assert torch.allclose(projection(x1, x0, x1), torch.ones(4).double())
    assert torch.allclose(projection(x0, x0, x1), torch.zeros(4).double())


def test_the_parabola_of_the_marginal_estimator_is_least_squares() -> None:
    """Against numpy's fit, on values that no parabola goes through."""
    values = [0.31, 0.12, 0.05, 0.11, 0.27]
    x = STEP * np.arange(-2, 3)
    bend, slope, _ = np.polyfit(x, values, 2)
    assert _parabola(values, STEP) == pytest.approx((bend, slope), rel=1e-9)
    exact = [float(3 * v**2 - 0.2 * v + 1) for v in x]
    assert _parabola(exact, STEP) == pytest.approx((3.0, -0.2), rel=1e-9)
