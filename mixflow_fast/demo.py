"""The demo: one base model, post-trained with and without MixFlow, sampled and measured.

From one base checkpoint, arms that differ in nothing but the distribution of the two times train
for the same number of steps on the same examples and noise; then every arm generates from the same
noise with few and with many Euler steps, and is compared with real crops that no arm has seen.
Everything is a function of the seed: the same seed gives the same bits on the same machine.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data import build_dataset, sample_index
from mixflow_fast.environment import cpu_name, current_environment, is_installed
from mixflow_fast.evaluation import FEATURES, frechet_distance, moments
from mixflow_fast.files import write_json, write_text
from mixflow_fast.messages import shorten
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.models import load_model
from mixflow_fast.reports.demo_report import MAIN_ARMS, evidence_markdown, render_demo_report
from mixflow_fast.reports.demo_result import ArmResult, DemoResult, Distances, Metric
from mixflow_fast.reports.images import save_captioned, save_grid
from mixflow_fast.sampling.samples import sample
from mixflow_fast.training.build import check

METRIC_OF_FEATURE: dict[str, Metric] = {
    "pooled_pixels": "frechet",
    "random_conv": "frechet_random_conv",
}


@dataclass(frozen=True)
class Arm:
    """A way to continue the base model's training; None marks the base itself."""

    label: str
    gamma: float | None = None
    timesteps: str | None = None
    interval: str = "shifted"


@dataclass(frozen=True)
class Settings:
    """Sizes of a demo, chosen on seeds other than the published ones."""

    data: str = "photos"
    size: int = 16
    gamma: float = 0.3
    base_images: int = 160_000
    post_images: int = 64_000
    base_lr: float = 1e-3
    post_lr: float = 5e-4
    samples: int = 1000
    steps: tuple[int, ...] = (5, 10, 20, 50)
    picture_steps: int = 5  # Euler steps behind the pictures: few, where the arms differ most


SETTINGS = {"photos": Settings(), "digits": Settings(data="digits", size=8)}


class Evaluation(TypedDict):
    """One arm of one seed, as in its frechet.json: distances by number of steps, seconds of all."""

    frechet: dict[str, float]
    frechet_random_conv: dict[str, float]
    seconds: float


def arms_of(settings: Settings, sweep: bool) -> dict[str, Arm]:
    """The arms by name, the base first. The sweep adds gammas and the paper's ablation rows."""
    g = settings.gamma
    arms = {
        "base": Arm("base, no post-training"),
        "control": Arm("control: plain continued training", 0.0, "uniform"),
        "mixflow": Arm(f"MixFlow, gamma {g:g}", g, "beta21"),
    }
    if sweep:
        for gamma in (0.0, 0.3, 0.5, 0.8):
            if gamma != g:
                label = f"Beta(2,1) label, gamma {gamma:g}"
                arms[f"gamma_{gamma:g}"] = Arm(label, gamma, "beta21")
        arms |= {
            "uniform_any": Arm("ablation: t ~ U, m ~ U[0, 1]", None, "uniform", "full"),
            "beta_any": Arm("ablation: t ~ Beta, m ~ U[0, 1]", None, "beta21", "full"),
            "uniform_below": Arm("ablation: t ~ U, m ~ U[0, t]", 1.0, "uniform"),
            "beta_below": Arm("ablation: t ~ Beta, m ~ U[0, t] (gamma 1)", 1.0, "beta21"),
        }
    return arms


def base_config(settings: Settings, seed: int, out: Path) -> Config:
    """Configuration of the base model's training."""
    return load_config(
        settings.data,
        [
            f"out={out}",
            f"data.size={settings.size}",
            f"model.input_size={settings.size}",
            f"model.init_seed={seed}",
            # Even for the base, odd for its arms: they see other examples and noise than it did.
            f"train.seed={2 * seed}",
            f"train.images={settings.base_images}",
            f"optim.lr={settings.base_lr}",
        ],
    )


def arm_config(base: Config, arm: Arm, settings: Settings, seed: int, out: Path) -> Config:
    """Configuration of an arm's post-training: the base's, with other data positions."""
    return base.replace(
        **{
            "out": str(out),
            "train.init": str(Path(base.out) / "weights.pt"),
            "train.seed": 2 * seed + 1,
            "train.images": settings.post_images,
            "optim.lr": settings.post_lr,
            "objective.gamma": 0.0 if arm.gamma is None else arm.gamma,
            "objective.timesteps": arm.timesteps,
            "objective.interval": arm.interval,
        }
    )


@dataclass(frozen=True)
class _Run:
    """A finished arm of one seed."""

    config: Config
    evaluation: Evaluation


class Measure:
    """Frechet distances to the held-out real images, in every feature space of the demo."""

    def __init__(self, data: str, size: int) -> None:
        self.size = size
        self.real = _all_images(data, "heldout", size)
        self.truth = {name: moments(features(self.real)) for name, features in FEATURES.items()}

    def __call__(self, images: Tensor) -> dict[Metric, float]:
        distances = {}
        for name, features in FEATURES.items():
            mean, covariance = moments(features(images))
            true_mean, true_covariance = self.truth[name]
            distances[METRIC_OF_FEATURE[name]] = frechet_distance(
                mean, covariance, true_mean, true_covariance
            )
        return distances


@lru_cache(maxsize=2)
def _measure(data: str, size: int) -> Measure:
    return Measure(data, size)


def run_demo(
    out: str | Path = "runs/demo",
    seeds: Sequence[int] = (0,),
    sweep: bool = False,
    settings: Settings = SETTINGS["photos"],
    command: str = "mixflow-fast demo",
    quiet: bool = False,
    fresh: bool = False,
) -> DemoResult:
    """Run the demo and write OUT/report.html, report.json, report.md and the checkpoints.

    Finished arms are kept: a demo that was interrupted goes on where it was, and more seeds or the
    sweep only add to what is there.

    Args:
        out: folder of the demo.
        seeds: one run of everything per seed; several give means and standard deviations.
        sweep: add the gamma sweep and the paper's ablation rows.
        settings: sizes; `SETTINGS["photos"]` or `SETTINGS["digits"]`.
        command: what to print as the command that made the report.
        quiet: no progress.
        fresh: delete the arms that an earlier demo left in the folder.

    Returns:
        what report.json holds. "seconds" adds up training and evaluation of every arm.

    Raises:
        ValueError: no seeds; a folder that holds another demo; a missing extra.
    """
    from mixflow_fast.training.trainer import train

    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds must be distinct integers >= 0, got {list(seeds)}")
    out = Path(out)
    arms = arms_of(settings, sweep)
    _check(settings, arms, out)
    measure = _measure(settings.data, settings.size)
    _claim(out, settings, fresh)
    log: Callable[[str], None] = (lambda _: None) if quiet else _log
    runs: dict[str, list[_Run]] = {name: [] for name in arms}
    for number, seed in enumerate(seeds, 1):
        base = base_config(settings, seed, out / f"seed_{seed}" / "base")
        for name, arm in arms.items():
            log(f"seed {seed} ({number}/{len(seeds)}): {arm.label}")
            config = base
            if name != "base":
                config = arm_config(base, arm, settings, seed, out / f"seed_{seed}" / name)
            done = Path(config.out) / "frechet.json"
            if done.exists():
                log(f"  finished already, kept: {done.parent} (--fresh starts over)")
            else:
                started = time.monotonic()
                # A signal ends the training with a checkpoint: the demo must end too.
                if not train(config, quiet=quiet).finished:
                    raise KeyboardInterrupt
                table = _evaluate(done.parent, settings, measure, seed, quiet)
                write_json(done, {**table, "seconds": time.monotonic() - started})
            runs[name].append(_Run(config, json.loads(done.read_text())))
    result = _result(out, settings, seeds, arms, runs, measure, command)
    _save_comparison(out, result, settings.picture_steps)
    render_demo_report(result, out / "report.html")
    write_text(out / "report.md", evidence_markdown(result))
    write_json(out / "report.json", result)  # last: its presence marks a finished demo
    return result


def _evaluate(
    folder: Path, settings: Settings, measure: Measure, seed: int, quiet: bool
) -> dict[Metric, dict[str, float]]:
    """Sample the EMA model of a run with each number of steps, and save a picture of one."""
    model = load_model(folder / "weights.pt")
    table: dict[Metric, dict[str, float]] = {}
    for steps in settings.steps:
        drawn = sample(
            model,
            num=settings.samples,
            steps=steps,
            method="euler",
            seed=seed,
            balanced=True,
            batch_size=min(250, settings.samples),
            progress=not quiet,
        )
        # A side of 64 pixels, whatever the size of the images.
        if steps == settings.picture_steps:
            save_grid(folder / "samples.png", drawn.x[:32], columns=8, scale=64 // settings.size)
        for metric, value in measure(drawn.x).items():
            table.setdefault(metric, {})[str(steps)] = value
    return table


def _result(
    out: Path,
    settings: Settings,
    seeds: Sequence[int],
    arms: Mapping[str, Arm],
    runs: Mapping[str, Sequence[_Run]],
    measure: Measure,
    command: str,
) -> DemoResult:
    """What the report shows: numbers of every seed, pictures, curves and settings of the first."""
    configs = {name: of_arm[0].config for name, of_arm in runs.items()}
    return {
        "title": _title(settings),
        "seed": seeds[0],
        "seeds": list(seeds),
        "seconds": sum(run.evaluation["seconds"] for of_arm in runs.values() for run in of_arm),
        "steps": list(settings.steps),
        "arms": {name: _arm_result(arm, runs[name]) for name, arm in arms.items()},
        "floor": _floor(settings, measure),
        "losses": {name: _losses(Path(config.out)) for name, config in configs.items()},
        "real_grid": str(_real_grid(out, measure)),
        "config": {
            "settings": asdict(settings),
            **{name: config.to_dict() for name, config in configs.items()},
        },
        "environment": _environment(),
        "notes": _notes(settings, len(seeds)),
        "command": command,
        "images_caption": f"{settings.picture_steps} Euler steps, not selected, same noise and "
        "labels in every arm",
        "about": _about(settings),
    }


def _arm_result(arm: Arm, runs: Sequence[_Run]) -> ArmResult:
    found = [run.evaluation for run in runs]
    return {
        "label": arm.label,
        "gamma": arm.gamma,
        "timesteps": arm.timesteps,
        "interval": arm.interval,
        "frechet": _combine([evaluation["frechet"] for evaluation in found]),
        "frechet_random_conv": _combine([e["frechet_random_conv"] for e in found]),
        "images": str(Path(runs[0].config.out) / "samples.png"),
    }


def _combine(tables: Sequence[Mapping[str, float]]) -> Distances:
    """One seed's numbers as they are; of several the mean and the sample standard deviation."""
    if len(tables) == 1:
        return tables[0]
    values = {steps: [table[steps] for table in tables] for steps in tables[0]}
    return {
        steps: {"mean": statistics.fmean(each), "std": statistics.stdev(each), "values": each}
        for steps, each in values.items()
    }


def _losses(folder: Path) -> list[list[float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [[row["images_seen"], row["loss"]] for row in rows]


def _floor(settings: Settings, measure: Measure, draws: int = 10) -> dict[Metric, float]:
    """As many random training images against the held-out ones, mean over independent draws."""
    images = _all_images(settings.data, "train", settings.size)
    count = min(settings.samples, len(images))
    found = []
    for draw in range(draws):
        index = sample_index(torch.arange(count), len(images), seed=draw)
        found.append(measure(images[index]))
    return {metric: statistics.fmean(values[metric] for values in found) for metric in found[0]}


def _all_images(data: str, split: str, size: int) -> Tensor:
    dataset = build_dataset(data, size=size, split=split)
    index = torch.arange(len(dataset))
    return dataset.get(index, index, 0).x


def _save_comparison(out: Path, result: DemoResult, steps: int) -> None:
    """OUT/arms.png: the first three arms beside real images, for pages that show one picture."""
    arms = list(result["arms"].values())[:MAIN_ARMS]
    pictures = {f"{arm['label']}: {steps} steps": Path(arm["images"]) for arm in arms}
    save_captioned(out / "arms.png", {**pictures, "real": Path(result["real_grid"])})


def _real_grid(out: Path, measure: Measure) -> Path:
    # Evenly over the set, in which the crops of one photograph follow those of the other.
    chosen = torch.linspace(0, len(measure.real) - 1, 32).long()
    # Alternate the two halves of the set, as the generated pictures alternate the labels.
    chosen = chosen.view(2, 16).T.reshape(-1)
    save_grid(out / "real.png", measure.real[chosen], columns=8, scale=64 // measure.size)
    return out / "real.png"


def _check(settings: Settings, arms: dict[str, Arm], out: Path) -> None:
    """Refuse settings that some arm, the sampling or the report could not work with."""
    if settings.samples < 2:
        raise ValueError(f"samples must be >= 2, got {settings.samples}")
    if settings.picture_steps not in settings.steps:
        raise ValueError(
            f"picture_steps must be one of steps = {settings.steps}, got {settings.picture_steps}"
        )
    base = base_config(settings, 0, out / "base")
    for arm in arms.values():
        # The base is not post-trained; any distribution will do to check the sizes.
        trained = replace(arm, gamma=0.0, timesteps="uniform") if arm.timesteps is None else arm
        check(arm_config(base, trained, settings, 0, out / "arm"))
    if not is_installed("matplotlib"):
        raise ValueError('the report needs matplotlib: pip install "mixflow_fast[eval]"')


def _claim(out: Path, settings: Settings, fresh: bool) -> None:
    """Take the folder for a demo with these settings, keeping finished arms unless `fresh`."""
    mark = out / "settings.json"
    plan = json.loads(json.dumps(asdict(settings)))
    if mark.exists():
        if fresh:
            for folder in out.glob("seed_*"):
                shutil.rmtree(folder)
        # Arms with other settings must not end up in one table.
        elif (there := json.loads(mark.read_text())) != plan:
            changed = sorted(k for k in there.keys() | plan.keys() if there.get(k) != plan.get(k))
            listed = shorten(f"{k}: {there.get(k)} -> {plan.get(k)}" for k in changed)
            raise ValueError(
                f"{out} holds a demo with other settings ({listed}): choose another --out, or "
                "replace it with --fresh"
            )
        (out / "report.json").unlink(missing_ok=True)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no demo: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(mark, plan)


def _environment() -> dict[str, object]:
    """What the report shows of this process's environment; no host name, for it is published."""
    on_gpu = torch.cuda.is_available()
    here = current_environment(torch.device("cuda" if on_gpu else "cpu"))
    return {
        "python": here.python,
        "torch": here.torch,
        "deepspeed": here.deepspeed,
        "mixflow_fast": here.mixflow_fast,
        "platform": here.platform,
        "cpu": cpu_name(),
        "threads": here.threads,
        "device": here.device if on_gpu else "cpu",
    }


def _title(settings: Settings) -> str:
    what = "photo crops" if settings.data == "photos" else "handwritten digits"
    return f"MixFlow post-training on {what}"


def _about(settings: Settings) -> str:
    if settings.data == "digits":
        what = f"scikit-learn's handwritten digits at {settings.size}x{settings.size} pixels"
    else:
        what = "16x16 crops of the two photographs that come with scikit-learn"
    return (
        f"A small SiT (4 layers, width 96) was trained on {what}, then trained further in each of "
        "the ways below with the same data and noise. Each arm generated from the same noise with "
        "few and with many Euler steps."
    )


def _notes(settings: Settings, seeds: int) -> list[str]:
    dimensions = (1 if settings.data == "digits" else 3) * settings.size**2
    notes = [
        f"A small model on {dimensions}-dimensional images, not ImageNet: it shows the mechanism, "
        "not the paper's numbers.",
        f"{settings.samples} samples per cell against all held-out images. The floor is the "
        "distance of as many random training images to the same held-out images, mean of 10 draws.",
        "Sizes, gamma and learning rates were chosen on other seeds than those shown.",
    ]
    if seeds > 1:
        notes.append("Spread: sample standard deviation over the seeds (base model included).")
    return notes


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
