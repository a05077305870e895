"""Precision and recall against torch-fidelity's, brute force and simulation."""

import numpy as np
import pytest

from mixflow_fast.evaluation import precision_recall as module
from mixflow_fast.evaluation.precision_recall import precision_recall
from tests.support.golden import load
from tests.support.torch_fidelity_golden import features

A, B = features(1).numpy(), features(2).numpy()


def brute_force(x: np.ndarray, y: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which samples are near the reference, and (M, N) which samples reach which of it."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    distance = lambda u, v: np.sqrt(((u[:, None] - v) ** 2).sum(-1))  # noqa: E731
    # The k-th nearest other point is number k from 0: number 0 is the point itself.
    mine = np.sort(distance(x, x))[:, k]
    theirs = np.sort(distance(y, y))[:, k]
    across = distance(y, x)
    return (across <= theirs[:, None]).any(0), across <= mine


def test_they_are_torch_fidelity_s() -> None:
    recorded, _ = load("torch_fidelity")
    found = precision_recall(A, B)
    assert found.precision.value == pytest.approx(float(recorded["precision"]), abs=1e-6)
    assert found.recall.value == pytest.approx(float(recorded["recall"]), abs=1e-6)


@pytest.mark.parametrize("block", [4096, 64])
@pytest.mark.parametrize("k", [1, 3])
def test_brute_force(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks are; far from the origin too, where float32 loses the digits."""
    monkeypatch.setattr(module, "_BLOCK", block)
    precise, near = brute_force(A, B[:150], k)
    for offset in (0, 100):
        found = precision_recall(A + offset, B[:150] + offset, k)
        assert found.precision.value == pytest.approx(precise.mean(), abs=1e-12)
        assert found.recall.value == pytest.approx(near.any(1).mean(), abs=1e-12)
        np.testing.assert_allclose(found.precision.influence, precise - precise.mean(), atol=1e-12)
        alone = (near & (near.sum(1) == 1)[:, None]).sum(0) / 150
        np.testing.assert_allclose(
            found.recall.influence, 199 * (alone - alone.mean()), rtol=1e-9, atol=1e-12
        )


def test_standard_errors() -> None:
    """Of precision the binomial's; of recall the spread of many sets, or more."""
    g = np.random.default_rng(1)
    reference = g.normal(size=(300, 16))
    found = [precision_recall(0.9 * g.normal(size=(400, 16)) + 0.1, reference) for _ in range(100)]
    for precision, _ in found:
        p = precision.value
        assert precision.se == pytest.approx((p * (1 - p) / 399) ** 0.5)
    recalls = [recall for _, recall in found]
    spread = np.std([e.value for e in recalls], ddof=1)  # known to 7%
    assert 0.85 * spread < np.mean([e.se for e in recalls]) < 1.4 * spread


def test_errors() -> None:
    with pytest.raises(ValueError, match="more than 3 rows"):
        precision_recall(A[:3], B)
    with pytest.raises(ValueError, match="finite"):
        precision_recall(A * np.inf, B)
