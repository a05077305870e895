"""One arm of one seed: train it, or take another arm's weights; sample, measure, keep pictures."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.config.schema import Config
from mixflow_fast.demo.measure import Measure
from mixflow_fast.demo.plan import Beginning, Evaluation, Plan
from mixflow_fast.files import write_json
from mixflow_fast.models import Transformer, load_model
from mixflow_fast.reports.demo_result import Cell, Metric
from mixflow_fast.reports.images import save_grid
from mixflow_fast.sampling import Sampler, draw_labels, model_velocity, sample, sampling_noise

STRIP = 10  # images that every arm shows in one row, the same noise in the same column
GRID = 32
_BATCH = 250


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
        source = self.plan.source_numbers(weights, self.number, measure, quiet) if own else None
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
    begin = seed.plan.begin(name, trained / "weights.pt")
    for steps in settings.steps:
        remedy = seed.plan.remedy(name, steps)
        if remedy is None and begin is None and folder != trained:
            # No remedy at this number of steps: what the arm without it has, not sampled again.
            _copy(trained, folder, cells, steps)
            continue
        if begin is not None:
            images = _sample_from(model, begin, settings.samples, steps, seed.number)
        else:
            images = sample(
                model,
                num=settings.samples,
                steps=steps,
                method="euler",
                seed=seed.number,
                balanced=True,
                batch_size=min(_BATCH, settings.samples),
                remedy=remedy,
                progress=not quiet,
            ).x
        if steps in settings.picture_steps:
            save_pictures(folder, images, steps)
        for metric, cell in measure(images).items():
            cells[metric][str(steps)] = cell
    return cells


@torch.inference_mode()
def _sample_from(
    model: Transformer, begin: Beginning, samples: int, steps: int, seed: int
) -> Tensor:
    """What `sample` gives by Euler steps with balanced labels, but for where the samples begin."""
    c = model.eval().config
    shape, found = (c["in_channels"], c["input_size"], c["input_size"]), []
    for ids in torch.arange(samples).split(_BATCH):
        labels = draw_labels(seed, ids, c["num_classes"], balanced=True)
        x0 = begin(sampling_noise(None, seed, ids, shape), labels)
        found.append(Sampler("euler", steps).run(model_velocity(model, labels), x0)[0])
    return torch.cat(found)


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
