"""Two sets of one protocol, sample by sample: who is better, in which classes, in which samples.

Sample i of both has the same noise and the same label, so what they share cancels in differences of
influences (`uncertainty.py`). Intervals cover the drawing of samples, not of trainings.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from mixflow_fast.evaluation.uncertainty import Estimate, difference

Verdict = Literal["better", "worse", "cannot tell", "identical weights", "not judged"]

# Of the others a lower number is better.
HIGHER_IS_BETTER = frozenset({"is", "precision", "recall"})
# What a comparison is decided by: the first that is there.
PRIMARY = (
    "fid",
    "fd_dinov2",
    "fd_effnet_lite0",
    "fd_effnet_lite0_p128",
    "kid",
    "fd_pooled_pixels",
    "fd_random_conv",
)
MINIMUM = 50  # samples of a class that is shown
_DRAWS, _SEED = 2000, 0


def primary_metric(names: Iterable[str], aside: Iterable[str] = ()) -> str:
    """The number that decides; of names outside PRIMARY the first.

    Args:
        names: what there is, at least one.
        aside: what decides only where nothing else is there.
    """
    there = list(names)
    wanted = [name for name in PRIMARY if name in there and name not in set(aside)]
    return next(iter([*wanted, *(name for name in PRIMARY if name in there), *there]))


@dataclass(frozen=True)
class Paired:
    """A number of one set against that of another.

    Attributes:
        metric: its name.
        value: a - b as published, with their biases.
        corrected: a - b without them.
        low, high: 95% interval of `corrected`; None where the sets are no pairs.
        verdict: about a.
    """

    metric: str
    value: float
    corrected: float
    low: float | None
    high: float | None
    verdict: Verdict

    def to_record(self) -> dict[str, float | str | None]:
        """Plain values for a JSON file."""
        return asdict(self)


def paired(
    metric: str, a: Estimate, b: Estimate, *, pairs: bool = True, identical: bool = False
) -> Paired:
    """Whether a is better than b, by the 95% interval of the paired difference.

    Args:
        metric: what both are estimates of.
        a, b: of sets whose samples have the same ids.
        pairs: False where the two sets came about in different ways: then nothing is judged.
        identical: both were made by the same weights in the same way.

    Raises:
        ValueError: pairs of different sizes.
    """
    value, corrected = a.value - b.value, a.corrected - b.corrected
    if not pairs:
        return Paired(metric, value, corrected, None, None, "not judged")
    low, high = difference(a, b).interval()
    if identical:
        return Paired(metric, value, corrected, low, high, "identical weights")
    verdict: Verdict = "cannot tell"
    if low > 0 or high < 0:
        verdict = "better" if (high < 0) != (metric in HIGHER_IS_BETTER) else "worse"
    return Paired(metric, value, corrected, low, high, verdict)


@dataclass(frozen=True)
class ClassStrip:
    """How differently the classes changed, sorted, beside what chance alone would give.

    A class's value is the mean of influence_a - influence_b over its samples: what the class adds
    to the difference a - b beyond the average sample. 0: as the average. The values of the null are
    of as many classes of the same sizes that do not differ.

    Attributes:
        classes, counts, values: labels, their samples, their values, sorted by value.
        null_low, null_high: 95% of sorted null strips at each place.
        expected_lowest, expected_highest: mean ends of null strips.
        omitted: classes with fewer than `minimum` samples.
        minimum: of samples.
    """

    classes: list[int]
    counts: list[int]
    values: list[float]
    null_low: list[float]
    null_high: list[float]
    expected_lowest: float
    expected_highest: float
    omitted: int
    minimum: int

    def to_record(self) -> dict[str, object]:
        """Plain values for a JSON file."""
        return asdict(self)


def class_strip(
    a: Estimate, b: Estimate, labels: np.ndarray, minimum: int = MINIMUM
) -> ClassStrip | None:
    """Differences of all classes with enough samples; None where fewer than two have.

    Args:
        a, b: of paired sets.
        labels: (n,) integers.
        minimum: samples of a class.

    Raises:
        ValueError: sets or labels of different sizes.
    """
    apart = difference(a, b).influence
    if len(labels) != len(apart):
        raise ValueError(
            f"labels must be one for each of {len(apart):,} samples, got {len(labels):,}"
        )
    classes, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    kept = np.flatnonzero(counts >= minimum)
    if len(kept) < 2:
        return None
    means = np.bincount(place, weights=apart) / counts
    within = np.sqrt(((apart - means[place]) ** 2).sum() / max(1, len(apart) - len(classes)))
    order = kept[np.argsort(means[kept], kind="stable")]
    # Classes that do not differ: means of as many samples each, around their common mean.
    sizes = counts[kept]
    noise = np.random.Generator(np.random.Philox(_SEED)).standard_normal((_DRAWS, len(kept)))
    null = within * noise / np.sqrt(sizes)
    null -= (null * sizes).sum(axis=1, keepdims=True) / sizes.sum()
    null.sort(axis=1)
    low, high = np.quantile(null, (0.025, 0.975), axis=0)
    return ClassStrip(
        classes=[int(label) for label in classes[order]],
        counts=[int(count) for count in counts[order]],
        values=[float(value) for value in means[order]],
        null_low=[float(value) for value in low],
        null_high=[float(value) for value in high],
        expected_lowest=float(null[:, 0].mean()),
        expected_highest=float(null[:, -1].mean()),
        omitted=len(classes) - len(kept),
        minimum=minimum,
    )


def most_different(a: Estimate, b: Estimate, count: int) -> list[int]:
    """The samples of largest |influence_a - influence_b|, the largest first; ties by number."""
    apart = np.abs(difference(a, b).influence)
    return [int(place) for place in np.argsort(-apart, kind="stable")[:count]]
