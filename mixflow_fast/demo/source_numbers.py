"""What is measured of an arm where the noise end may be learned, beside distances by Euler steps.

Curvature of its paths, distances by Heun's method, evaluations of an adaptive solver, and how far
what training drew the noise end from is from N(0, I), which every arm is sampled from.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mixflow_fast.data import Dataset, build_dataset, sample_index
from mixflow_fast.demo.aggregate import aggregate_of
from mixflow_fast.demo.measure import Measure
from mixflow_fast.demo.plan import SourceNumbers
from mixflow_fast.evaluation.curvature import network_curvature
from mixflow_fast.models import Transformer, load_model
from mixflow_fast.models.weights.sources import load_source
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.objective.source_health import source_health
from mixflow_fast.reports.demo_result import Cell, Metric
from mixflow_fast.sampling import PreparedSampling, Sampler, sample
from mixflow_fast.sampling.guidance import Guidance

# Intervals of Heun's method with a last Euler step, which costs 2 N - 1 evaluations.
HEUN = {"Heun, 2 steps": 2, "Heun, 3 steps": 3, "Heun, 5 steps": 5}
RK45_SAMPLES = 64  # one batch: error control spans it, and the count hardly depends on its size
HEALTH_IMAGES = 2000
_BATCH = 100


def source_numbers(
    weights: Path,
    measure: Measure,
    *,
    seed: int,
    samples: int,
    trajectories: int,
    curvature_steps: int,
    quiet: bool = True,
) -> SourceNumbers:
    """Everything above, of a finished training.

    Args:
        weights: of the training.
        measure: distances to photos of its size; FD-EffLite0 is left to the Euler steps, for it
            costs as much as the samples.
        seed: of the samples.
        samples: for each distance.
        trajectories, curvature_steps: of the curvature.
    """
    model = load_model(weights).eval()
    prepared = PreparedSampling(
        model, Sampler("euler"), Guidance(), batch_size=min(_BATCH, trajectories)
    )
    curvature = network_curvature(prepared, trajectories, seed=seed, steps=curvature_steps)
    solvers: dict[Metric, dict[str, Cell]] = {}
    for name, steps in HEUN.items():
        drawn = sample(
            model,
            num=samples,
            steps=steps,
            method="heun_last_euler",
            seed=seed,
            balanced=True,
            batch_size=min(250, samples),
            progress=not quiet,
        )
        for metric, cell in measure(drawn.x, without=("frechet_effnet_lite0",)).items():
            solvers.setdefault(metric, {})[name] = cell
    few = min(RK45_SAMPLES, samples)
    adaptive = sample(model, num=few, method="rk45", seed=seed, balanced=True, batch_size=few)
    dataset = build_dataset("photos", size=measure.size, split="train")
    return {
        "curvature": curvature.mean,
        "curvature_se": curvature.se,
        "solvers": solvers,
        "rk45_nfe": adaptive.nfe,
        "health": _health(weights, model, dataset),
    }


def _health(weights: Path, model: Transformer, dataset: Dataset) -> dict[str, float]:
    """Of training crops through the averaged predictor; nothing where the source is N(0, I)."""
    stored = load_source(weights)
    if stored is None:
        return {}
    index = sample_index(torch.arange(min(HEALTH_IMAGES, len(dataset))), len(dataset), seed=0)
    batch = dataset.get(index, index, 0)
    mix = MixFlow(gamma=0.0, timesteps="uniform", clock=model.clock, seed=0, source=stored.source)
    with torch.no_grad():
        health = source_health(mix.prepare(batch.x, ids=index, y=batch.y))
    aggregate = aggregate_of(weights, dataset)
    assert aggregate is not None  # the source is there
    found = {name: float(value) for name, value in health.items()}
    found["largest_variance"] = aggregate.largest_variance
    found["w2_per_dim"] = aggregate.w2_per_dim
    return found
