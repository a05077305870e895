"""How far a number of a sample set may be off: standard errors, bias, paired differences.

Every metric comes with its influence function: what each sample adds to the number, to first order.
The standard error is the spread of the influences over sqrt(n), and two sets of the same noise and
labels are compared sample by sample, which cancels what they share.

Intervals cover the drawing of samples and nothing else: the reference and the trained weights are
taken as given. They are not made by bootstrap. A resample of n samples has fewer distinct ones, so
it repeats the bias that n has: percentile intervals of a Frechet distance covered the truth in 7.5%
of the cases instead of 95% (32 dimensions, 600 samples, 200 sets), and basic intervals of recall
covered its expectation in 2% (4 dimensions, 400 samples, 60 sets).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_NORMAL_95 = 1.959964  # 97.5% of a standard normal


@dataclass(frozen=True)
class Estimate:
    """A number from n samples, and what is known of its error.

    Attributes:
        value: the number as it is published, biased where it is biased.
        n: samples that it was computed from.
        bias: its expectation minus the truth, to first order in 1/n.
        influence: (n,) float64, what each sample adds to `value`, times n; its mean is 0.
    """

    value: float
    n: int
    influence: np.ndarray
    bias: float = 0.0

    @property
    def corrected(self) -> float:
        """The value without its bias."""
        return self.value - self.bias

    @property
    def se(self) -> float:
        """Standard error of the value."""
        return float(self.influence.std(ddof=1)) / math.sqrt(self.n)

    def interval(self) -> tuple[float, float]:
        """95% interval of the corrected value."""
        half = _NORMAL_95 * self.se
        return self.corrected - half, self.corrected + half

    def to_record(self) -> dict[str, float | int]:
        """Plain numbers for a row of `metrics.jsonl`."""
        low, high = self.interval()
        record = {"value": self.value, "bias": self.bias, "se": self.se, "low": low, "high": high}
        return {**record, "n": self.n}


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two sets in which sample i has the same id, hence the same noise and label.

    Both against the same reference; its error and most of the bias cancel.

    Raises:
        ValueError: different n.
    """
    if a.n != b.n:
        raise ValueError(
            f"a difference needs sets of one size, got {a.n:,} and {b.n:,} samples: take the same "
            "ids of both"
        )
    return Estimate(a.value - b.value, a.n, a.influence - b.influence, a.bias - b.bias)


def class_contributions(
    estimate: Estimate, labels: np.ndarray, minimum: int = 50
) -> dict[int, float]:
    """Mean influence of each class that has at least `minimum` samples.

    Above zero: the class makes the number larger than the others do.

    Args:
        estimate: of any metric.
        labels: (n,) integers.

    Raises:
        ValueError: another number of labels.
    """
    if len(labels) != estimate.n:
        raise ValueError(
            f"labels must be one for each of {estimate.n:,} samples, got {len(labels):,}"
        )
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(place, weights=estimate.influence) / counts
    found = zip(classes, means, counts, strict=True)
    return {int(label): float(mean) for label, mean, count in found if count >= minimum}


def frechet_bias(singular_values: np.ndarray, trace: float, n: int) -> float:
    """What n samples add to a Frechet distance on average, against an exact reference.

        tr C / n + (sum_ij s_i s_j / (s_i + s_j) + sum_i s_i / 2) / 2n

    s are the singular values of C^1/2 R^1/2 for the samples' covariance C and the reference's R,
    the eigenvalues of C where the two are the same (then d (d + 5) / 4n for the identity). It is
    the expectation of the second-order term of the distance for Gaussian features, where mean and
    covariance are independent and the covariance is Wishart. A reference of finite size adds its
    own.

    Args:
        singular_values: s, (d,). trace: of C. n: samples.
    """
    s = singular_values[singular_values > 0]
    sums = s[:, None] + s[None, :]
    spread = float((s[:, None] * s[None, :] / sums).sum()) + float(s.sum()) / 2
    return trace / n + spread / (2 * n)
