"""What a demo found: the content of its report.json, checked, and its numbers as table cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from mixflow_fast.reports.html import number

Metric = Literal["frechet", "frechet_random_conv", "frechet_effnet_lite0"]
Method = Literal["slowed", "mixed", "both"]
METRICS: dict[Metric, str] = {
    "frechet": "Fréchet distance, averaged pixels",
    "frechet_random_conv": "Fréchet distance, random convolutional features",
    "frechet_effnet_lite0": "FD-EffLite0, features of an ImageNet network",
}


class Cell(TypedDict):
    """One distance of one seed: its value, its bias at this number of samples, standard error."""

    value: float
    bias: float
    se: float


class Spread(TypedDict, total=False):
    """A number of several seeds: mean and sample standard deviation, and what they are of."""

    mean: float
    std: float
    values: list[float]


# A number of one seed, or of several.
Number = float | Spread


# By the number of sampling steps, as text: JSON has no other keys.
Distances = Mapping[str, Number]


class Pictures(TypedDict):
    """Paths of PNGs: many small pictures, and a row of large ones."""

    grid: str
    strip: str


class SourceResult(TypedDict):
    """What is measured of an arm where the noise end may be learned.

    Keys:
        curvature: of its paths, mean over trajectories.
        curvature_se: the standard error that so few trajectories leave in one seed's number.
        solvers: distances by metric and name of a solver.
        rk45_nfe: network evaluations that an adaptive solver took.
        health: of the distribution that training drew the noise end from, by name.
    """

    curvature: Number
    curvature_se: float
    solvers: Mapping[Metric, Distances]
    rk45_nfe: Number
    health: Mapping[str, Number]


class ToyArm(TypedDict):
    """One way to train on two-dimensional points.

    Keys:
        curvature: of its paths.
        sliced: sliced 2-Wasserstein distance of its samples to fresh points, by Euler steps.
        mse: velocity loss at the end of training.
        sigma: mean standard deviation of the source, unmixed.
        aggregate: the same distance between its training's noise ends and N(0, I).
        paths: of the first seed, each a list of (x, y) from noise to sample.
    """

    label: str
    curvature: Number
    sliced: Distances
    mse: Number
    sigma: Number
    aggregate: Number
    paths: Sequence[Sequence[Sequence[float]]]


class Toy(TypedDict):
    """The method where it can be looked at.

    Keys:
        floor: the sliced distance of two draws of points.
        points: some of the points.
    """

    seeds: Sequence[int]
    steps: Sequence[int]
    arms: Mapping[str, ToyArm]
    floor: Number
    points: Sequence[Sequence[float]]


class ArmResult(TypedDict, total=False):
    """One arm; label and distances must be there.

    Keys:
        label: its name for people.
        gamma, timesteps, interval: its distribution of times; the base model has none.
        weights_of: the arm whose weights it samples; None: it is trained.
        remedies: what its samples are corrected by, in words, by number of sampling steps.
        folded: shown only where someone asks.
        distances: to real crops, by metric and number of sampling steps.
        corrected: the same without the bias of so many samples; "std" is the standard error.
        pictures: of its samples, by number of sampling steps.
        facts: how it is trained and sampled, in words, where times alone do not say it.
        source: what is measured where the noise end may be learned.
    """

    label: str
    gamma: float | None
    timesteps: str | None
    interval: str
    weights_of: str | None
    remedies: dict[str, str]
    folded: bool
    distances: Mapping[Metric, Distances]
    corrected: Mapping[Metric, Distances]
    pictures: Mapping[str, Pictures]
    facts: Sequence[str]
    source: SourceResult


class DemoResult(TypedDict, total=False):
    """All that the report shows; the keys up to `notes` must be there.

    Keys:
        seconds: training and evaluation of every arm.
        steps: Euler steps of the sampler.
        metrics: which distances were measured, in the order of print.
        floor: by metric, the distance of two sets of real crops.
        references: by name and metric, distances of what no network made.
        losses: by trained arm, pairs of images seen and training loss.
        environment: versions and machine.
        real: pictures of real crops.
        seed: the first of the seeds.
        command: how to run it again.
        compare: the command that compares these models in detail.
        images_caption: how the pictures were sampled.
        about: what was trained.
        method: of the demo; without one it is slowed interpolation alone.
        solver_nfe: network evaluations of the solvers beside Euler, by name.
        toy: the same method on two-dimensional points.
    """

    title: str
    seeds: Sequence[int]
    seconds: float
    steps: Sequence[int]
    metrics: Sequence[Metric]
    arms: Mapping[str, ArmResult]
    floor: Mapping[Metric, float]
    references: Mapping[str, Mapping[Metric, float]]
    losses: Mapping[str, Sequence[Sequence[float]]]
    config: Mapping[str, object]
    environment: Mapping[str, object]
    notes: Sequence[str]
    real: Pictures | None
    seed: int
    command: str
    compare: str | None
    images_caption: str
    about: str
    method: Method
    solver_nfe: Mapping[str, int]
    toy: Toy | None


_NEEDED = (
    *("title", "seeds", "seconds", "steps", "metrics", "arms", "floor", "losses", "config"),
    *("environment", "notes"),
)


def check_result(result: DemoResult) -> None:
    """ValueError where something is missing that the report cannot do without."""
    missing = [key for key in _NEEDED if key not in result]
    if missing:
        raise ValueError(f"result lacks {', '.join(missing)}")
    if not (result["arms"] and result["steps"] and result["seeds"] and result["metrics"]):
        raise ValueError("result needs at least one arm, metric, entry of steps and seed")
    for name, arm in result["arms"].items():
        lacking = [key for key in ("label", "distances") if key not in arm]
        lacking = lacking or [key for key in result["metrics"] if key not in arm["distances"]]
        if lacking:
            raise ValueError(f"result['arms'][{name!r}] lacks {lacking[0]!r}")


def main_arms(result: DemoResult) -> dict[str, ArmResult]:
    """The arms that are shown first."""
    return {name: arm for name, arm in result["arms"].items() if not arm.get("folded")}


def folded_arms(result: DemoResult) -> dict[str, ArmResult]:
    """The arms of a sweep."""
    return {name: arm for name, arm in result["arms"].items() if arm.get("folded")}


def cell_value(arm: ArmResult, metric: Metric, steps: int) -> tuple[float, float | None] | None:
    """(mean, standard deviation or None) of one cell; None where it was not measured."""
    return value_at(arm["distances"][metric], steps)


def value_at(distances: Distances, steps: int) -> tuple[float, float | None] | None:
    """The same, of the distances of one arm and metric."""
    # A result that has not been through JSON may have numbers as keys.
    cell = {str(key): value for key, value in distances.items()}.get(str(steps))
    return None if cell is None else mean_and_spread(cell)


def mean_and_spread(value: Number) -> tuple[float, float | None]:
    """(mean, standard deviation; None of one seed)."""
    if isinstance(value, dict):
        return float(value["mean"]), float(value["std"])
    return float(value), None


def number_text(value: Number) -> str:
    """A number as a table cell."""
    return cell_text(mean_and_spread(value))


def values_of(arm: ArmResult, metric: Metric, steps: int) -> list[float]:
    """The number of each seed."""
    cell = {str(key): value for key, value in arm["distances"][metric].items()}.get(str(steps))
    if cell is None:
        return []
    return list(cell.get("values", [])) if isinstance(cell, dict) else [float(cell)]


def cell_text(value: tuple[float, float | None] | None) -> str:
    """A table cell; a spread has two significant digits, and its mean as many decimals."""
    if value is None:
        return "–"
    mean, std = value
    if std is None:
        return number(mean)
    if not (math.isfinite(mean) and math.isfinite(std) and 1e-6 < std < 100):
        return f"{number(mean)} ± {number(std)}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def best_arms(result: DemoResult, metric: Metric, steps: int) -> set[str]:
    """The arms whose printed mean is the lowest finite one of a column."""
    means = {}
    for name, arm in result["arms"].items():
        value = cell_value(arm, metric, steps)
        if value is not None and math.isfinite(value[0]):
            # As printed: two cells that read the same are both bold.
            means[name] = float(number(value[0]))
    return {name for name, mean in means.items() if mean == min(means.values())}


def describe_seeds(result: DemoResult) -> str:
    """How far the numbers can be trusted."""
    count = len(result["seeds"])
    if count == 1:
        return "one seed: the spread between seeds is not known"
    return (
        f"mean ± standard deviation over {count} seeds; "
        "a gap smaller than the spread is no evidence"
    )
