"""A pilot: short post-training runs from one checkpoint that differ in gamma alone, compared.

Each arm trains on the same examples and noise, with the Beta(2,1) label of the method, and samples
from the same noise and labels. Arms that are done are kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mixflow_fast.checkpoints.resume import FREE
from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.evaluation.examples import Examples
from mixflow_fast.evaluation.gamma import choose_gamma
from mixflow_fast.evaluation.metrics import Gaussian, frechet, kid
from mixflow_fast.evaluation.slow_flow import STATES_PER_FEATURE
from mixflow_fast.evaluation.slowed_times import LinearFeatures
from mixflow_fast.files import remove_partial, write_json
from mixflow_fast.models import load_model
from mixflow_fast.reports.slow_flow_report import PilotTable
from mixflow_fast.sampling.samples import sample
from mixflow_fast.training.build import check
from mixflow_fast.training.trainer import train

SHARE = 0.05  # of the planned training, in each arm


@dataclass(frozen=True)
class PilotPlan:
    """What a pilot does.

    Attributes:
        gammas: of the arms.
        images: training images of each arm.
        steps: intervals of the sampler, on the objective's shifted grid; method: its solver.
        samples: generated images of each arm.
        batch_size: of the sampler.
    """

    gammas: tuple[float, ...]
    images: int
    steps: int
    method: str = "euler"
    samples: int = 2000
    batch_size: int = 250

    def __post_init__(self) -> None:
        for name in ("images", "steps", "samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")


def arm_config(config: Config, checkpoint: Path, gamma: float, images: int, out: Path) -> Config:
    """The configuration of one arm: that of the run, from the checkpoint, with this gamma."""
    batch = config.train.global_batch_size
    return config.replace(
        **{
            "out": str(out),
            "train.init": str(checkpoint),
            "train.seed": config.train.seed + 1,  # other examples and noise than the run's own
            "train.images": max(1, images // batch) * batch,
            "objective.gamma": gamma,
            "objective.timesteps": "beta21",
            "objective.interval": "shifted",
        }
    )


def run_pilot(
    config: Config,
    checkpoint: Path,
    plan: PilotPlan,
    data: Examples,
    out: Path,
    log: Callable[[str], None] = lambda _: None,
    quiet: bool = False,
    weights_sha256: str | None = None,
) -> PilotTable:
    """Train, sample and compare the arms.

    Args:
        config: of the training that is planned; gamma and number of images are the plan's.
        checkpoint: weights that every arm starts from.
        plan: arms and sizes.
        data: real examples, which the samples are compared with.
        out: folder of the arms, each in gamma_G; what is done there is kept.
        log: gets a line on each arm.
        quiet: no progress.
        weights_sha256: of the weights that the arms start from, by which a folder of arms knows
            them wherever their file is; None: it knows them by their path.

    Raises:
        ValueError: what the configuration or the sampler refuses; a folder of another pilot, or
            arms of another configuration.
        KeyboardInterrupt: a signal ended a training, with a checkpoint.
    """
    known = {} if weights_sha256 is None else {"weights_sha256": weights_sha256}
    claim(out, known or {"checkpoint": str(checkpoint.resolve())}, plan)
    configs = {
        gamma: arm_config(config, checkpoint, gamma, plan.images, out / f"gamma_{gamma:g}")
        for gamma in plan.gammas
    }
    for arm in configs.values():
        check(arm)
    features = LinearFeatures(data.x.shape[1:], plan.samples // STATES_PER_FEATURE)
    real = features(data.x).numpy()
    reference = Gaussian.of(real)
    # Kernels are of all pairs; the examples may be in the order of their classes.
    some = real[data.spread(min(len(real), 4 * plan.samples)).numpy()]
    scores, kernels = {}, {}
    for number, (gamma, arm) in enumerate(configs.items(), 1):
        log(f"pilot, arm {number} of {len(configs)}: gamma {gamma:g}")
        done = Path(arm.out) / "features.npy"
        if not done.exists():
            if not train(arm, quiet=quiet).finished:
                raise KeyboardInterrupt("the same command goes on with the arms that are left")
            _sample(done, plan, config.objective.shift, features, quiet)
        # Where the weights are known, where they lie does not matter.
        _check_same_arm(flatten(arm.to_dict()), done.parent, {"train.init"} if known else set())
        found = np.load(done)
        scores[gamma] = frechet(found, reference)
        kernel = kid(found, some)
        kernels[gamma] = (kernel.value, kernel.se)
    return PilotTable(
        steps=plan.steps,
        method=plan.method,
        images=next(iter(configs.values())).train.images,
        samples=plan.samples,
        choice=choose_gamma(scores),
        kid=kernels,
        features=f"{features.dim} linear features",
        updates=next(iter(configs.values())).train.images // config.train.global_batch_size,
    )


def _check_same_arm(settings: Mapping[str, object], arm: Path, free: set[str]) -> None:
    """Refuse an arm that is done and was trained otherwise; training refuses one that is not."""
    old = flatten(load_config(str(arm / "config.yaml")).to_dict())
    names = sorted(n for n in settings.keys() - FREE - free if old.get(n) != settings[n])
    if names:
        listed = ", ".join(f"{n}: {old.get(n)!r} -> {settings[n]!r}" for n in names[:5])
        raise ValueError(
            f"{arm} is an arm of another configuration ({listed}): choose another --out, or delete "
            f"{arm.parent}"
        )


def _sample(
    done: Path, plan: PilotPlan, shift: float, features: LinearFeatures, quiet: bool
) -> None:
    """Write features (n, d) of an arm's samples beside its weights, whole or not at all."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    drawn = sample(
        load_model(done.parent / "weights.pt").to(device),
        num=plan.samples,
        steps=plan.steps,
        method=plan.method,
        shift=shift,
        balanced=True,
        batch_size=min(plan.batch_size, plan.samples),
        progress=not quiet,
    )
    partial = done.with_name(f".{done.name}")
    np.save(partial, features(drawn.x).numpy())
    partial.replace(done)


def claim(out: Path, weights: Mapping[str, str], plan: PilotPlan) -> None:
    """Take the folder; arms of another checkpoint or of other sizes must not be mixed with ours."""
    mark = out / "pilot.json"
    remove_partial(out)
    size = {"images": plan.images, "steps": plan.steps, "samples": plan.samples}
    ours = {**weights, "method": plan.method, **size}
    if mark.exists():
        if (there := json.loads(mark.read_text())) != ours:
            raise ValueError(
                f"{out} holds a pilot of {there}, not of {ours}: choose another --out, or delete it"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no pilot: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, ours)


def planned_images(config: Config) -> int:
    """Training images of each arm: SHARE of the planned ones."""
    return int(SHARE * config.train.images)


def check_arms(config: Config, checkpoint: Path, gammas: Sequence[float], out: Path) -> None:
    """Refuse before anything is measured what the arms could not be trained with."""
    for gamma in gammas:
        check(arm_config(config, checkpoint, gamma, planned_images(config), out))
