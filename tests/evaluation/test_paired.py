"""Verdicts, classes and samples of paired sets, against what was put into them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mixflow_fast.evaluation.metrics import Gaussian, frechet
from mixflow_fast.evaluation.paired import (
    class_strip,
    most_different,
    paired,
    primary_metric,
)
from mixflow_fast.evaluation.uncertainty import Estimate

N = 400


def estimate(value: float, influence: np.ndarray, bias: float = 0.0) -> Estimate:
    return Estimate(value, len(influence), influence - influence.mean(), bias)


def noise(seed: int, size: int = N) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(size)


def test_verdicts_follow_the_interval_and_the_direction_of_the_metric() -> None:
    """Shared influence cancels: se is that of the difference, 0.1 / sqrt(n), by hand."""
    shared, apart = 5 * noise(0), 0.1 * noise(1)
    b = estimate(3.0, shared, bias=0.5)
    half = 1.959964 * apart.std(ddof=1) / math.sqrt(N)
    for gap, fd, precision in (
        (-2 * half, "better", "worse"),
        (-0.5 * half, "cannot tell", "cannot tell"),
        (2 * half, "worse", "better"),
    ):
        a = estimate(3.0 + gap + 0.2, shared + apart, bias=0.7)
        found = paired("fid", a, b)
        assert found.verdict == fd and paired("recall", a, b).verdict == precision
        assert found.corrected == pytest.approx(gap, abs=1e-12)
        assert found.value == pytest.approx(gap + 0.2)
        assert found.low == pytest.approx(gap - half) and found.high == pytest.approx(gap + half)


def test_what_is_no_pair_is_not_judged_and_the_same_weights_are_named() -> None:
    a, b = estimate(1.0, noise(0)), estimate(9.0, noise(1, 50))
    found = paired("fid", a, b, pairs=False)
    assert found.verdict == "not judged" and found.low is None and found.value == -8.0
    with pytest.raises(ValueError, match="sets of one size"):
        paired("fid", a, b)
    same = paired("fid", a, a, identical=True)
    assert (same.verdict, same.value, same.low, same.high) == ("identical weights", 0.0, 0.0, 0.0)


def test_a_shifted_set_is_worse_and_its_shifted_class_is_found() -> None:
    """Features of true law, of one whose class 3 is shifted: verdict and strip say so."""
    rng = np.random.default_rng(0)
    n, dim, classes = 4000, 4, 8
    labels = np.arange(n) % classes
    x = rng.standard_normal((n, dim))
    # The class lies aside, so that its shift moves mean and covariance away from the truth.
    shifted = x + 1.5 * (labels == 3)[:, None] * np.array([1.0, 0, 0, 0])
    reference = Gaussian.of(rng.standard_normal((50_000, dim)))
    a, b = frechet(shifted, reference), frechet(x, reference)
    assert paired("fid", a, b).verdict == "worse" and paired("fid", b, a).verdict == "better"
    strip = class_strip(a, b, labels)
    assert strip is not None and strip.classes[-1] == 3 and strip.omitted == 0
    assert strip.values == sorted(strip.values) and strip.counts == [500] * 8
    assert strip.values[-1] > strip.null_high[-1] > strip.expected_highest > 0
    # Weighted by their sizes the classes make up the whole, whose influences have mean 0.
    assert sum(strip.values) == pytest.approx(0, abs=1e-10)


def test_the_null_strip_has_the_expected_extremes_of_normals() -> None:
    """Ends of K = 10 normal means: E max = 1.5388 sd (order statistics), less the common mean."""
    labels = np.arange(1000) % 10
    a, b = estimate(0.0, 2.0 * noise(5, 1000)), estimate(0.0, np.zeros(1000))
    strip = class_strip(a, b, labels)
    assert strip is not None
    expected = 1.5388 * 2.0 / math.sqrt(100)
    assert strip.expected_highest == pytest.approx(expected, rel=0.05)
    assert strip.expected_lowest == pytest.approx(-expected, rel=0.05)
    inside = np.array(strip.values)
    assert (inside >= strip.null_low).mean() > 0.6 and (inside <= strip.null_high).mean() > 0.6


def test_small_classes_are_left_out_and_counted() -> None:
    labels = np.array([0] * 60 + [1] * 60 + [2] * 49)
    a, b = estimate(0.0, noise(0, 169)), estimate(0.0, noise(1, 169))
    strip = class_strip(a, b, labels)
    assert strip is not None and sorted(strip.classes) == [0, 1] and strip.omitted == 1
    assert class_strip(a, b, np.zeros(169, np.int64)) is None
    with pytest.raises(ValueError, match="one for each of 169 samples, got 3"):
        class_strip(a, b, labels[:3])


def test_samples_that_differ_most_come_first_and_ties_by_number() -> None:
    influence = np.array([0.0, 3.0, -5.0, 3.0, -1.0])
    a, b = Estimate(0.0, 5, influence), Estimate(0.0, 5, np.zeros(5))
    assert most_different(a, b, 3) == [2, 1, 3]


def test_the_deciding_number() -> None:
    assert primary_metric(["kid", "fd_pooled_pixels", "fid"]) == "fid"
    assert primary_metric(["fd_pooled_pixels", "fd_effnet_lite0_p128"]) == "fd_effnet_lite0_p128"
    assert primary_metric(["is", "recall"]) == "is"
    assert primary_metric(["fid", "is", "kid", "fd_pooled_pixels"], aside=["fid"]) == "kid"
    both = ["fd_effnet_lite0_p128", "fd_pooled_pixels"]
    assert primary_metric(both, aside=both[:1]) == "fd_pooled_pixels"
    assert primary_metric(both[:1], aside=both[:1]) == both[0]
