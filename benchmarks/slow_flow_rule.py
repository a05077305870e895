"""Does the rule for gamma hold on other seeds? The demo's base, its arms over gamma, its slow flow.

For every seed the photo demo's base model is trained, then post-trained at a constant learning rate
with the Beta(2,1) label and each gamma on the same examples and noise, sampled with each number of
Euler steps, and measured as the demo measures. Beside it stands what `slow_flow` finds on the base
alone and what `recommend_gamma` makes of it, so that the gamma that was best can be held against
the one that was recommended. Finished parts are kept: the same command goes on, and more seeds or
gammas only add.

    python -m benchmarks.slow_flow_rule --seeds 110 111 112 113 114 --out runs/slow-flow-rule

`--report` trains nothing. Either way what is there is printed as a table and written to rows.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.data import build_dataset
from mixflow_fast.demo import SETTINGS, Arm, Measure, arm_config, base_config
from mixflow_fast.evaluation.examples import read_examples
from mixflow_fast.evaluation.gamma import recommend_gamma
from mixflow_fast.evaluation.slow_flow import Settings, slow_flow
from mixflow_fast.files import write_json
from mixflow_fast.models import load_model
from mixflow_fast.sampling.samples import sample
from mixflow_fast.training.inputs import Inputs
from mixflow_fast.training.trainer import train

# The arms keep the constant learning rate with which the rule was found and its first seeds ran.
PHOTOS = replace(SETTINGS["photos"], post_schedule="constant")
GAMMAS = (0.0, 0.15, 0.3, 0.5)
# The default would be 200 Heun intervals; 50 take a third of the time.
SLOW = Settings(steps=PHOTOS.steps, states=1000, fine=50)
FRECHET, SLOWNESS = "frechet.json", "slow_flow.json"


def train_arm(out: Path, seed: int, gamma: float | None) -> Path:
    """The finished run of an arm, None being the base; nothing is trained twice.

    Raises:
        KeyboardInterrupt: a signal ended the training, with a checkpoint.
    """
    config = base = base_config(PHOTOS, seed, out / f"seed_{seed}" / "base")
    if gamma is not None:
        arm = Arm(f"gamma {gamma:g}", gamma, "beta21")
        config = arm_config(base, arm, PHOTOS, seed, out / f"seed_{seed}" / f"gamma_{gamma:g}")
    if not train(config).finished:
        raise KeyboardInterrupt
    return Path(config.out)


def measure_distances(folder: Path, seed: int, measure: Measure) -> None:
    """Distances of an arm's samples by metric and number of steps, as the demo measures them."""
    if (folder / FRECHET).exists():
        return
    model = load_model(folder / "weights.pt")
    table: dict[str, dict[str, float]] = {metric: {} for metric in measure.spaces}
    for steps in PHOTOS.steps:
        drawn = sample(
            model, num=PHOTOS.samples, steps=steps, seed=seed, balanced=True, batch_size=250
        )
        for metric, cell in measure(drawn.x).items():
            table[metric][str(steps)] = cell["value"]
    write_json(folder / FRECHET, table)


def measure_slowness(folder: Path, seed: int) -> None:
    """The slow flow of a base and the rule's gammas."""
    if (folder / SLOWNESS).exists():
        return
    photos = build_dataset("photos", size=PHOTOS.size)
    data = read_examples(photos, Inputs(), torch.device("cpu"), SLOW.states, "training examples")
    model = load_model(folder / "weights.pt")
    found = slow_flow(model, data, Settings(SLOW.steps, SLOW.states, seed=seed, fine=SLOW.fine))
    rule = [recommend_gamma(found, steps).to_record() for steps in found.by_steps]
    write_json(folder / SLOWNESS, {"slow_flow": found.to_record(), "gamma": rule})


@dataclass(frozen=True)
class Row:
    """One number of steps of one seed.

    Attributes:
        seed, steps: which.
        rule: gamma_rec, without its clip at 0.
        band: 1 - E1's lower edge at t = 1, what the paper's picture would ask for.
        distances: Frechet distance of pooled pixels by gamma.
    """

    seed: int
    steps: int
    rule: float
    band: float
    distances: Mapping[float, float]

    @property
    def best(self) -> float:
        """The gamma with the lowest distance."""
        return min(self.distances, key=self.distances.__getitem__)

    @property
    def nearest(self) -> float:
        """The gamma, of those that were trained, that the rule is nearest to."""
        return min(self.distances, key=lambda gamma: abs(gamma - self.rule))


def rows(out: Path) -> list[Row]:
    """What is finished: seeds whose base was measured, with the arms that are there."""
    found = []
    for folder in sorted(out.glob("seed_*")):
        slow = folder / "base" / SLOWNESS
        arms = {
            float(file.parent.name.removeprefix("gamma_")): json.loads(file.read_text())["frechet"]
            for file in folder.glob(f"gamma_*/{FRECHET}")
        }
        if not slow.exists() or not arms:
            continue
        for flow in json.loads(slow.read_text())["slow_flow"]["steps"]:
            steps = flow["steps"]
            distances = {gamma: arms[gamma][str(steps)] for gamma in sorted(arms)}
            rule = 2 * (flow["deficit"] - flow["fine_deficit"])
            band = 1 - flow["pair"]["low"][-1]
            found.append(Row(int(folder.name.removeprefix("seed_")), steps, rule, band, distances))
    return found


def table(found: Sequence[Row]) -> str:
    """Markdown: a line for each seed and number of steps, the lowest distance in bold."""
    gammas = sorted({gamma for row in found for gamma in row.distances})
    heads = ["seed", "steps", "rule", "E1's edge", *(f"{gamma:g}" for gamma in gammas)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---:|" * len(heads)]
    for row in found:
        cells = [f"{row.seed}", f"{row.steps}", f"{row.rule:.2f}", f"{row.band:.2f}"]
        for gamma in gammas:
            value = row.distances.get(gamma)
            text = "–" if value is None else f"{value:.2f}"
            cells.append(f"**{text}**" if gamma == row.best else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[110, 111, 112, 113, 114])
    parser.add_argument("--gammas", type=float, nargs="+", default=list(GAMMAS))
    parser.add_argument("--out", type=Path, default=Path("runs/slow-flow-rule"))
    parser.add_argument("--report", action="store_true", help="print what is there")
    options = parser.parse_args(argv)
    if not options.report:
        measure = Measure(PHOTOS.data, PHOTOS.size)
        for seed in options.seeds:
            base = train_arm(options.out, seed, None)
            measure_slowness(base, seed)
            measure_distances(base, seed, measure)
            for gamma in options.gammas:
                measure_distances(train_arm(options.out, seed, gamma), seed, measure)
    found = rows(options.out)
    write_json(options.out / "rows.json", [asdict(row) for row in found])
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(quiet_without_reader(main))
