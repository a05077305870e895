"""What a demo found, of all its arms and seeds, as the report shows it."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from mixflow_fast.demo.arms import grid_name, save_pictures, strip_name
from mixflow_fast.demo.measure import Measure, floor_of, over_seeds
from mixflow_fast.demo.plan import Finished, Plan
from mixflow_fast.environment import cpu_name, current_environment
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.reports.demo_result import (
    ArmResult,
    Cell,
    DemoResult,
    Distances,
    Metric,
    Pictures,
    main_arms,
)
from mixflow_fast.reports.images import save_captioned


def findings(
    out: Path,
    plan: Plan,
    seeds: Sequence[int],
    runs: Mapping[str, Sequence[Finished]],
    measure: Measure,
    command: str,
) -> DemoResult:
    """What the report shows: numbers of every seed, pictures, curves and settings of the first.

    Args:
        runs: by arm, one for each seed.
        command: what to print as the command that made the report.
    """
    settings, words = plan.settings, plan.words(seeds, measure)
    trained = {name: runs[name][0] for name, arm in plan.arms.items() if arm.weights_of is None}
    every = [run for of_arm in runs.values() for run in of_arm]
    result: DemoResult = {
        "title": words.title,
        "method": plan.method,
        "seed": seeds[0],
        "seeds": list(seeds),
        "seconds": sum(run.evaluation["seconds"] for run in every),
        "steps": list(settings.steps),
        "metrics": list(measure.spaces),
        "arms": {name: _arm_result(plan, name, runs[name], measure.spaces) for name in plan.arms},
        "floor": {
            metric: value
            for metric, value in floor_of(settings.data, settings.size, settings.samples).items()
            if metric in measure.spaces
        },
        "losses": {name: _losses(Path(run.config.out)) for name, run in trained.items()},
        "real": _real_pictures(out, measure),
        "config": {
            "settings": asdict(settings),
            **{name: run.config.to_dict() for name, run in trained.items()},
        },
        "environment": _environment(),
        "notes": words.notes,
        "command": command,
        "compare": plan.compare_command(out, seeds[0]),
        "images_caption": f"Seed {seeds[0]}, not selected. Pictures of one column began as the "
        "same noise, with the same label.",
        "about": words.about,
    }
    return {**result, **plan.more_findings(out, seeds, measure)}


def _arm_result(
    plan: Plan, name: str, runs: Sequence[Finished], metrics: Collection[Metric]
) -> ArmResult:
    cells = [run.evaluation["cells"] for run in runs]
    result = plan.arm_result(name, runs)
    result["distances"] = {metric: combine([c[metric] for c in cells]) for metric in metrics}
    result["corrected"] = {metric: _corrected([c[metric] for c in cells]) for metric in metrics}
    result["pictures"] = _pictures(runs[0].folder, plan.settings.picture_steps)
    return result


def combine(tables: Sequence[Mapping[str, Cell]]) -> Distances:
    """The distances of one arm and metric over the seeds."""
    return {key: over_seeds([table[key]["value"] for table in tables]) for key in tables[0]}


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


def _pictures(folder: Path, picture_steps: Sequence[int]) -> Mapping[str, Pictures]:
    return {
        str(steps): {
            "grid": str(folder / grid_name(steps)),
            "strip": str(folder / strip_name(steps)),
        }
        for steps in picture_steps
    }


def _real_pictures(out: Path, measure: Measure) -> Pictures:
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
