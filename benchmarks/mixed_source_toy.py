"""Mixed sources in the plane over seeds and lambdas: curvature and distances, Markdown and JSON.

Rectified flow, and kappa-FC (w = 1) and MixFlow (w ~ U[0, 1)) at each weight of the KL, so that
each is seen at its own best and where the other bends as much. An arm of one seed takes some ten
seconds of one core. Finished ones are kept in the file: the same command goes on, and more seeds or
lambdas only add.

    python -m benchmarks.mixed_source_toy --seeds 0 1 2 3 4 --out runs/mixed-toy.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.demo.measure import over_seeds
from mixflow_fast.demo.mixed_toy import coupled, floor_of, mixed
from mixflow_fast.demo.toy import (
    RECTIFIED_FLOW,
    STEP_COUNTS,
    TOY_DATA,
    ToyArm,
    ToySettings,
    measure_toy,
    train_toy,
)
from mixflow_fast.files import write_json
from mixflow_fast.reports.demo_result import number_text

LAMBDAS = (0.03, 0.3, 1.0, 3.0)
NUMBERS = {"mse": "training MSE", "sigma": "sigma", "aggregate": "SW, source to N(0, I)"}


class Row(TypedDict):
    """One arm of one seed; `result` is a `ToyResult`, with text as keys of `sw`."""

    arm: str
    seed: int
    result: dict[str, float | dict[str, float]]


class Table(TypedDict):
    """The file: what was trained, and all that is finished."""

    settings: dict[str, object]
    floor: dict[str, float]
    rows: list[Row]


def arms(lambdas: Sequence[float]) -> list[ToyArm]:
    """Every arm, in the order of print."""
    return [RECTIFIED_FLOW, *map(coupled, lambdas), *map(mixed, lambdas)]


def run(out: Path, settings: ToySettings, lambdas: Sequence[float], seeds: Sequence[int]) -> Table:
    """Train and measure what the file does not have yet; it is written after every arm.

    Raises:
        ValueError: the file is of other settings.
    """
    table: Table = {"settings": asdict(settings), "floor": {}, "rows": []}
    if out.exists():
        table = json.loads(out.read_text())
        if table["settings"] != asdict(settings):
            raise ValueError(f"{out} is of other settings: choose another --out")
    done = {(row["arm"], row["seed"]) for row in table["rows"]}
    for seed in seeds:
        table["floor"][str(seed)] = floor_of(settings, seed)
        for arm in arms(lambdas):
            if (arm.name, seed) in done:
                continue
            print(f"seed {seed}: {arm.name}", file=sys.stderr, flush=True)
            found = asdict(measure_toy(train_toy(arm, settings, seed)))
            found["sw"] = {str(steps): value for steps, value in found["sw"].items()}
            table["rows"].append({"arm": arm.name, "seed": seed, "result": found})
            write_json(out, table)
    return table


def markdown(table: Table, lambdas: Sequence[float], seeds: Sequence[int]) -> str:
    """A line for each arm: mean and standard deviation over the seeds."""
    heads = ["arm", "curvature", *(f"SW, {s} steps" for s in STEP_COUNTS), *NUMBERS.values()]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for arm in arms(lambdas):
        of_arm = {row["seed"]: row["result"] for row in table["rows"] if row["arm"] == arm.name}
        found = [of_arm[seed] for seed in seeds]
        columns = [[result["curvature"] for result in found]]
        columns += [[result["sw"][str(steps)] for result in found] for steps in STEP_COUNTS]
        columns += [[result[name] for result in found] for name in NUMBERS]
        cells = [number_text(over_seeds(column)) for column in columns]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    floor = number_text(over_seeds([table["floor"][str(seed)] for seed in seeds]))
    return "\n".join([*lines, "", f"Two draws of the data are {floor} apart."])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--lambdas", type=float, nargs="+", default=list(LAMBDAS))
    parser.add_argument("--data", choices=TOY_DATA, default=TOY_DATA[0])
    parser.add_argument("--steps", type=int, default=2000, help="of each training")
    parser.add_argument("--out", type=Path, default=Path("runs/mixed-toy.json"))
    options = parser.parse_args(argv)
    settings = ToySettings(data=options.data, steps=options.steps)
    table = run(options.out, settings, options.lambdas, options.seeds)
    print(markdown(table, options.lambdas, options.seeds))
    return 0


if __name__ == "__main__":
    raise SystemExit(quiet_without_reader(main))
