"""Power-function averages: formulas, inner products by quadrature, averages made afterwards."""

import math

import numpy as np
import pytest

from mixflow_fast.optim.power_ema import (
    LARGEST_SIGMA_REL,
    _inner_products,
    gamma_to_sigma_rel,
    posthoc_weights,
    power_decay,
    sigma_rel_to_gamma,
    window_steps,
)


def profile(tau: np.ndarray, step: float, gamma: float) -> np.ndarray:
    inside = (gamma + 1) * tau**gamma / step ** (gamma + 1)
    return np.where(tau <= step, inside, 0.0)


def quadrature(steps: tuple[float, float], gammas: tuple[float, float]) -> float:
    """Integral of the product of two profiles; Gauss-Legendre up to where the shorter one ends."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    end = min(steps)
    tau = (nodes + 1) / 2 * end
    product = profile(tau, steps[0], gammas[0]) * profile(tau, steps[1], gammas[1])
    return float((weights * product).sum() * end / 2)


@pytest.mark.parametrize("sigma_rel", [1e-3, 0.01, 0.05, 0.1, 0.15, 0.25, 0.2886, 12**-0.5])
def test_gamma_solves_the_definition(sigma_rel: float) -> None:
    gamma = sigma_rel_to_gamma(sigma_rel)
    assert gamma >= 0
    assert gamma_to_sigma_rel(gamma) == pytest.approx(sigma_rel, rel=1e-13)
    # The definition itself: the profile's standard deviation, by moments over [0, 1].
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)


def test_gamma_of_published_widths() -> None:
    """EDM2's own: sigma_rel 0.05 and 0.10 are gamma 16.97 and 6.94."""
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=5e-3)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=5e-3)
    assert sigma_rel_to_gamma(LARGEST_SIGMA_REL) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, math.nan])
def test_impossible_width(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="sigma_rel must be in"):
        sigma_rel_to_gamma(sigma_rel)


def test_decay_per_step() -> None:
    assert power_decay(6.94, 1) == 0.0
    assert power_decay(2.0, 4) == pytest.approx(0.75**3, rel=1e-15)
    with pytest.raises(ValueError, match="step must be 1 or more"):
        power_decay(1.0, 0)
    # gamma = 0 is the plain mean of the weights after each step.
    values, average = np.random.default_rng(0).normal(size=50), 5.0
    for step, value in enumerate(values, 1):
        average += (1 - power_decay(0.0, step)) * (value - average)
    assert average == pytest.approx(values.mean(), rel=1e-12)


def test_window_of_a_fixed_decay() -> None:
    assert window_steps(0.9999) == pytest.approx(10_000)
    assert window_steps(0.0) == 1.0
    assert 0.9999 ** window_steps(0.9999) == pytest.approx(1 / math.e, rel=1e-4)
    with pytest.raises(ValueError, match="decay must be in"):
        window_steps(1.0)


@pytest.mark.parametrize(
    ("steps", "gammas"),
    [
        ((10.0, 10.0), (6.94, 6.94)),
        ((10.0, 20.0), (6.94, 16.97)),
        ((20.0, 10.0), (6.94, 16.97)),
        ((3.0, 1000.0), (0.0, 2.5)),
        ((7.0, 8.0), (0.0, 0.0)),
    ],
)
def test_inner_products_are_the_integrals(steps: tuple, gammas: tuple) -> None:
    arrays = [np.float64(x) for x in (steps[0], gammas[0], steps[1], gammas[1])]
    assert _inner_products(*arrays) == pytest.approx(quadrature(steps, gammas), rel=1e-9)


def test_a_saved_average_is_itself() -> None:
    steps, gammas = [100, 200, 200, 300], [6.94, 6.94, 16.97, 16.97]
    found = posthoc_weights(steps, gammas, 200, 16.97)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [0, 0, 1, 0], atol=1e-9)


@pytest.mark.parametrize(("sigma_rel", "target_step"), [(0.075, 8192), (0.15, 8192), (0.1, 7000)])
def test_reconstruction_of_an_average_that_was_not_tracked(
    sigma_rel: float, target_step: int
) -> None:
    """Random walks of many scalars: the computed average against the one that was tracked."""
    rng = np.random.default_rng(1)
    tracked = [sigma_rel_to_gamma(s) for s in (0.05, 0.10)]
    wanted = sigma_rel_to_gamma(sigma_rel)
    walk, averages, truth = np.zeros(64), np.zeros((2, 64)), np.zeros(64)
    steps, gammas, snapshots = [], [], []
    for step in range(1, 8193):
        walk = walk + rng.normal(size=64)
        for i, gamma in enumerate(tracked):
            averages[i] += (1 - power_decay(gamma, step)) * (walk - averages[i])
        if step <= target_step:
            truth += (1 - power_decay(wanted, step)) * (walk - truth)
        if step % 256 == 0:
            for i, gamma in enumerate(tracked):
                steps.append(step)
                gammas.append(gamma)
                snapshots.append(averages[i].copy())
    made = posthoc_weights(steps, gammas, target_step, wanted) @ np.array(snapshots)
    error = np.sqrt(np.mean((made - truth) ** 2) / np.mean(truth**2))
    nearest = averages[int(abs(sigma_rel - 0.10) < abs(sigma_rel - 0.05))]
    plain = np.sqrt(np.mean((nearest - truth) ** 2) / np.mean(truth**2))
    assert error < 5e-3 and error < plain / 5, (error, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1, 1.0), "one length > 0"),
        (([1, 2], [1.0], 1, 1.0), "one length > 0"),
        (([0, 2], [1.0, 1.0], 1, 1.0), "snapshot_steps must be > 0"),
        (([1, 2], [1.0, -1.0], 1, 1.0), "snapshot_gammas >= 0"),
        (([1, 2], [1.0, 1.0], 3, 1.0), r"target_step must be in \(0, 2\]"),
        (([1, 2], [1.0, 1.0], 2, -1.0), "target_gamma >= 0"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posthoc_weights(*arguments)
