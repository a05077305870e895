"""Percentiles and the paired ratio of two interleaved measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Percentiles(NamedTuple):
    """Of a sample: the 20th, 50th and 80th, linear between neighbours."""

    p20: float
    p50: float
    p80: float


class Ratio(NamedTuple):
    """Of paired rounds: median and spread of other / ours, and the median's 95% interval."""

    p20: float
    p50: float
    p80: float
    low95: float
    high95: float


def percentiles(samples: Sequence[float]) -> Percentiles:
    """p20, p50 and p80 of one or more finite numbers."""
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"samples must be one or more finite numbers, got {samples!r}")
    return Percentiles(*(float(v) for v in np.percentile(values, (20, 50, 80))))


def paired_ratio(
    other: Sequence[float], ours: Sequence[float], resamples: int = 4000, seed: int = 0
) -> Ratio:
    """How many times longer `other` took than `ours`, round by round: > 1 is a win for ours.

    A round measures both within moments of each other, so clocks and neighbours that drift move
    both and cancel. The interval is the percentile bootstrap of the median over rounds.

    Args:
        other, ours: one positive time per round, in the same order of rounds.
        resamples: bootstrap draws.
        seed: of the bootstrap; the same data give the same interval.
    """
    a, b = np.asarray(other, dtype=np.float64), np.asarray(ours, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(
            f"other and ours must hold one time per round, got shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise ValueError("times must be finite and positive: a round measured nothing")
    ratios = a / b
    draws = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return Ratio(*percentiles(ratios), float(low), float(high))
