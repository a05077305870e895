"""Correctness on the device: `python -m benchmarks.checks [--device cuda|cpu] [--op NAME]`.

Every kernel against float64 and against plain PyTorch in the same dtype, what it draws, and that
its bits are a function of its inputs. Without a GPU the kernels run in Triton's interpreter, at
toy sizes. `benchmarks.run` calls this before it times anything.

Exit status: 0 green, 1 red (a check failed, or did not fit the deadline), 2 no such device, 130
interrupted (what was found until then is in the file).
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks import block_checks, draws, numerics, replay
from benchmarks import rows as devices
from benchmarks.block_ops import BLOCK_OPS
from benchmarks.cases import KERNEL_OPS, OBJECTIVE_OPS
from benchmarks.numerics import TIMED, Finding
from benchmarks.rows import Deadline, Expectation

# A batch of at least four covers the four buckets of t. The odd one has rows that no vector fits.
GPU_SHAPE, CPU_SHAPE = (8, 4, 32, 32), (4, 4, 4, 4)
GPU_TIMED_SHAPES = (GPU_SHAPE, (5, 3, 7, 9), (256, 4, 32, 32), (64, 768, 16, 16))
CPU_TIMED_SHAPES = (CPU_SHAPE,)
GPU_BITS_SHAPE, CPU_BITS_SHAPE = (256, 4, 32, 32), (3, 3, 5, 3)

# Two processes check them side by side, each into its own file.
FAMILIES = {"objective": OBJECTIVE_OPS, "blocks": BLOCK_OPS}

Task = tuple[str, Callable[[], Iterable[Finding]]]


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
        worst: dict[tuple[str, str], Finding] = {}
        for finding in self.findings:
            key = finding.check, finding.dtype
            if key not in worst or _severity(finding) > _severity(worst[key]):
                worst[key] = finding
        lines = [f"{'':4}{'error':>10}{'limit':>10}{'eager':>10}  check: worst tensor"]
        for finding in worst.values():
            lines.append(_line(finding))
        if self.failures:
            lines += ["", f"{len(self.failures)} of {len(self.findings)} failed:"]
            lines += [_line(finding) for finding in self.failures]
        if self.left_out:
            lines += ["", "left out, the deadline or an interrupt came first:", *self.left_out]
        verdict = "green" if self.green else "RED"
        return "\n".join([*lines, "", f"correctness: {verdict}, {len(self.findings)} checks"])


def _severity(finding: Finding) -> float:
    if not finding.passed:
        return math.inf
    return finding.error / finding.limit if finding.limit else 0.0


def _line(finding: Finding) -> str:
    eager = "" if finding.eager_error is None else f"{finding.eager_error:.2e}"
    mark = "ok" if finding.passed else "RED"
    return (
        f"{mark:4}{finding.error:10.2e}{finding.limit:10.2e}{eager:>10}  "
        f"{finding.check} {finding.dtype}: {finding.tensor}"
    )


def tasks(
    device: torch.device, impl: str, level: str, ops: Iterable[str] = KERNEL_OPS
) -> Iterator[Task]:
    """The checks of a level, the most telling first. Levels: `numerics.plan`.

    Args:
        ops: of `KERNEL_OPS` or "step", which needs all.
    """
    ops = set(KERNEL_OPS if "step" in ops else ops)
    yield from block_checks.tasks(device, impl, level, ops & set(BLOCK_OPS))
    if ops & set(OBJECTIVE_OPS):
        yield from _objective_tasks(device, impl, level, ops & set(OBJECTIVE_OPS))


def _objective_tasks(
    device: torch.device, impl: str, level: str, ops: Iterable[str]
) -> Iterator[Task]:
    """Of `OBJECTIVE_OPS`; those other than "interpolate" need both kernels."""
    on_gpu = device.type == "cuda"
    needed = ("interpolate",) if set(ops) == {"interpolate"} else ("interpolate", "velocity_loss")
    bits_shape = GPU_BITS_SHAPE if on_gpu else CPU_BITS_SHAPE

    def errors(setting: numerics.Setting, shape: tuple[int, ...], dtype: torch.dtype) -> Task:
        name = f"{setting} {shape} {dtype}"
        return name, lambda: numerics.errors(setting, shape, dtype, device, impl, needed)

    def bits(dtype: torch.dtype) -> Task:
        return f"same bits {dtype}", lambda: draws.same_bits(device, impl, bits_shape, dtype)

    plan = numerics.plan(level)
    for setting, dtype in plan:
        if setting == TIMED:
            for shape in GPU_TIMED_SHAPES if on_gpu else CPU_TIMED_SHAPES:
                yield errors(setting, shape, dtype)
    yield "philox words", lambda: draws.integers(device, impl)
    yield "philox normals", lambda: draws.normals(device, impl)
    yield "times", lambda: draws.times(device, impl)
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.bfloat16,):
        yield bits(dtype)
    if set(needed) != {"interpolate"}:
        yield "graph replays", lambda: replay.graph_replays(device, impl)
    for setting, dtype in plan:
        if setting != TIMED:
            yield errors(setting, GPU_SHAPE if on_gpu else CPU_SHAPE, dtype)
    # Last, as it is slow: on a GPU most of a minute, on the CPU minutes.
    if on_gpu and level == "full" and set(needed) != {"interpolate"}:
        yield "torch.compile", lambda: replay.compiled(device, impl)


def run(
    device: torch.device,
    impl: str = "triton",
    level: str = "timed",
    ops: Iterable[str] = KERNEL_OPS,
    deadline: Deadline | None = None,
    found: Callable[[Finding], object] = lambda _: None,
) -> Report:
    """Run the checks of a level. An exception in a check is a failure of that check.

    An interrupt ends the run; the report says so and is not green.

    Args:
        impl: "triton"; "reference" checks the reference with itself, a test of the checks.
        deadline: checks that would not fit are left out, and the report is not green.
        found: told each finding as it comes.
    """
    deadline = deadline or Deadline()
    report = Report()
    expectation = Expectation(first=10.0 if device.type == "cuda" else 2.0, cap=8.0)

    def keep(finding: Finding) -> None:
        report.findings.append(finding)
        found(finding)

    name = "every check"
    try:
        for name, check in tasks(device, impl, level, ops):
            if not deadline.fits(f"check {name}", expectation.seconds()):
                report.left_out.append(name)
                continue
            start = deadline.spent()
            try:
                for finding in check():
                    keep(finding)
                devices.synchronize(device)
            except Exception as error:
                what = f"raised {type(error).__name__}: {str(error).strip()[:300]}"
                keep(Finding(name, what, "", math.inf, 0.0))
            expectation.saw(deadline.spent() - start)
            print(f"{deadline.spent():6.1f} s  {name}", flush=True)
    except KeyboardInterrupt:
        report.left_out.append(f"{name}, and what follows (interrupted)")
        report.interrupted = True
    return report


class Log:
    """A new file of findings as JSON lines, infinite errors as null; each is on disk at once."""

    def __init__(self, path: Path, environment: dict[str, str | None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self._path, self._environment = path, environment

    def add(self, finding: Finding) -> None:
        row = asdict(finding) | {"passed": finding.passed} | self._environment
        row["error"] = finding.error if math.isfinite(finding.error) else None
        with self._path.open("a", encoding="utf-8") as file:
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
        device, deadline = devices.pick(args.device), Deadline(args.deadline)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = devices.environment(device)
    print(", ".join(f"{key} {value}" for key, value in environment.items()), flush=True)
    ops = args.op or FAMILIES.get(args.family, KERNEL_OPS)
    chosen = device, args.impl, args.level, ops, deadline
    if args.out is None:
        report = run(*chosen)
    else:
        name = f"correctness_{args.family}.jsonl" if args.family else "correctness.jsonl"
        report = run(*chosen, Log(args.out / name, environment).add)
    print(report.table(), flush=True)
    if report.interrupted:
        return 130
    return 0 if report.green else 1


if __name__ == "__main__":
    # Python would go on ignoring it where a shell started the suite with "&".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
