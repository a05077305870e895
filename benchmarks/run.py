"""The benchmarks: `python -m benchmarks.run [--op NAME] [--suite kernels|step|all] [--deadline S]`.

First the ops' correctness on this device; on red nothing is timed. Then the suites, one JSON line
for each number in OUT/rows.jsonl as it comes, and at the end a plot for each op. Speeds need a GPU.
`--smoke --device cpu` runs the same path at toy sizes, a test of the harness and no speeds.

Exit status: 0 measured, 1 red (nothing, or not the cell that was wrong, has a speed), 2 no GPU,
130 interrupted (what was measured until then is in the file).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

import torch

from benchmarks import checks, plots, rows
from benchmarks import rows as devices
from benchmarks.cases import KERNEL_OPS, OPS, kernel_cases
from benchmarks.kernel_suite import KernelSuite
from benchmarks.rows import Deadline
from benchmarks.step import StepSuite

SMOKE_NOTE = "smoke: not a speed"
SUITES = {"kernels": KERNEL_OPS, "step": ("step",), "all": OPS}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--suite", choices=tuple(SUITES), default="all")
    parser.add_argument("--op", action="append", choices=OPS, help="only this op; repeatable")
    parser.add_argument(
        "--deadline", type=float, metavar="S", help="seconds; no cell starts that would not fit"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/benchmarks"))
    parser.add_argument("--smoke", action="store_true", help="toy sizes, a test of the harness")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    ops = tuple(op for op in SUITES[args.suite] if args.op is None or op in args.op)
    try:
        device, deadline = devices.pick(args.device), Deadline(args.deadline)
        if not ops:
            raise ValueError(f"--op {args.op} is not in --suite {args.suite}: use --suite all")
        if device.type == "cpu" and not args.smoke:
            raise ValueError(
                "speeds need a GPU: a CPU's say nothing about these kernels. To test the harness: "
                "--smoke --device cpu; correctness alone: python -m benchmarks.checks"
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = devices.environment(device)
    note = SMOKE_NOTE if args.smoke else ""
    writer = rows.Writer(args.out / "rows.jsonl", environment, note)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    if args.smoke:
        print(SMOKE_NOTE)
    try:
        return _measure(args, ops, device, deadline, writer)
    except KeyboardInterrupt:
        print(f"\ninterrupted: {writer.count} rows are in {writer.path}", flush=True)
        plots.draw(writer.path, args.out, ops)
        return 130


def _measure(
    args: argparse.Namespace,
    ops: tuple[str, ...],
    device: torch.device,
    deadline: Deadline,
    writer: rows.Writer,
) -> int:
    report = checks.run(device, "triton", "timed", ops, deadline)
    print(report.table(), flush=True)
    if report.interrupted:
        raise KeyboardInterrupt
    if not report.green:
        print("no speed is measured until correctness is green")
        return 1
    before = devices.conditions(device)
    state = {"before": before, "after": None, **devices.environment(device)}
    _keep_state(args.out, args.suite, state)
    # On the CPU the kernels run in an interpreter: timing that would only take long.
    impl = "reference" if args.smoke and device.type == "cpu" else "triton"
    refused: list[str] = []
    if set(ops) & set(KERNEL_OPS):
        suite = KernelSuite(device, writer, deadline, impl, args.smoke)
        suite.run(kernel_cases(ops, args.smoke))
        refused += suite.refused
    if "step" in ops:
        suite = StepSuite(device, writer, deadline, impl, args.smoke)
        suite.run()
        refused += suite.refused
    after = devices.conditions(device)
    _keep_state(args.out, args.suite, state | {"after": after})
    print(f"\ndevice before: {before}\ndevice after:  {after}")
    print(f"{writer.count} rows in {writer.path}")
    if deadline.left_out:
        print(deadline.report())
    for path in plots.draw(writer.path, args.out, ops):
        print(f"plot: {path}")
    if refused:
        print("no speed for, because of wrong results:", *refused, sep="\n  ")
    return 1 if refused else 0


def _keep_state(out: Path, suite: str, state: dict[str, str | None]) -> None:
    """OUT/environment.json: the state of each suite's run under the suite's name."""
    path = out / "environment.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or cut off by a kill
        kept = {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(kept | {suite: state}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    # Python would go on ignoring it where a shell started the suite with "&".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
