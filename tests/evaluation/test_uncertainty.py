"""Standard errors, bias and intervals against simulations of known laws."""

import numpy as np
import pytest
import torch

from mixflow_fast.evaluation.metrics import Gaussian, frechet, inception_score, kid
from mixflow_fast.evaluation.uncertainty import (
    Estimate,
    class_contributions,
    difference,
    frechet_bias,
)

D, N = 32, 600


class Law:
    """N(mean, diag var) whose distance to the reference N(0, diag (0.5 .. 2)) is known."""

    reference_var = np.linspace(0.5, 2, D)
    reference = Gaussian(torch.zeros(D).double(), torch.from_numpy(np.diag(reference_var)))

    def __init__(self, mean: float, low: float, high: float) -> None:
        self.mean, self.sd = mean, np.sqrt(np.linspace(low, high, D))
        spread = (self.sd - np.sqrt(self.reference_var)) ** 2
        self.distance = D * mean**2 + spread.sum()

    def draw(self, noise: np.ndarray) -> np.ndarray:
        return self.mean + noise * self.sd


def simulate(sets: int) -> tuple[list[Estimate], list[Estimate], Law, Law]:
    a, b = Law(0.2, 0.4, 1.2), Law(0.21, 0.42, 1.25)
    g = np.random.default_rng(0)
    noise = [g.normal(size=(N, D)) for _ in range(sets)]
    return (
        [frechet(a.draw(each), Law.reference) for each in noise],
        [frechet(b.draw(each), Law.reference) for each in noise],
        a,
        b,
    )


def covered(estimates: list[Estimate], truth: float) -> float:
    ends = [e.interval() for e in estimates]
    return float(np.mean([low <= truth <= high for low, high in ends]))


def test_intervals_of_a_distance_and_of_a_paired_difference() -> None:
    a, b, law_a, law_b = simulate(200)
    values = np.array([e.value for e in a])
    bias = float(np.mean([e.bias for e in a]))
    assert bias == pytest.approx(values.mean() - law_a.distance, rel=0.05)
    spread = values.std(ddof=1)
    assert np.mean([e.se for e in a]) == pytest.approx(spread, rel=0.1)
    assert 0.92 <= covered(a, law_a.distance) <= 0.98
    # Without the bias no interval of this width has the truth in it.
    half = 1.96 * spread
    assert np.mean(np.abs(values - law_a.distance) < half) < 0.1

    paired = [difference(x, y) for x, y in zip(a, b, strict=True)]
    gaps = np.array([e.corrected for e in paired])
    assert np.mean([e.se for e in paired]) == pytest.approx(gaps.std(ddof=1), rel=0.1)
    assert 0.92 <= covered(paired, law_a.distance - law_b.distance) <= 0.98
    # Shared noise cancels: independent sets would be several times as far apart.
    assert gaps.std(ddof=1) < 0.25 * np.hypot(spread, np.std([e.value for e in b]))


def test_near_the_reference_the_standard_error_is_an_upper_bound() -> None:
    """Where the second order, which is the bias's too, is as large as the first."""
    g = np.random.default_rng(1)
    law = Law(0.0, 0.5, 2.0)
    found = [frechet(law.draw(g.normal(size=(N, D))), law.reference) for _ in range(100)]
    spread = np.std([e.value for e in found], ddof=1)  # known to 7%
    assert 1.1 * spread < np.mean([e.se for e in found]) < 1.6 * spread
    assert law.distance == 0 and covered(found, 0.0) >= 0.95


@pytest.mark.long
def test_coverage_over_many_sets() -> None:
    """The same with 4,000 sets, where the share is known to 0.35%."""
    a, b, law_a, law_b = simulate(4000)
    values = [e.value for e in a]
    assert np.mean([e.se for e in a]) == pytest.approx(np.std(values), rel=0.05)
    assert 0.93 <= covered(a, law_a.distance) <= 0.97
    paired = [difference(x, y) for x, y in zip(a, b, strict=True)]
    assert 0.92 <= covered(paired, law_a.distance - law_b.distance) <= 0.98


@pytest.mark.parametrize("spectrum", ["identity", "power law"])
def test_bias_of_equal_laws(spectrum: str) -> None:
    values = np.ones(24) if spectrum == "identity" else np.arange(1, 25.0) ** -1.0
    g = np.random.default_rng(3)
    exact = Gaussian(torch.zeros(24).double(), torch.from_numpy(np.diag(values)))
    n = 24 * 20
    found = [frechet(g.normal(size=(n, 24)) * np.sqrt(values), exact).value for _ in range(100)]
    expected = frechet_bias(values, values.sum(), n)
    assert np.mean(found) == pytest.approx(expected, rel=0.06)
    if spectrum == "identity":
        assert expected == pytest.approx(24 * 29 / (4 * n), rel=1e-12)
    assert frechet_bias(np.append(values, 0.0), values.sum(), n) == pytest.approx(expected)


def test_other_metrics_standard_errors_are_the_spread_of_many_sets() -> None:
    g = np.random.default_rng(5)
    reference = g.normal(size=(300, 8))
    sets = [1.3 * g.normal(size=(300, 8)) + 0.2 for _ in range(150)]
    for metric in (lambda x: kid(x, reference), lambda x: inception_score(x, 150)):
        found = [metric(each) for each in sets]
        spread = np.std([e.value for e in found], ddof=1)
        assert np.mean([e.se for e in found]) == pytest.approx(spread, rel=0.2)


def test_what_classes_contribute() -> None:
    """A class of which every sample is displaced stands out; small classes are left out."""
    g = np.random.default_rng(6)
    labels = np.arange(1200) % 4
    labels[:8] = 9
    x = g.normal(size=(1200, 8)) * np.sqrt(np.linspace(0.5, 2, 8))
    x[labels == 2] += 1.5
    exact = Gaussian(torch.zeros(8).double(), torch.from_numpy(np.diag(np.linspace(0.5, 2, 8))))
    found = class_contributions(frechet(x, exact), labels)
    assert list(found) == [0, 1, 2, 3] and max(found, key=lambda c: found[c]) == 2
    assert found[2] > 0 > max(found[0], found[1], found[3])
    with pytest.raises(ValueError, match="1,200"):
        class_contributions(frechet(x, exact), labels[:5])


def test_a_difference_needs_one_size() -> None:
    with pytest.raises(ValueError, match="4 and 5 samples"):
        difference(Estimate(1.0, 4, np.zeros(4)), Estimate(1.0, 5, np.zeros(5)))


def test_record_is_plain_numbers() -> None:
    record = Estimate(2.0, 4, np.array([-1.0, 1, -1, 1]), bias=0.5).to_record()
    se = np.std([-1, 1, -1, 1], ddof=1) / 2
    assert record["se"] == pytest.approx(se)
    assert (record["low"] + record["high"]) / 2 == pytest.approx(1.5)
    assert record["high"] - record["low"] == pytest.approx(2 * 1.96 * se, rel=1e-4)
