"""The toy of mixed sources as the demo's page shows it: numbers over seeds, paths of the first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mixflow_fast.demo.measure import over_seeds
from mixflow_fast.demo.toy import (
    FORWARD_COUPLING,
    MIXED,
    RECTIFIED_FLOW,
    STEP_COUNTS,
    ToyArm,
    ToyModel,
    ToySettings,
    measure_toy,
    sliced_w2,
    start_points,
    toy_data,
    toy_paths,
    train_toy,
)
from mixflow_fast.files import write_json
from mixflow_fast.reports.demo_result import Toy
from mixflow_fast.reports.demo_result import ToyArm as ToyArmResult

PATHS = 40
POINTS = 300
_PATH_STEPS, _KEPT = 128, 8  # Euler steps of a path, and every how many of its states are kept


def mixed(lam: float) -> ToyArm:
    """MixFlow with this weight of the KL."""
    return replace(MIXED, name=f"MixFlow, lambda {lam:g}", lam=lam)


def coupled(lam: float) -> ToyArm:
    """kappa-FC alone (w = 1) with this weight of the KL."""
    return replace(FORWARD_COUPLING, name=f"kappa-FC, lambda {lam:g}", lam=lam)


# At one lambda, and kappa-FC where it bends as MixFlow does.
ARMS = {"rf": RECTIFIED_FLOW, "fc": coupled(0.3), "mix": mixed(0.3), "fc_tuned": coupled(3.0)}


def toy_of(path: Path, seed: int, steps: int) -> Toy:
    """The demo's toy, trained now or kept in a file from an earlier demo.

    Args:
        path: the file.
        steps: of each training.
    """
    plan = {"seed": seed, "steps": steps, "arms": {k: asdict(arm) for k, arm in ARMS.items()}}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["plan"] == plan:
            return kept["toy"]
    toy = toy_results(ARMS, ToySettings(steps=steps), [seed])
    write_json(path, {"plan": plan, "toy": toy})
    return toy


def toy_results(
    arms: Mapping[str, ToyArm],
    settings: ToySettings,
    seeds: Sequence[int],
) -> Toy:
    """Train every arm with every seed, and measure."""
    found: dict[str, ToyArmResult] = {}
    for name, arm in arms.items():
        paths: list[list[list[float]]] = []
        results = []
        for seed in seeds:
            model = train_toy(arm, settings, seed)
            results.append(measure_toy(model))
            if not paths:
                paths = _paths(model)
        found[name] = {
            "label": arm.name,
            "curvature": over_seeds([result.curvature for result in results]),
            "sliced": {
                str(steps): over_seeds([result.sw[steps] for result in results])
                for steps in STEP_COUNTS
            },
            "mse": over_seeds([result.mse for result in results]),
            "sigma": over_seeds([result.sigma for result in results]),
            "aggregate": over_seeds([result.aggregate for result in results]),
            "paths": paths,
        }
    points, _ = toy_data(settings.data, POINTS, torch.Generator().manual_seed(0))
    return {
        "seeds": list(seeds),
        "steps": list(STEP_COUNTS),
        "arms": found,
        "floor": over_seeds([floor_of(settings, seed) for seed in seeds]),
        "points": _rounded(points),
    }


def _paths(model: ToyModel) -> list[list[list[float]]]:
    x0 = start_points(model, PATHS, 30_000)
    states = toy_paths(model, x0, _PATH_STEPS)[::_KEPT]
    return [_rounded(path) for path in states.transpose(0, 1)]


def floor_of(settings: ToySettings, seed: int) -> float:
    """Two draws of the data, as many as the samples, against each other."""
    g = torch.Generator().manual_seed(40_000 + seed)
    one, other = (toy_data(settings.data, settings.samples, g)[0] for _ in range(2))
    return sliced_w2(one, other, settings.projections)


def _rounded(points: torch.Tensor) -> list[list[float]]:
    """(n, 2) for a file that is read by people, too."""
    return [[round(value, 3) for value in point] for point in points.tolist()]
