"""Correctness on the device: `python -m benchmarks.checks [--device cuda|cpu] [--op NAME]`.

Runs what `mixflow_fast/diagnostics/kernel_plan.py` lists: the checks of `mixflow-fast doctor` at
the sizes that are timed, what the kernels draw, and that their bits are a function of the inputs.
Without a GPU the kernels run in Triton's interpreter, at toy sizes. `benchmarks.run` calls this
before it times anything.

Exit status: 0 green, 1 red (a check failed, or did not fit the deadline), 2 no such device, 130
interrupted (what was found until then is in the file).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import rows
from benchmarks.ops import FAMILIES, GAMMA, KERNEL_OPS, REGISTRY, Cell, Made
from benchmarks.rows import Deadline, Expectation
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.diagnostics.kernel_cases import Inputs, Tensors
from mixflow_fast.diagnostics.kernel_checks import ROUNDING, Finding, guarded, relative_rms, worst
from mixflow_fast.diagnostics.kernel_plan import Level, tasks

# Errors of a timed call in units of one rounding of its dtype, which tell a wrong result from a
# right one at the timed shape; `kernel_checks.errors` holds ours to twice eager's error. Plain bf16
# lines round after each operation, attention rounds its weights.
OURS, OTHERS = 2.0, 6.0
LOSS = 1e-5


@dataclass
class Report:
    """What was found, the names of the checks that were left out, and whether by an interrupt."""

    findings: list[Finding] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    interrupted: bool = False

    @property
    def green(self) -> bool:
        """Every check ran, and passed."""
        return bool(self.findings) and not self.left_out and not self.failures

    @property
    def failures(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.passed]

    def table(self) -> str:
        """One line for each check and dtype with its worst tensor, then what failed."""
        groups: dict[tuple[str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.check, finding.dtype), []).append(finding)
        lines = [f"{'':4}{'error':>10}{'limit':>10}{'eager':>10}  check: worst tensor"]
        lines += [_line(worst(findings)) for findings in groups.values()]
        if self.failures:
            lines += ["", f"{len(self.failures)} of {len(self.findings)} failed:"]
            lines += [_line(finding) for finding in self.failures]
        if self.left_out:
            lines += ["", "left out, the deadline or an interrupt came first:", *self.left_out]
        verdict = "green" if self.green else "RED"
        return "\n".join([*lines, "", f"correctness: {verdict}, {len(self.findings)} checks"])


def _line(finding: Finding) -> str:
    eager = "" if finding.eager_error is None else f"{finding.eager_error:.2e}"
    mark, what = "ok" if finding.passed else "RED", f"{finding.check} {finding.dtype}"
    numbers = f"{finding.error:10.2e}{finding.limit:10.2e}{eager:>10}"
    return f"{mark:4}{numbers}  {what}: {finding.tensor}"


def run(
    device: torch.device,
    impl: str = "triton",
    level: Level = "timed",
    ops: Iterable[str] = KERNEL_OPS,
    deadline: Deadline | None = None,
    found: Callable[[Finding], object] | None = None,
) -> Report:
    """Run the checks of a level; `found` is told each finding as it comes.

    An exception in a check is a failure of that check. After an interrupt, or where checks would
    not fit the deadline, the report is not green. The impl "reference" checks the reference with
    itself, a test of the checks.
    """
    deadline = deadline or Deadline()
    report = Report()
    expectation = Expectation(first=10.0 if device.type == "cuda" else 2.0, cap=8.0)
    try:
        for task in tasks(device, impl, level, ops):
            if not deadline.fits(task.name, expectation.seconds()):
                report.left_out.append(task.name)
                continue
            start = deadline.spent()
            for finding in guarded(task.ops, task.name, "", task.run):
                report.findings.append(finding)
                if found is not None:
                    found(finding)
            expectation.saw(deadline.spent() - start)
            print(f"{deadline.spent():6.1f} s  {task.name}", flush=True)
    except KeyboardInterrupt:
        report.left_out.append(f"{task.name}, and what follows (interrupted)")
        report.interrupted = True
    return report


def verify(
    cell: Cell, inputs: Inputs, made: Made, provider: str, kept: Tensors | None = None
) -> list[str]:
    """What is wrong with the tensors that a call returned: one line each, empty if nothing is.

    Everything is compared with float64 arithmetic at the very shape that is timed, so providers
    with generators of their own are held to the same formula. Of attention the first and the last
    sample are looked at.

    Args:
        kept: the truth of another provider of the cell, or empty, and then filled.
    """
    op, kept = REGISTRY[cell.op], {} if kept is None else kept
    is_objective = cell.op in FAMILIES["objective"]
    samples = [0, cell.shape[0] - 1] if cell.op == "attention" else None
    some = inputs.rows(samples) if samples else inputs
    try:
        truth = kept or op.truth(cell, some, made)
    except ValueError as error:
        return [str(error)]
    wrong = []
    if is_objective:
        wrong += _draw_faults(cell, made)
    else:
        kept.update(truth)
    for name, exact in truth.items():
        # Samples apart, a weight's gradient is that of another batch.
        of_batch = samples is not None and name.removeprefix("d") in inputs.shared
        value = made[name] if samples is None or of_batch else made[name][samples]
        dtype = op.result_dtype(cell, name)
        if value.shape != exact.shape or value.dtype != dtype:
            wrong.append(f"{name} is {value.dtype} {tuple(value.shape)}")
            continue
        allowed = LOSS if name == "loss" else _slack(cell, provider) * ROUNDING[dtype]
        error = 0.0 if of_batch else relative_rms(value, exact)
        if not error <= allowed:
            wrong.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")
    return wrong


def _slack(cell: Cell, provider: str) -> float:
    if cell.op in FAMILIES["objective"]:
        return 1.0
    return OURS if provider == "mixflow_fast" and cell.op != "attention" else OTHERS


def _draw_faults(cell: Cell, made: Made) -> list[str]:
    """What of the noise and the times is not as it should be distributed."""
    if cell.op == "velocity_loss":
        return []
    name = "eps" if cell.op == "mixed_source" else "x0"
    noise = (made[name]() if callable(made[name]) else made[name]).double()
    # Six standard errors; Beta(2, 1) has the standard deviation 1 / sqrt(18), and bf16 rounds x0.
    of_noise, variance = 6 / math.sqrt(cell.elements), noise.square().mean().item()
    by_name = {
        f"mean of {name}": (noise.mean().item(), of_noise + 1e-3),
        f"variance of {name} less 1": (variance - 1, math.sqrt(2) * of_noise + 1e-3),
    }
    if "t" in made:
        t = made["t"].double()
        by_name["mean of t less 2/3"] = t.mean().item() - 2 / 3, 6 / math.sqrt(18 * len(t))
    wrong = [
        f"{name}: {abs(off):.3g}, allowed {allowed:.3g}"
        for name, (off, allowed) in by_name.items()
        if not abs(off) <= allowed
    ]
    if "t" in made and not _slowed(made["t"].double(), made["slowed_t"].double()):
        wrong.append("slowed_t is not in [(1 - gamma) t, t]")
    return wrong


def _slowed(t: Tensor, slowed_t: Tensor) -> bool:
    return bool(((slowed_t <= t) & (slowed_t >= (1 - GAMMA) * t - 1e-6)).all())


def _log(path: Path, environment: Mapping[str, str | None], finding: Finding) -> None:
    """Append a finding as a JSON line, an infinite error as null."""
    row = asdict(finding) | {"passed": finding.passed} | environment
    row["error"] = finding.error if math.isfinite(finding.error) else None
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--op", action="append", choices=KERNEL_OPS, help="repeatable")
    parser.add_argument("--family", choices=tuple(FAMILIES), help="its ops")
    parser.add_argument("--level", choices=("timed", "smoke", "full"), default="full")
    parser.add_argument("--impl", choices=("triton", "reference"), default="triton")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the findings there")
    args = parser.parse_args(argv)
    try:
        device, deadline = rows.pick(args.device), Deadline(args.deadline)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = rows.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()), flush=True)
    ops = args.op or FAMILIES.get(args.family, KERNEL_OPS)
    keep = None
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"correctness{'_' + args.family if args.family else ''}.jsonl"
        path.write_text("", encoding="utf-8")
        keep = partial(_log, path, environment)
    report = run(device, args.impl, args.level, ops, deadline, keep)
    print(report.table(), flush=True)
    return 130 if report.interrupted else int(not report.green)


if __name__ == "__main__":
    # Python would go on ignoring it where a shell started the suite with "&".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(quiet_without_reader(main))
