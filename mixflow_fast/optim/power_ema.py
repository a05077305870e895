"""Formulas of weight averages: fixed decays, power functions, and averages made after the training.

A power-function average of a run at step t weighs the weights of step tau by

    p_{t,gamma}(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)            0 <= tau <= t

so that its width grows with the run. It is named by the standard deviation of this profile as a
fraction of the run, sigma_rel (0.05 to 0.15 in practice). As the profile of every average is known,
a weighted sum of saved averages comes close to one that was never tracked.

Source: EDM2, arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np

# The width for gamma = 0, where all steps weigh the same.
LARGEST_SIGMA_REL = 12**-0.5


@functools.lru_cache(maxsize=256)
def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """Exponent gamma >= 0 of the profile whose relative width is `sigma_rel`.

        sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))

    Raises:
        ValueError: `sigma_rel` outside (0, 12^-0.5].
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(
            f"sigma_rel must be in (0, {LARGEST_SIGMA_REL:.4f}], the width of a plain mean, got "
            f"{sigma_rel!r}: EDM2 uses 0.05 to 0.15"
        )
    inverse = float(sigma_rel) ** -2
    gamma = max(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max(), 0.0)
    for _ in range(3):  # Newton's steps: `roots` is less exact than float64
        value = ((gamma + 7) * gamma + 16 - inverse) * gamma + 12 - inverse
        gamma -= value / ((3 * gamma + 14) * gamma + 16 - inverse)
    return float(max(gamma, 0.0))


def gamma_to_sigma_rel(gamma: float) -> float:
    """Relative width of the profile with this exponent; the inverse of `sigma_rel_to_gamma`."""
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def power_decay(gamma: float, step: int) -> float:
    """beta_gamma(t) = (1 - 1/t)^(gamma + 1): decay of the average in step `step`, from 1 on.

    It is 0 in the first step, so the weights before training do not count.

    Raises:
        ValueError: a step below 1.
    """
    if step < 1:
        raise ValueError(f"step must be 1 or more, got {step!r}: the first update is step 1")
    return (1 - 1 / step) ** (gamma + 1)


def window_steps(decay: float) -> float:
    """1 / (1 - decay): steps until a weight's share of a fixed-decay average has fallen to 1/e.

    An average whose window is longer than the run still is, for the most part, the start.

    Raises:
        ValueError: `decay` outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be in [0, 1), got {decay!r}")
    return 1 / (1 - decay)


def _inner_products(
    steps_a: np.ndarray, gammas_a: np.ndarray, steps_b: np.ndarray, gammas_b: np.ndarray
) -> np.ndarray:
    """Integrals of p_a(tau) p_b(tau) over tau, in closed form, of arrays that broadcast.

    The shorter profile, of exponent g at step s, ends inside the longer one (G, S):

        (g + 1) (G + 1) / (g + G + 1) * (s / S)^G / S
    """
    ratio = np.where(
        steps_a < steps_b, (steps_a / steps_b) ** gammas_b, (steps_b / steps_a) ** gammas_a
    )
    factor = (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1)
    return factor * ratio / np.maximum(steps_a, steps_b)


def _normal_equations(
    steps: np.ndarray, gammas: np.ndarray, target_step: float, target_gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Inner products of the saved profiles among themselves, and with the wanted one."""
    products = _inner_products(steps[:, None], gammas[:, None], steps[None, :], gammas[None, :])
    step, gamma = np.float64(target_step), np.float64(target_gamma)
    return products, _inner_products(steps, gammas, step, gamma)


def posthoc_weights(
    snapshot_steps: Sequence[float],
    snapshot_gammas: Sequence[float],
    target_step: float,
    target_gamma: float,
) -> np.ndarray:
    """Coefficients of saved averages whose sum comes close to an average that was not tracked.

    Least squares between profiles: minimises the integral of (p_target - sum_i c_i p_i)^2. The
    weights then are sum_i c_i snapshot_i. They come close where the target's width lies between
    widths that were saved, and snapshots were saved along the whole run.

    Args:
        snapshot_steps: (n,) steps at which the averages were saved, > 0.
        snapshot_gammas: (n,) their exponents (`sigma_rel_to_gamma`), >= 0.
        target_step: the step whose average is wanted, in (0, the last snapshot's].
        target_gamma: its exponent >= 0.

    Returns:
        (n,) float64.

    Raises:
        ValueError: lists of different lengths or empty, or values outside these ranges.
    """
    steps = np.asarray(snapshot_steps, dtype=np.float64)
    gammas = np.asarray(snapshot_gammas, dtype=np.float64)
    if steps.ndim != 1 or steps.shape != gammas.shape or not steps.size:
        raise ValueError(
            "snapshot_steps and snapshot_gammas must be lists of one length > 0, got shapes "
            f"{steps.shape} and {gammas.shape}: name every saved average once"
        )
    if not (steps > 0).all() or not (gammas >= 0).all():
        raise ValueError(
            "snapshot_steps must be > 0 and snapshot_gammas >= 0, got "
            f"{steps.tolist()} and {gammas.tolist()}"
        )
    if not 0 < target_step <= steps.max() or not target_gamma >= 0:
        raise ValueError(
            f"target_step must be in (0, {steps.max():g}], the last snapshot's, and target_gamma "
            f">= 0, got {target_step!r} and {target_gamma!r}"
        )
    products, wanted = _normal_equations(steps, gammas, target_step, target_gamma)
    # Profiles scaled to unit length, because early ones are tall and would dominate the rounding.
    length = np.sqrt(np.diag(products))
    solution = np.linalg.lstsq(products / np.outer(length, length), wanted / length, rcond=None)[0]
    return solution / length


def posthoc_error(
    weights: Sequence[float],
    snapshot_steps: Sequence[float],
    snapshot_gammas: Sequence[float],
    target_step: float,
    target_gamma: float,
) -> float:
    """Relative distance between the profile of a sum of saved averages and the wanted one.

    The square root of the integral of the squared difference, over that of the wanted profile.

    Args:
        weights: (n,) coefficients from `posthoc_weights`; the other arguments are its own.
    """
    steps = np.asarray(snapshot_steps, dtype=np.float64)
    gammas = np.asarray(snapshot_gammas, dtype=np.float64)
    c = np.asarray(weights, dtype=np.float64)
    products, wanted = _normal_equations(steps, gammas, target_step, target_gamma)
    whole = (target_gamma + 1) ** 2 / (2 * target_gamma + 1) / target_step
    square = whole - 2 * c @ wanted + c @ products @ c
    return math.sqrt(max(float(square / whole), 0.0))
