"""The demo's second method: sources that are learned, alone and with slowed interpolation on top.

From random weights, arms that differ in nothing but the source of the noise end train equally long
on the same examples: N(0, I) (rectified flow), the learned source alone (kappa-FC, Fast-ODE) and
mixed with N(0, I) (MixFlow). All are sampled from N(0, I), for kappa is the image, and those with a
learned source also from a Gaussian with the moments of their training's noise ends. For "both" the
source is then frozen, and the network trains on with slowed interpolation and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data import build_dataset
from mixflow_fast.demo.aggregate import aggregate_of, gaussian_of_images
from mixflow_fast.demo.measure import Measure, measure_notes, over_seeds
from mixflow_fast.demo.mixed_toy import toy_of
from mixflow_fast.demo.plan import Beginning, Finished, Plan, SourceNumbers, Words
from mixflow_fast.demo.source_numbers import HEUN, source_numbers
from mixflow_fast.environment import is_installed
from mixflow_fast.optim.lr_schedule import LrSchedule
from mixflow_fast.reports.demo_result import ArmResult, DemoResult, Metric, SourceResult
from mixflow_fast.reports.mixed_report import render_mixed_report
from mixflow_fast.sampling import sampling_noise
from mixflow_fast.training.build import check

MixedMethod = Literal["mixed", "both"]
SWEEP = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # lambdas


@dataclass(frozen=True)
class MixedArm:
    """A source to train with.

    Attributes:
        label: for people.
        w: weight of the learned source, as `source.w`; None: N(0, I) alone.
        lam: weight of the KL per dimension.
        after: the arm that this one goes on from, its source frozen; None: from random weights.
        gamma, timesteps: distribution of the two times.
        folded: of the sweep, hence folded away in the report.
        weights_of: the arm whose weights this one samples from a Gaussian with the moments of that
            arm's noise ends; None: it is trained, and sampled from N(0, I).
    """

    label: str
    w: str | float | None = None
    lam: float | None = None
    after: str | None = None
    gamma: float = 0.0
    timesteps: str = "uniform"
    folded: bool = False
    weights_of: str | None = None


@dataclass(frozen=True)
class MixedSettings:
    """Sizes of a demo of learned sources, chosen on seeds other than the published ones."""

    data: str = "photos"
    size: int = 16
    lam: float = 0.1  # of MixFlow, and of the kappa-FC that is held against it
    fc_lam: float = 3.0  # of the kappa-FC at its own best; docs/evidence says by which measure
    base_images: int = 38_400
    base_lr: float = 1e-3
    schedule: LrSchedule = "cosine"
    ema_decay: float = 0.99
    widths: tuple[int, ...] = (16, 32, 32)  # of the predictor: half the recipe's, twice as fast
    groups: int = 8
    gamma: float = 0.15  # of slowed interpolation on top
    post_images: int = 19_200
    post_lr: float = 5e-4
    samples: int = 500
    steps: tuple[int, ...] = (2, 4, 8, 16)
    picture_steps: tuple[int, ...] = (2, 4)  # few, where the arms differ most
    trajectories: int = 100  # for the curvature
    curvature_steps: int = 128  # Euler steps of each
    toy_steps: int = 2000


CHOSEN_ON = (110,)
MIXED = MixedSettings()


class MixedPlan(Plan):
    """Rectified flow, kappa-FC and MixFlow; or the two ends of that, each with slowing on top.

    Args:
        settings: sizes and lambdas.
        method: "mixed" or "both".
        sweep: add both learned sources at every lambda of SWEEP; for "mixed" alone.

    Raises:
        ValueError: a sweep of "both".
    """

    def __init__(
        self, settings: MixedSettings, method: MixedMethod = "mixed", sweep: bool = False
    ) -> None:
        if sweep and method == "both":
            raise ValueError("the method both has no sweep: run --method mixed --sweep")
        self._settings = settings
        self.method = method
        self.arms = mixed_arms(settings, sweep) if method == "mixed" else both_arms(settings)

    @property
    def settings(self) -> MixedSettings:
        return self._settings

    def config(self, name: str, seed: int, folder: Path) -> Config:
        name = self.arms[name].weights_of or name
        settings, arm = self.settings, self.arms[name]
        start = arm if arm.after is None else self.arms[arm.after]
        config = load_config(
            "photos-mixed",
            [
                f"out={folder / name}",
                f"data.size={settings.size}",
                f"model.input_size={settings.size}",
                f"model.init_seed={seed}",
                f"train.seed={2 * seed}",
                f"train.images={settings.base_images}",
                f"optim.lr={settings.base_lr}",
                f"optim.schedule={settings.schedule}",
                f"optim.ema_decays=[{settings.ema_decay}]",
                *_source(start, settings),
            ],
        )
        if arm.after is None:
            return config
        changes: dict[str, object] = {
            "train.init": str(folder / arm.after / "weights.pt"),
            # Odd after training: other examples and noise than before.
            "train.seed": 2 * seed + 1,
            "train.images": settings.post_images,
            "optim.lr": settings.post_lr,
            "objective.gamma": arm.gamma,
            "objective.timesteps": arm.timesteps,
        }
        if start.w is not None:
            changes["source.frozen"] = True
        return config.replace(**changes)

    def check(self, out: Path) -> None:
        settings = self.settings
        if settings.data != "photos":
            raise ValueError(f"learned sources are shown on photos, got data={settings.data!r}")
        if settings.samples < 2:
            raise ValueError(f"samples must be >= 2, got {settings.samples}")
        if not set(settings.picture_steps) <= set(settings.steps):
            raise ValueError(
                f"picture_steps must be of some of steps = {settings.steps}, got "
                f"{settings.picture_steps}"
            )
        for name in self.arms:
            check(self.config(name, 0, out / "seed_0"))
        if not is_installed("matplotlib"):
            raise ValueError('the report needs matplotlib: pip install "mixflow_fast[eval]"')

    def begin(self, name: str, weights: Path) -> Beginning | None:
        if self.arms[name].weights_of is None:
            return None
        dataset = build_dataset(self.settings.data, size=self.settings.size, split="train")
        aggregate = aggregate_of(weights, dataset)
        assert aggregate is not None  # such arms are of learned sources
        return aggregate.begin

    def source_numbers(
        self, weights: Path, seed: int, measure: Measure, quiet: bool
    ) -> SourceNumbers:
        s = self.settings
        return source_numbers(
            weights,
            measure,
            seed=seed,
            samples=s.samples,
            trajectories=s.trajectories,
            curvature_steps=s.curvature_steps,
            quiet=quiet,
        )

    def arm_result(self, name: str, runs: Sequence[Finished]) -> ArmResult:
        arm = self.arms[name]
        result: ArmResult = {
            "label": arm.label,
            "gamma": arm.gamma,
            "timesteps": arm.timesteps,
            "folded": arm.folded,
            "weights_of": arm.weights_of,
            "facts": facts(arm, self.settings),
        }
        if arm.weights_of is None:
            result["source"] = _over_seeds([run.evaluation["source"] for run in runs])
        return result

    def more_findings(self, out: Path, seeds: Sequence[int], measure: Measure) -> DemoResult:
        return {
            "references": {"a Gaussian of the crops, no network": self._gaussian(measure)},
            "solver_nfe": {name: 2 * steps - 1 for name, steps in HEUN.items()},
            "toy": toy_of(out / "toy.json", seeds[0], self.settings.toy_steps),
        }

    def _gaussian(self, measure: Measure) -> dict[Metric, float]:
        """Distances of draws from a Gaussian with the moments of the training crops."""
        s = self.settings
        ids = torch.arange(s.samples)
        dataset = build_dataset(s.data, size=s.size, split="train")
        eps = sampling_noise(None, 0, ids, dataset.shape)
        drawn = gaussian_of_images(dataset).begin(eps, ids % dataset.num_classes)
        return {metric: cell["value"] for metric, cell in measure(drawn).items()}

    def words(self, seeds: Sequence[int], measure: Measure) -> Words:
        s = self.settings
        notes = measure_notes(s.data, s.size, s.samples)
        notes.append(choice_note(s, seeds))
        notes.append(
            f"Curvature: mean over {s.trajectories} trajectories of {s.curvature_steps} Euler "
            "steps (the paper: 10,000), the same noise for every arm."
        )
        notes.append(
            "A Gaussian with the moments of the training crops has the moments that the distance "
            "of averaged pixels asks for, without a network; arms with their own Gaussian begin "
            "with a part of them. The other two measures are not satisfied by moments."
        )
        if len(seeds) > 1:
            notes.append("Spread: sample standard deviation over the seeds.")
        steps = -(-s.base_images // 64)
        about = (
            f"A small SiT (4 layers, width 96) was trained from random weights on {s.size}x"
            f"{s.size} crops of the two photographs that come with scikit-learn, {steps:,} steps "
            "of 64 crops, in each of the ways below, with the same crops in the same order."
        )
        both = "Mixed sources and slowed interpolation on photo crops"
        title = both if self.method == "both" else "Mixed sources (MixFlow) on photo crops"
        return Words(title, about, notes)

    def render(self, result: DemoResult, path: Path) -> None:
        render_mixed_report(result, path)


def _over_seeds(found: Sequence[SourceNumbers]) -> SourceResult:
    """The numbers of one arm over the seeds."""
    first = found[0]
    return {
        "curvature": over_seeds([one["curvature"] for one in found]),
        # The root mean square of the seeds'.
        "curvature_se": (sum(one["curvature_se"] ** 2 for one in found) / len(found)) ** 0.5,
        "solvers": {
            metric: {
                solver: over_seeds([one["solvers"][metric][solver]["value"] for one in found])
                for solver in cells
            }
            for metric, cells in first["solvers"].items()
        },
        "rk45_nfe": over_seeds([float(one["rk45_nfe"]) for one in found]),
        "health": {
            key: over_seeds([one["health"][key] for one in found]) for key in first["health"]
        },
    }


def mixed_arms(settings: MixedSettings, sweep: bool = False) -> dict[str, MixedArm]:
    """Rectified flow, MixFlow and kappa-FC at one lambda, and kappa-FC at its own.

    The sweep adds both learned sources at every other lambda of SWEEP and at these two.
    """
    lam, own = settings.lam, settings.fc_lam
    arms = {
        "rf": MixedArm("rectified flow"),
        "mix": _mix(lam),
        "mix_own": _own("mix", _mix(lam)),
        "fc": _fc(lam),
        "fc_own": _own("fc", _fc(lam)),
    }
    if own != lam:
        arms["fc_tuned"] = _fc(own)
        arms["fc_tuned_own"] = _own("fc_tuned", _fc(own))
    if sweep:
        for each in sorted({*SWEEP, lam, own}):
            if each != lam:
                arms[f"mix_{each:g}"] = _mix(each, folded=True)
            if each not in (lam, own):
                arms[f"fc_{each:g}"] = _fc(each, folded=True)
    return arms


def both_arms(settings: MixedSettings) -> dict[str, MixedArm]:
    """Rectified flow and MixFlow, and each trained on with slowed interpolation and without."""
    g, mix = settings.gamma, _mix(settings.lam)
    plain = MixedArm("MixFlow, continued", after="mix")
    slowed = MixedArm("MixFlow, slowed", after="mix", gamma=g, timesteps="beta21")
    return {
        "rf": MixedArm("rectified flow"),
        "rf_plain": MixedArm("rectified flow, continued", after="rf"),
        "rf_slowed": MixedArm("rectified flow, slowed", after="rf", gamma=g, timesteps="beta21"),
        "mix": mix,
        "mix_own": _own("mix", mix),
        "mix_plain": plain,
        "mix_plain_own": _own("mix_plain", plain),
        "mix_slowed": slowed,
        "mix_slowed_own": _own("mix_slowed", slowed),
    }


def _mix(lam: float, folded: bool = False) -> MixedArm:
    return MixedArm(f"MixFlow, lambda {lam:g}", "uniform", lam, folded=folded)


def _fc(lam: float, folded: bool = False) -> MixedArm:
    return MixedArm(f"kappa-FC, lambda {lam:g}", 1.0, lam, folded=folded)


def _own(name: str, arm: MixedArm) -> MixedArm:
    """The same weights, sampled from a Gaussian with the moments of that training's noise ends."""
    return replace(arm, label=f"{arm.label}, own Gaussian", weights_of=name)


def _source(arm: MixedArm, settings: MixedSettings) -> list[str]:
    """Overrides of the recipe that make an arm's source."""
    if arm.w is None:
        return ["source={kind: standard}"]
    return [
        f"source.w={arm.w}",
        f"source.lam={arm.lam}",
        f"source.widths={list(settings.widths)}",
        f"source.groups={settings.groups}",
    ]


def facts(arm: MixedArm, settings: MixedSettings) -> list[str]:
    """How an arm is trained and sampled, in words."""
    if arm.weights_of is not None:
        return [
            "the same weights, nothing trained",
            "sampled from a Gaussian with the mean and covariance, of each class, of all noise "
            "ends of its training: what N(0, I) only stands for",
        ]
    if arm.after is not None:
        times = (
            f"slowed: label t ~ Beta(2, 1), input at m ~ U[(1 - {arm.gamma:g}) t, t]"
            if arm.gamma
            else "t uniform, no slowing: the control"
        )
        frozen = "the source frozen, its KL a constant; " if arm.after == "mix" else ""
        return [f"{settings.post_images:,} more crops, {frozen}{times}", "sampled from N(0, I)"]
    if arm.w is None:
        return ["x0 ~ N(0, I) in training (w = 0)", "sampled from N(0, I)"]
    mixing = "w = 1 always (Fast-ODE)" if arm.w == 1.0 else "w ~ U[0, 1)"
    return [
        f"x0 from the learned source of the image, {mixing}, lambda = {arm.lam:g}",
        "sampled from N(0, I), the source thrown away",
    ]


def choice_note(settings: MixedSettings, seeds: Sequence[int]) -> str:
    """On which seeds the settings were chosen, and which of those shown are not free of that."""
    if settings != MIXED:
        return "The lambdas of the demo's own settings were chosen on other seeds and lengths."
    words = (
        f"Both lambdas were chosen on seed {', '.join(map(str, CHOSEN_ON))} alone; gamma is that "
        "of the demo of slowed interpolation."
    )
    if tuned := [seed for seed in seeds if seed in CHOSEN_ON]:
        words += f" Of the seeds shown, {', '.join(map(str, tuned))} took part in that choice."
    return words
