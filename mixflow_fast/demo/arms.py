"""One arm of one seed: train it, or take another arm's weights; sample, measure, keep pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mixflow_fast.config.schema import Config
from mixflow_fast.demo.measure import Measure
from mixflow_fast.demo.plan import Evaluation, Plan
from mixflow_fast.files import write_json
from mixflow_fast.models import load_model
from mixflow_fast.reports.demo_result import Cell, Metric
from mixflow_fast.reports.images import save_grid
from mixflow_fast.sampling.samples import sample

STRIP = 10  # images that every arm shows in one row, the same noise in the same column
GRID = 32


@dataclass(frozen=True)
class Seed:
    """Where the arms of one seed are.

    Attributes:
        folder: of the seed, with a folder for each arm.
        number: the seed.
        plan: of the demo.
    """

    folder: Path
    number: int
    plan: Plan

    def config(self, name: str) -> Config:
        """Configuration of the training of an arm's weights, which may be another arm's."""
        return self.plan.config(name, self.number, self.folder)

    def kept(self, name: str, measure: Measure) -> Evaluation | None:
        """What an earlier demo measured of an arm; None unless all that is measured now is there.

        The package of EfficientNet-Lite0's weights may have been installed since.
        """
        file = self.folder / name / "frechet.json"
        if not file.exists():
            return None
        found: Evaluation = json.loads(file.read_text())
        return found if measure.spaces.keys() <= found["cells"].keys() else None

    def run(self, name: str, measure: Measure, quiet: bool) -> Evaluation:
        """Train unless that is done, sample and measure; frechet.json is written last.

        Raises:
            KeyboardInterrupt: a signal ended the training, with a checkpoint.
        """
        from mixflow_fast.training.trainer import train

        started = time.monotonic()
        config, own = self.config(name), self.plan.arms[name].weights_of is None
        # A signal ends the training with a checkpoint: the demo must end too.
        if own and not train(config, quiet=quiet).finished:
            raise KeyboardInterrupt
        folder = self.folder / name
        cells = evaluate(folder, Path(config.out), name, self, measure, quiet)
        found: Evaluation = {"cells": cells, "seconds": 0.0}
        weights = Path(config.out) / "weights.pt"
        source = self.plan.source_numbers(weights, self.number, measure, quiet)
        if source is not None:
            found["source"] = source
        found["seconds"] = time.monotonic() - started
        write_json(folder / "frechet.json", found)
        return found


def evaluate(
    folder: Path, trained: Path, name: str, seed: Seed, measure: Measure, quiet: bool
) -> dict[Metric, dict[str, Cell]]:
    """Sample the EMA model of a run with each number of steps; keep pictures of some.

    Args:
        folder: of the arm; pictures go there.
        trained: the run whose weights are sampled.
        name: of the arm, which says what remedy there is.
    """
    settings = seed.plan.settings
    model = load_model(trained / "weights.pt")
    cells: dict[Metric, dict[str, Cell]] = {metric: {} for metric in measure.spaces}
    for steps in settings.steps:
        remedy = seed.plan.remedy(name, steps)
        if remedy is None and folder != trained:
            # No remedy at this number of steps: what the arm without it has, not sampled again.
            _copy(trained, folder, cells, steps)
            continue
        drawn = sample(
            model,
            num=settings.samples,
            steps=steps,
            method="euler",
            seed=seed.number,
            balanced=True,
            batch_size=min(250, settings.samples),
            remedy=remedy,
            progress=not quiet,
        )
        if steps in settings.picture_steps:
            save_pictures(folder, drawn.x, steps)
        for metric, cell in measure(drawn.x).items():
            cells[metric][str(steps)] = cell
    return cells


def _copy(source: Path, folder: Path, cells: Mapping[Metric, dict[str, Cell]], steps: int) -> None:
    found: Evaluation = json.loads((source / "frechet.json").read_text())
    for metric, by_steps in cells.items():
        by_steps[str(steps)] = found["cells"][metric][str(steps)]
    folder.mkdir(parents=True, exist_ok=True)
    for kind in (grid_name(steps), strip_name(steps)):
        if (source / kind).exists():
            (folder / kind).write_bytes((source / kind).read_bytes())


def grid_name(steps: int) -> str:
    """The file of an arm's many small pictures."""
    return f"samples_{steps}.png"


def strip_name(steps: int) -> str:
    """The file of an arm's row of large pictures."""
    return f"strip_{steps}.png"


def save_pictures(folder: Path, images: Tensor, steps: int) -> None:
    """A grid with sides of 64 pixels and a row with sides of 80, whatever the images' size."""
    side = images.shape[-1]
    save_grid(folder / grid_name(steps), images[:GRID], columns=8, scale=-(-64 // side))
    save_grid(folder / strip_name(steps), images[:STRIP], columns=STRIP, scale=-(-80 // side))
