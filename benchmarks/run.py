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
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import checks, plots, rows
from benchmarks.ops import KERNEL_OPS, OPS, kernel_cells
from benchmarks.step import StepSuite
from benchmarks.step_optimizers import time_deepspeed
from benchmarks.suite import KernelSuite
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.diagnostics.kernel_plan import NEEDS

if TYPE_CHECKING:
    from mixflow_fast.config.schema import Config

SMOKE_NOTE = "smoke: not a speed"
SUITES = {"kernels": KERNEL_OPS, "step": ("step",), "deepspeed": ("deepspeed",), "all": OPS}


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


class Run:
    """What one call of the command measures, where, and where it goes.

    Raises:
        ValueError: the arguments ask for what cannot be done here.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.ops = tuple(op for op in SUITES[args.suite] if args.op is None or op in args.op)
        self.device, self.deadline = rows.pick(args.device), rows.Deadline(args.deadline)
        if self.device.type == "cpu" and not args.smoke:
            raise ValueError(
                "speeds need a GPU: a CPU's say nothing about these kernels. To test the harness: "
                "--smoke --device cpu; correctness alone: python -m benchmarks.checks"
            )
        if args.suite != "deepspeed" and args.recipe:
            raise ValueError(f"only --suite deepspeed takes a recipe, got {args.recipe[0]}")
        if not self.ops:
            raise ValueError(f"--op {args.op} is not in --suite {args.suite}: use --suite all")
        self.config = _config(args.recipe) if args.suite == "deepspeed" else None
        self.suite, self.smoke = args.suite, args.smoke
        self.out, self.plots = args.out, args.plots or args.out
        self.environment = rows.environment(self.device)
        note = SMOKE_NOTE if args.smoke else ""
        self.writer = rows.Writer(self.out / "rows.jsonl", self.environment, note)

    def measure(self) -> int:
        """Correctness, then the suites on what is right; the exit status."""
        green, red = self._check()
        before = rows.conditions(self.device)
        state = {"before": before, "after": None, **self.environment}
        rows.keep_state(self.out, self.suite, state)
        refused = [f"{op}: wrong on this device" for op in self.ops if op in red]
        refused += self._time(red)
        after = rows.conditions(self.device)
        rows.keep_state(self.out, self.suite, state | {"after": after})
        print(f"\ndevice before: {before}\ndevice after:  {after}")
        print(f"{self.writer.count} rows in {self.writer.path}")
        if self.deadline.left_out:
            print(self.deadline.report())
        for path in self.draw():
            print(f"plot: {path}")
        if refused:
            print("no speed for, because of wrong results:", *refused, sep="\n  ")
        return 0 if green and not refused else 1

    def draw(self) -> list[Path]:
        """Plots of what was measured."""
        return plots.draw(self.writer.path, self.plots, self.ops)

    def _check(self) -> tuple[bool, set[str]]:
        """Whether every check ran and passed, and the ops with wrong results."""
        if self.config is not None:
            return True, set()
        report = checks.run(self.device, "triton", "timed", self.ops, self.deadline)
        print(report.table(), flush=True)
        if report.interrupted:
            raise KeyboardInterrupt
        red = red_ops(finding.op for finding in report.failures)
        if red:
            print(f"RED, and without a speed: {', '.join(sorted(red))}", flush=True)
        return report.green, red

    def _time(self, red: set[str]) -> list[str]:
        """Run the suites; what they refused."""
        if self.config is not None:
            time_deepspeed(self.config, self.device, self.writer, self.smoke)
            return []
        # On the CPU the kernels run in an interpreter: timing that would only take long.
        impl = "reference" if self.device.type == "cpu" else "triton"
        refused: list[str] = []
        cells = [cell for cell in kernel_cells(self.ops, self.smoke) if cell.op not in red]
        if cells:
            kernels = KernelSuite(self.device, self.writer, self.deadline, impl, self.smoke)
            kernels.run(cells)
            refused += kernels.refused
        if "step" in self.ops:
            step = StepSuite(self.device, self.writer, self.deadline, impl, self.smoke, red)
            step.run()
            refused += step.refused
        return refused


def _config(recipe: list[str]) -> Config:
    # Needs more packages than the other suites.
    from mixflow_fast.config.loading import load_config

    if not recipe:
        raise ValueError("--suite deepspeed needs a recipe: --suite deepspeed RECIPE [a.b=c ...]")
    config = load_config(recipe[0], recipe[1:])
    if config.microbatch(1) != config.train.global_batch_size:
        raise ValueError("the batch must be one micro-batch: raise train.microbatch_size")
    return config


def red_ops(found: Iterable[str]) -> set[str]:
    """The ops without a speed where these were found wrong: they, and those that need them."""
    wrong = set(found)
    if wrong - {name for op, needs in NEEDS.items() for name in (op, *needs)}:
        return set(KERNEL_OPS)  # nobody knows whose result it was
    return {op for op in KERNEL_OPS if wrong & {op, *NEEDS[op]}}


def main(argv: list[str] | None = None) -> int:
    """Measure, and return the exit status."""
    try:
        run = Run(_parse(argv))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(", ".join(f"{key} {value}" for key, value in run.environment.items()), flush=True)
    if run.smoke:
        print(SMOKE_NOTE)
    try:
        return run.measure()
    except KeyboardInterrupt:
        print(f"\ninterrupted: {run.writer.count} rows are in {run.writer.path}", flush=True)
        run.draw()
        return 130


if __name__ == "__main__":
    # Python would go on ignoring it where a shell started the suite with "&".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(quiet_without_reader(main))
