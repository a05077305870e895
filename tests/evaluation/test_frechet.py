"""The Frechet distance against closed forms and SciPy; the feature maps against NumPy and SciPy."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.frechet import (
    FEATURES,
    frechet_distance,
    moments,
    pooled_pixels,
    random_conv_features,
)
from mixflow_fast.kernels.philox import Stream, normal, uniform


def gaussian(seed: int, dim: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    rows = normal(seed, Stream.NOISE, torch.arange(dim), (rank or 2 * dim) + 1).double()
    return rows[:, 0], rows[:, 1:] @ rows[:, 1:].T / (rank or 2 * dim)


def test_moments() -> None:
    features = normal(0, Stream.NOISE, torch.arange(40), 5)
    mean, cov = moments(features)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, features.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features.double().numpy().T), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dim", [1, 3, 40])
def test_scipy(dim: int) -> None:
    linalg = pytest.importorskip("scipy.linalg")
    (m1, c1), (m2, c2) = gaussian(1, dim), gaussian(2, dim)
    root = linalg.sqrtm(c1.numpy() @ c2.numpy())
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * root.trace().real
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)


def test_commuting_covariances() -> None:
    """With common eigenvectors: |m1 - m2|^2 + sum (sqrt a - sqrt b)^2, also when some are zero."""
    basis, _ = torch.linalg.qr(gaussian(3, 6)[1])
    a = torch.tensor([4.0, 1.0, 9.0, 0.0, 0.0, 1e-3], dtype=torch.float64)
    b = torch.tensor([1.0, 1.0, 16.0, 25.0, 0.0, 1e-3], dtype=torch.float64)
    m1, m2 = torch.zeros(6), torch.tensor([3.0, 0, 0, 0, 0, 0])
    c1, c2 = (basis * a) @ basis.T, (basis * b) @ basis.T
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(9 + 1 + 0 + 1 + 25, rel=1e-9)
    # Diagonal, and one dimension: (m1 - m2)^2 + (s1 - s2)^2.
    assert frechet_distance(m1, a.diag(), m2, b.diag()) == pytest.approx(36, rel=1e-12)
    one = [torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[4.0]], [3.0], [[25.0]])]
    assert frechet_distance(*one) == pytest.approx(4 + 9, rel=1e-12)


@pytest.mark.parametrize("rank", [None, 3])
def test_invariances(rank: int | None) -> None:
    (m1, c1), (m2, c2) = gaussian(4, 12, rank), gaussian(5, 12, rank)
    value = frechet_distance(m1, c1, m2, c2)
    assert value > 1
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(value, rel=1e-9)
    assert 0 <= frechet_distance(m1, c1, m1, c1) < 1e-12 * float(c1.trace())
    shift, (rotation, _) = gaussian(6, 12)[0], torch.linalg.qr(gaussian(7, 12)[1])
    moved = [rotation @ m1 + shift, rotation @ c1 @ rotation.T]
    moved += [rotation @ m2 + shift, rotation @ c2 @ rotation.T]
    assert frechet_distance(*moved) == pytest.approx(value, rel=1e-9)
    scaled = frechet_distance(3 * m1, 9 * c1, 3 * m2, 9 * c2)
    assert scaled == pytest.approx(9 * value, rel=1e-9)


def test_estimate_converges() -> None:
    """Two samples of N(0, I) and N(m, 4 I) in 3 dimensions: |m|^2 + 3."""
    first = normal(8, Stream.NOISE, torch.arange(20000), 3)
    second = 2 * normal(9, Stream.NOISE, torch.arange(20000), 3) + torch.tensor([1.0, 0.0, -1.0])
    value = frechet_distance(*moments(first), *moments(second))
    assert value == pytest.approx(5.0, abs=0.2)


def test_warns_when_samples_are_few() -> None:
    features = normal(0, Stream.NOISE, torch.arange(8), 8)
    with pytest.warns(UserWarning, match="8 samples in 8 dimensions"):
        moments(features)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moments(features[:, :7])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            moments(features)
    assert len(caught) == 1


def test_errors() -> None:
    mean, cov = gaussian(1, 3)
    with pytest.raises(ValueError, match="c2 must have shape"):
        frechet_distance(mean, cov, mean, cov[:2])
    with pytest.raises(ValueError, match="m1 must have shape"):
        frechet_distance(mean[None], cov, mean, cov)
    with pytest.raises(ValueError, match="m2 must be finite"):
        frechet_distance(mean, cov, mean / 0, cov)
    with pytest.raises(ValueError, match="covariance"):
        frechet_distance(mean, -cov, mean, cov)
    for bad in (torch.zeros(5), torch.zeros(1, 5), torch.full((4, 2), math.inf)):
        with pytest.raises(ValueError, match="features must be"):
            moments(bad)
    with pytest.raises(ValueError, match="size must divide"):
        pooled_pixels(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ValueError, match="multiple of 4"):
        random_conv_features(torch.zeros(1, 3, 8, 8), dim=6)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        random_conv_features(torch.zeros(1, 3, 3, 8))
    for feature in FEATURES.values():
        with pytest.raises(ValueError, match="x must be"):
            feature(torch.zeros(3, 8, 8))


def images(count: int, channels: int = 3, size: int = 16) -> Tensor:
    flat = uniform(1, Stream.NOISE, torch.arange(count), channels * size * size)
    return flat.view(count, channels, size, size) * 2 - 1


def test_pooled_pixels() -> None:
    x = images(3)
    out = pooled_pixels(x)
    assert out.dtype == torch.float64 and out.shape == (3, 3 * 64)
    blocks = x.double().numpy().reshape(3, 3, 8, 2, 8, 2).mean(axis=(3, 5)).reshape(3, -1)
    np.testing.assert_allclose(out, blocks, rtol=0, atol=1e-15)
    np.testing.assert_allclose(pooled_pixels(x, 16), x.flatten(1).double(), rtol=0, atol=0)


@pytest.mark.parametrize("size", [16, 9])
def test_random_conv(size: int) -> None:
    """The documented network, again with SciPy's correlation in float64."""
    signal = pytest.importorskip("scipy.signal")
    x = images(2, size=size)
    out = random_conv_features(x)
    assert out.dtype == torch.float64 and out.shape == (2, 128)
    for image, features in zip(x.double().numpy(), out.numpy(), strict=True):
        maps = image
        for layer, (fan_in, fan_out, stride) in enumerate([(3, 32, 1), (32, 64, 2), (64, 64, 2)]):
            draws = normal(0, Stream.INIT, torch.tensor([layer]), fan_out * fan_in * 9)
            weight = draws.double().numpy().reshape(fan_out, fan_in, 3, 3)
            weight = weight * np.sqrt(2 / (9 * fan_in))
            full = [
                sum(signal.correlate2d(maps[i], weight[o, i], mode="same") for i in range(fan_in))
                for o in range(fan_out)
            ]
            maps = np.maximum(np.stack(full), 0)[:, ::stride, ::stride]
        expected = np.concatenate([maps.mean((1, 2)), maps.std((1, 2))])
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_random_conv_is_fixed_and_separates() -> None:
    x = images(600, size=8)
    out = random_conv_features(x)
    np.testing.assert_allclose(random_conv_features(x[590:]), out[590:], rtol=0, atol=1e-6)
    assert (random_conv_features(x[:4], seed=1) - out[:4]).norm() > 1
    assert random_conv_features(x[:2], dim=64).shape == (2, 64)
    # The same pixels in another order within a 2 x 2 block: pooled pixels cannot see it.
    smooth = x[:300, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    rough = smooth + torch.tensor([[0.5, -0.5], [-0.5, 0.5]]).repeat(4, 4)
    for name, seen in (("pooled_pixels", False), ("random_conv", True)):
        feature = FEATURES[name] if name == "random_conv" else lambda v: pooled_pixels(v, 4)
        distance = frechet_distance(*moments(feature(smooth)), *moments(feature(rough)))
        spread = float(moments(feature(smooth))[1].trace())
        assert (distance > 0.05 * spread) == seen
