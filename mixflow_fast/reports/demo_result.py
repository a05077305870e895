"""What a demo found: the content of its report.json, checked, and its numbers as table cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

from mixflow_fast.reports.html import number

Metric = Literal["frechet", "frechet_random_conv"]
METRICS: dict[Metric, str] = {
    "frechet": "Fréchet distance, averaged pixels",
    "frechet_random_conv": "Fréchet distance, random convolutional features",
}


class Spread(TypedDict, total=False):
    """A number of several seeds: mean and sample standard deviation, and what they are of."""

    mean: float
    std: float
    values: list[float]


# By the number of sampling steps, as text: JSON has no other keys.
Distances = Mapping[str, float | Spread]


class ArmResult(TypedDict, total=False):
    """One arm.

    Keys:
        label: its name for people.
        gamma, timesteps, interval: its distribution of times; the base model has none.
        frechet, frechet_random_conv: distance to real crops by number of sampling steps.
        images: path of a PNG of its samples.
    """

    label: str
    gamma: float | None
    timesteps: str | None
    interval: str
    frechet: Distances
    frechet_random_conv: Distances
    images: str | None


class DemoResult(TypedDict, total=False):
    """All that the report shows; the keys up to `notes` must be there.

    Keys:
        seconds: training and evaluation of every arm.
        steps: Euler steps of the sampler.
        floor: by metric, the distance of two sets of real crops.
        losses: by arm, pairs of images seen and training loss.
        real_grid: path of a PNG of real crops.
        environment: versions and machine.
        seed: the first of the seeds.
        command: how to run it again.
        images_caption: how the pictures were sampled.
        about: what was trained.
    """

    title: str
    seeds: Sequence[int]
    seconds: float
    steps: Sequence[int]
    arms: Mapping[str, ArmResult]
    floor: Mapping[Metric, float]
    losses: Mapping[str, Sequence[Sequence[float]]]
    real_grid: str | None
    config: Mapping[str, object]
    environment: Mapping[str, object]
    notes: Sequence[str]
    seed: int
    command: str
    images_caption: str
    about: str


def check_result(result: DemoResult) -> None:
    """ValueError where something is missing that the report cannot do without."""
    needed = ("title", "seeds", "seconds", "steps", "arms", "floor", "losses", "config")
    missing = [key for key in (*needed, "environment", "notes") if key not in result]
    if missing:
        raise ValueError(f"result lacks {', '.join(missing)}")
    if not result["arms"] or not result["steps"] or not result["seeds"]:
        raise ValueError("result needs at least one arm, one entry of steps and one seed")
    for name, arm in result["arms"].items():
        for key in ("label", *METRICS):
            if key not in arm:
                raise ValueError(f"result['arms'][{name!r}] lacks {key!r}")


def cell_value(arm: ArmResult, metric: Metric, steps: int) -> tuple[float, float | None] | None:
    """(mean, standard deviation or None) of one cell; None where it was not measured."""
    # A result that has not been through JSON may have numbers as keys.
    cell = {str(key): value for key, value in arm[metric].items()}.get(str(steps))
    if cell is None:
        return None
    if isinstance(cell, dict):
        return float(cell["mean"]), float(cell["std"])
    return float(cell), None


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
