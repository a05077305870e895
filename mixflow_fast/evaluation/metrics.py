"""The published numbers from features: Frechet distance, Inception Score, KID; all in float64.

Features come as (N, d) arrays in the order of the samples' ids. What each extractor's features are
for is in `features/`, and precision and recall are in `precision_recall.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.evaluation.frechet import frechet_distance, moments, symmetric_roots
from mixflow_fast.evaluation.uncertainty import Estimate, frechet_bias

SPLIT = 5000  # images of one Inception Score
_CHUNK = 4096  # rows in one product
_TINY = torch.finfo(torch.float64).tiny  # below the smallest share that counts


@dataclass(frozen=True)
class Gaussian:
    """What a Frechet distance knows of a set.

    Attributes:
        mean: (d,) float64.
        cov: (d, d) float64.
        n: samples it was estimated from; None: not known.
    """

    mean: Tensor
    cov: Tensor
    n: int | None = None

    @classmethod
    def of(cls, features: np.ndarray) -> Gaussian:
        """Mean and unbiased covariance of features (N, d)."""
        mean, cov = moments(torch.from_numpy(np.asarray(features)))
        return cls(mean, cov, len(features))


@dataclass(frozen=True)
class FrechetEstimate(Estimate):
    """A Frechet distance, beside what `Estimate` has.

    Attributes:
        mean_term, cov_term: the parts of the value.
        dim, rank: features, and how many dimensions the samples' covariance spans.
        lowest: the most negative eigenvalue of the two covariances, over the largest of its own.
        infinity: the value at infinitely many samples by extrapolation, if it was asked for.
    """

    mean_term: float = 0.0
    cov_term: float = 0.0
    dim: int = 0
    rank: int = 0
    lowest: float = 0.0
    infinity: float | None = None

    def to_record(self) -> dict[str, float | int]:
        """Plain numbers for a row of `metrics.jsonl`."""
        own = {"mean_term": self.mean_term, "cov_term": self.cov_term, "dim": self.dim}
        own |= {"rank": self.rank, "lowest_eigenvalue": self.lowest}
        own |= {} if self.infinity is None else {"inf": self.infinity}
        return {**super().to_record(), **own}


def frechet(features: np.ndarray, reference: Gaussian) -> FrechetEstimate:
    """Frechet distance of features (N, d) to a reference, with the influence of each sample.

        influence(x) = 2 z.(m1 - m2) + z^T (I - T) z, centred, for z = x - m1
        T = C1^-1/2 (C1^1/2 C2 C1^1/2)^1/2 C1^-1/2

    T carries N(m1, C1) to N(m2, C2); C1^-1/2 is the pseudo-inverse's. The reference is taken as
    exact: neither the standard error nor the bias has a part for it. The standard error is right
    where the distance is well above its bias, and too large near zero (by 35% for equal laws).

    Raises:
        ValueError: features that are not (N, d) of the reference's d, N < 2, NaN, infinity, moments
            that are none.
    """
    dim = len(reference.mean)
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(
            f"features must be (N, {dim}), as the reference's are, got {features.shape}: both must "
            "be of the same extractor"
        )
    if not (reference.mean.isfinite().all() and reference.cov.isfinite().all()):
        raise ValueError("the reference's moments must be finite, got NaN or infinity")
    own = Gaussian.of(features)
    mine, other = symmetric_roots(own.cov), symmetric_roots(reference.cov)
    left, singular, _ = torch.linalg.svd(mine.root @ other.root)
    # A A^T = C1^1/2 C2 C1^1/2 for A = C1^1/2 C2^1/2, so the left vectors are its eigenvectors.
    transport = mine.inverse @ (left * singular) @ left.T @ mine.inverse
    shift, curve = own.mean - reference.mean, torch.eye(dim, dtype=torch.float64) - transport
    parts = []
    for rows in np.array_split(features, -(-len(features) // _CHUNK)):
        z = torch.from_numpy(rows).double() - own.mean
        parts.append(2 * z @ shift + ((z @ curve) * z).sum(dim=1))
    influence = torch.cat(parts)
    mean_term = float(shift.square().sum())
    trace = float(own.cov.trace())
    cov_term = trace + float(reference.cov.trace()) - 2 * float(singular.sum())
    return FrechetEstimate(
        value=max(mean_term + cov_term, 0.0),
        n=len(features),
        bias=frechet_bias(singular.numpy(), trace, len(features)),
        influence=(influence - influence.mean()).numpy(),
        mean_term=mean_term,
        cov_term=cov_term,
        dim=dim,
        rank=mine.rank,
        lowest=min(mine.lowest, other.lowest),
    )


def frechet_infinity(
    features: np.ndarray, reference: Gaussian, sizes: int = 15, seed: int = 0
) -> float:
    """The distance at infinitely many samples: the intercept of a line in 1/n.

    Chong and Forsyth (CVPR 2020, arXiv 1911.07023), on random subsets of n/10 to n samples.

    Args:
        features: (N, d).
        reference: as `frechet`.
        sizes: how many subsets, of evenly spaced sizes.
        seed: of the subsets.

    Raises:
        ValueError: fewer than 20 samples.
    """
    count = len(features)
    if count < 20:
        raise ValueError(f"the extrapolation needs at least 20 samples, got {count}")
    generator = np.random.Generator(np.random.Philox(seed))
    found = []
    numbers = np.unique(np.linspace(count / 10, count, sizes).round().astype(int))
    for number in numbers:
        chosen = np.sort(generator.permutation(count)[:number])
        own = Gaussian.of(features[chosen])
        found.append(frechet_distance(own.mean, own.cov, reference.mean, reference.cov))
    return float(np.polyfit(1 / numbers, found, 1)[1])


@dataclass(frozen=True)
class InceptionScore(Estimate):
    """An Inception Score, beside what `Estimate` has.

    Attributes:
        sd_splits: standard deviation over the splits (ddof 0, as published).
        splits: how many.
    """

    sd_splits: float = 0.0
    splits: int = 1

    def to_record(self) -> dict[str, float | int]:
        """Plain numbers for a row of `metrics.jsonl`."""
        return {**super().to_record(), "sd_splits": self.sd_splits, "splits": self.splits}


def inception_score(logits: np.ndarray, split: int = SPLIT) -> InceptionScore:
    """exp of the mean divergence of p(class | image) from its mean, averaged over splits.

    Splits are `split` consecutive images, the last one may be shorter (ADM's evaluator). The value
    grows with the split's size; the influences are those of the score at this size.

    Args:
        logits: (N, classes), without the bias of the last layer.

    Raises:
        ValueError: not (N, classes) with N >= 2, or not finite.
    """
    if logits.ndim != 2 or len(logits) < 2:
        raise ValueError(f"logits must be (N, classes) with N >= 2, got {logits.shape}")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite, got NaN or infinity")
    values, influences = [], []
    splits = -(-len(logits) // split)
    for start in range(0, len(logits), split):
        log_p = torch.from_numpy(logits[start : start + split]).double().log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).clamp_min(_TINY).log())).sum(dim=1)
        score = divergence.mean().exp()
        values.append(float(score))
        weight = len(logits) / (splits * len(p))
        influences.append((weight * score * (divergence - divergence.mean())).numpy())
    return InceptionScore(
        value=float(np.mean(values)),
        n=len(logits),
        influence=np.concatenate(influences),
        sd_splits=float(np.std(values)),
        splits=splits,
    )


def kid(
    features: np.ndarray, reference: np.ndarray, device: str | torch.device = "cpu"
) -> Estimate:
    """Kernel Inception distance with (x.y / d + 1)^3: the U-statistic over all pairs.

    Its expectation does not depend on n (Binkowski et al., ICLR 2018), so it is the number to quote
    for small sets. The influence of a sample is that of a U-statistic, 2 (its mean kernel with the
    others - with the reference), centred; where the two laws are nearly the same, it is too small.

    Args:
        features: (N, d). reference: (M, d). device: where the products are.

    Raises:
        ValueError: other shapes, or fewer than two rows.
    """
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features and reference must be (N, d) and (M, d), got {features.shape} and "
            f"{reference.shape}"
        )
    n, m = len(features), len(reference)
    if min(n, m) < 2:
        raise ValueError(f"KID needs two samples and two of the reference, got {n} and {m}")
    within = _kernel_sums(features, features, device) - _kernel(features)
    across = _kernel_sums(features, reference, device) / m
    others = _kernel_sums(reference, reference, device) - _kernel(reference)
    within /= n - 1
    influence = 2 * (within - across)
    return Estimate(
        value=float(within.mean() + others.sum() / (m * (m - 1)) - 2 * across.mean()),
        n=n,
        influence=influence - influence.mean(),
    )


def _kernel(x: np.ndarray) -> np.ndarray:
    """k(x_i, x_i), (N,)."""
    return ((x.astype(np.float64) ** 2).sum(axis=1) / x.shape[1] + 1) ** 3


def _kernel_sums(x: np.ndarray, y: np.ndarray, device: str | torch.device) -> np.ndarray:
    """sum_j k(x_i, y_j), (N,) float64, block by block."""
    sums = torch.zeros(len(x), dtype=torch.float64, device=device)
    for j in range(0, len(y), _CHUNK):
        right = torch.from_numpy(np.array(y[j : j + _CHUNK])).to(device, torch.float64)
        for i in range(0, len(x), _CHUNK):
            left = torch.from_numpy(np.array(x[i : i + _CHUNK])).to(device, torch.float64)
            sums[i : i + _CHUNK] += (left @ right.T / x.shape[1] + 1).pow(3).sum(dim=1)
    return sums.cpu().numpy()
