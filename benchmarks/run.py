"""The benchmarks: `python -m benchmarks.run [--op NAME] [--suite NAME] [--deadline S]`.

First the ops' correctness on this device; an op with a wrong result is named and has no speed, the
others are timed. Then the suites, one JSON line for each number in OUT/rows.jsonl as it comes, and
at the end a plot for each op. Speeds need a GPU. `--smoke --device cpu` runs the same path at toy
sizes, a test of the harness and no speeds.

`--suite deepspeed RECIPE [section.field=value ...]` times a training step of the recipe under
DeepSpeed against a bare loop of the same; it needs DeepSpeed, and is not one of `--suite all`.

Exit status: 0 measured, 1 red (what was wrong has no speed), 2 no GPU, 130 interrupted (what was
measured until then is in the file).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import checks, plots, rows
from benchmarks.cells import kernel_cells
from benchmarks.ops import BLOCK_OPS, KERNEL_OPS, OBJECTIVE_OPS, OPS
from benchmarks.step import StepSuite
from benchmarks.step_optimizers import time_deepspeed
from benchmarks.suite import KernelSuite
from mixflow_fast import files

if TYPE_CHECKING:
    from mixflow_fast.config.schema import Config

SMOKE_NOTE = "smoke: not a speed"
SUITES = {"kernels": KERNEL_OPS, "step": ("step",), "deepspeed": ("deepspeed",), "all": OPS}
SEVERAL = {"normal": OBJECTIVE_OPS, "objective": OBJECTIVE_OPS, "block": BLOCK_OPS}


@dataclass(frozen=True)
class Job:
    """What is measured, where, and where it goes.

    Attributes:
        ops: those of the suite that were asked for.
        config: of the suite "deepspeed".
        plots: folder of the plots.
    """

    suite: str
    ops: tuple[str, ...]
    config: Config | None
    device: torch.device
    deadline: rows.Deadline
    smoke: bool
    environment: dict[str, str | None]
    writer: rows.Writer
    plots: Path


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("recipe", nargs="*", help="of --suite deepspeed: recipe and overrides")
    parser.add_argument("--suite", choices=tuple(SUITES), default="all")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument(
        "--deadline", type=float, metavar="S", help="seconds; no cell starts that would not fit"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/benchmarks"))
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="of the plots, if not OUT")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, a test of the harness")
    return parser.parse_args(argv)


def _job(args: argparse.Namespace) -> Job:
    """What the arguments ask for; ValueError where it cannot be done."""
    ops = tuple(op for op in SUITES[args.suite] if args.op is None or op in args.op)
    device, deadline = rows.pick(args.device), rows.Deadline(args.deadline)
    if device.type == "cpu" and not args.smoke:
        raise ValueError(
            "speeds need a GPU: a CPU's say nothing about these kernels. To test the harness: "
            "--smoke --device cpu; correctness alone: python -m benchmarks.checks"
        )
    if args.suite != "deepspeed" and args.recipe:
        raise ValueError(f"only --suite deepspeed takes a recipe, got {args.recipe[0]}")
    if not ops:
        raise ValueError(f"--op {args.op} is not in --suite {args.suite}: use --suite all")
    config = _config(args.recipe) if args.suite == "deepspeed" else None
    environment = rows.environment(device)
    note = SMOKE_NOTE if args.smoke else ""
    writer = rows.Writer(args.out / "rows.jsonl", environment, note)
    folder = args.plots or args.out
    return Job(args.suite, ops, config, device, deadline, args.smoke, environment, writer, folder)


def _config(recipe: list[str]) -> Config:
    # Needs more packages than the other suites.
    from mixflow_fast.config.loading import load_config

    if not recipe:
        raise ValueError("--suite deepspeed needs a recipe: --suite deepspeed RECIPE [a.b=c ...]")
    config = load_config(recipe[0], recipe[1:])
    if config.microbatch(1) != config.train.global_batch_size:
        raise ValueError("the batch must be one micro-batch: raise train.microbatch_size")
    return config


def main(argv: list[str] | None = None) -> int:
    """Measure, and return the exit status."""
    try:
        job = _job(_parse(argv))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in job.environment.items()), flush=True)
    if job.smoke:
        print(SMOKE_NOTE)
    try:
        return _measure(job)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {job.writer.count} rows are in {job.writer.path}", flush=True)
        plots.draw(job.writer.path, job.plots, job.ops)
        return 130


def _measure(job: Job) -> int:
    """Correctness, then the suites on what is right; the exit status."""
    green, red = _check(job)
    before = rows.conditions(job.device)
    state = {"before": before, "after": None, **job.environment}
    _keep_state(job, state)
    refused = _time(job, red)
    after = rows.conditions(job.device)
    _keep_state(job, state | {"after": after})
    print(f"\ndevice before: {before}\ndevice after:  {after}")
    print(f"{job.writer.count} rows in {job.writer.path}")
    if job.deadline.left_out:
        print(job.deadline.report())
    for path in plots.draw(job.writer.path, job.plots, job.ops):
        print(f"plot: {path}")
    refused = [*(f"{op}: not correct on this device" for op in job.ops if op in red), *refused]
    if refused:
        print("no speed for, because of wrong results:", *refused, sep="\n  ")
    return 0 if green and not refused else 1


def _check(job: Job) -> tuple[bool, set[str]]:
    """Whether every check ran and passed, and the ops with wrong results."""
    if job.config is not None:
        return True, set()
    report = checks.run(job.device, "triton", "timed", job.ops, job.deadline)
    print(report.table(), flush=True)
    if report.interrupted:
        raise KeyboardInterrupt
    red = red_ops(finding.op for finding in report.failures)
    if red:
        print(f"RED, and without a speed: {', '.join(sorted(red))}", flush=True)
    return report.green, red


def red_ops(found: Iterable[str]) -> set[str]:
    """The ops without a speed, where these were found wrong."""
    red: set[str] = set()
    for name in found:
        # What several ops are made of, or a check of several at once, says nothing about which.
        alone = (name,) if name in KERNEL_OPS else KERNEL_OPS
        red.update(SEVERAL.get(name, alone))
    if red & set(OBJECTIVE_OPS):
        red.add("objective")
    return red


def _time(job: Job, red: set[str]) -> list[str]:
    """Run the suites; what they refused."""
    if job.config is not None:
        time_deepspeed(job.config, job.device, job.writer, job.smoke)
        return []
    # On the CPU the kernels run in an interpreter: timing that would only take long.
    impl = "reference" if job.device.type == "cpu" else "triton"
    refused: list[str] = []
    cells = [cell for cell in kernel_cells(job.ops, job.smoke) if cell.op not in red]
    if cells:
        kernels = KernelSuite(job.device, job.writer, job.deadline, impl, job.smoke)
        kernels.run(cells)
        refused += kernels.refused
    if "step" in job.ops:
        step = StepSuite(job.device, job.writer, job.deadline, impl, job.smoke, red)
        step.run()
        refused += step.refused
    return refused


def _keep_state(job: Job, state: dict[str, str | None]) -> None:
    """OUT/environment.json: the state of each suite's run under the suite's name."""
    path = job.writer.path.parent / "environment.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut off by a kill
        kept = {}
    files.write_json(path, kept | {job.suite: state})


if __name__ == "__main__":
    # Python would go on ignoring it where a shell started the suite with "&".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
