"""Numbers from features against torch-fidelity's, closed forms and sums over all pairs."""

import numpy as np
import pytest
import torch

from mixflow_fast.evaluation.frechet import frechet_distance, moments
from mixflow_fast.evaluation.metrics import (
    Gaussian,
    frechet,
    frechet_infinity,
    inception_score,
    kid,
)
from tests.support.golden import load
from tests.support.torch_fidelity_golden import features


@pytest.fixture(scope="module")
def recorded() -> dict[str, float]:
    tensors, _ = load("torch_fidelity")
    return {name: float(value) for name, value in tensors.items() if value.ndim == 0}


A, B = features(1).numpy(), features(2).numpy()


def test_frechet_distance_is_torch_fidelity_s(recorded: dict[str, float]) -> None:
    found = frechet(A, Gaussian.of(B))
    assert found.value == pytest.approx(recorded["fid"], rel=1e-9)
    m, c = moments(torch.from_numpy(A))
    reference = Gaussian.of(B)
    assert found.value == pytest.approx(
        frechet_distance(m, c, reference.mean, reference.cov), rel=1e-12
    )
    assert found.mean_term + found.cov_term == pytest.approx(found.value, rel=1e-12)
    shift = A.astype(np.float64).mean(0) - B.astype(np.float64).mean(0)
    assert found.mean_term == pytest.approx((shift**2).sum(), rel=1e-12)
    assert (found.n, found.dim, found.rank) == (200, 24, 24)
    assert 0 < found.lowest < 1


def test_influence_is_the_derivative_in_the_weight_of_a_sample() -> None:
    """Against the distance of weighted moments, by central differences; ddof 0 on both sides."""
    rows = A[:60].astype(np.float64)
    reference = Gaussian.of(B)
    found = frechet(A[:60], reference)

    def distance(weights: np.ndarray) -> float:
        weights = weights / weights.sum()
        mean = weights @ rows
        cov = (rows - mean).T @ ((rows - mean) * weights[:, None])
        # The sample covariance at equal weights, as `frechet` has it.
        cov = torch.from_numpy(cov * 60 / 59)
        return frechet_distance(torch.from_numpy(mean), cov, reference.mean, reference.cov)

    for sample in (0, 17, 59):
        step = np.zeros(60)
        step[sample] = 1e-4
        slope = (distance(1 + step) - distance(1 - step)) / 2e-4
        # A weight of 1 is 1/n of the set; z z^T against a covariance of ddof 1: n / (n - 1).
        assert 60 * slope == pytest.approx(found.influence[sample], rel=0.03, abs=0.15)
    assert abs(found.influence.mean()) < 1e-9


def test_few_samples_in_many_dimensions_keep_the_value() -> None:
    """A pseudo-inverse where the covariance lacks rank; the value is the existing function's."""
    with pytest.warns(UserWarning, match="no full rank"):
        found = frechet(A[:10], Gaussian.of(B))
        expected = frechet_distance(
            *moments(torch.from_numpy(A[:10])), *moments(torch.from_numpy(B))
        )
    assert found.rank == 9 and np.isfinite(found.influence).all()
    assert found.value == pytest.approx(expected, rel=1e-9)
    broken = Gaussian(torch.full((24,), torch.nan).double(), torch.eye(24).double())
    with pytest.raises(ValueError, match="moments must be finite"):
        frechet(A, broken)


def test_extrapolation_removes_the_bias() -> None:
    """The same law twice: the truth is 0, a line in 1/n comes near it, 2,000 samples do not."""
    x = np.random.default_rng(0).normal(size=(2000, 16))
    exact = Gaussian(torch.zeros(16).double(), torch.eye(16).double())
    plain = frechet(x, exact)
    assert plain.value == pytest.approx(16 * 21 / 8000, rel=0.25)
    assert abs(frechet_infinity(x, exact)) < 0.3 * plain.value
    with pytest.raises(ValueError, match="at least 20"):
        frechet_infinity(x[:5], exact)


def test_inception_score_is_torch_fidelity_s(recorded: dict[str, float]) -> None:
    found = inception_score(A, split=100)
    assert found.value == pytest.approx(recorded["is"], rel=1e-12)
    assert found.sd_splits == pytest.approx(recorded["is_sd"], rel=1e-9)
    assert found.splits == 2


def test_inception_score_of_known_predictions() -> None:
    """One sure class an image: the number of classes; all alike: 1. A short split counts."""
    sure = 1000 * np.eye(10, dtype=np.float32)[np.arange(200) % 10]
    assert inception_score(sure).value == pytest.approx(10, rel=1e-12)
    assert inception_score(np.ones((50, 7))).value == pytest.approx(1, rel=1e-12)
    assert inception_score(A, split=150).splits == 2
    with pytest.raises(ValueError, match="finite"):
        inception_score(np.full((4, 3), np.nan))


def test_kid_is_torch_fidelity_s_and_a_sum_over_pairs(recorded: dict[str, float]) -> None:
    assert kid(A, B).value == pytest.approx(recorded["kid"], rel=1e-9)
    x, y = A[:7].astype(np.float64), B[:5].astype(np.float64)
    k = lambda u, v: (u @ v / 24 + 1) ** 3  # noqa: E731
    pairs = [k(x[i], x[j]) for i in range(7) for j in range(7) if i != j]
    others = [k(y[i], y[j]) for i in range(5) for j in range(5) if i != j]
    across = [k(u, v) for u in x for v in y]
    expected = np.mean(pairs) + np.mean(others) - 2 * np.mean(across)
    assert kid(A[:7], B[:5]).value == pytest.approx(expected, rel=1e-12)


def test_kid_has_no_bias() -> None:
    """Means over sets of 20 and of 200 samples agree; those of the Frechet distance do not."""
    g = np.random.default_rng(1)
    reference = g.normal(size=(400, 6))
    sets = [g.normal(size=(200, 6)) * 1.2 for _ in range(40)]
    small = [kid(s[i : i + 20], reference).value for s in sets for i in range(0, 200, 20)]
    large = [kid(s, reference).value for s in sets]
    error = np.std(small) / len(small) ** 0.5 + np.std(large) / len(large) ** 0.5
    assert abs(np.mean(small) - np.mean(large)) < 2 * error
    assert np.mean(large) > 4 * np.std(large) / len(large) ** 0.5


@pytest.mark.parametrize("metric", [kid, lambda a, b: frechet(a, Gaussian.of(b))])
def test_features_of_different_extractors_are_refused(metric) -> None:
    with pytest.raises(ValueError, match="must be"):
        metric(A, B[:, :10])
