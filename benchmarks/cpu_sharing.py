"""What other work costs a small run on a CPU, by how OpenMP's threads wait.

    python -m benchmarks.cpu_sharing              # on an otherwise idle machine: three conditions

The recipe `photos` trains for some seconds in a process of its own, alone, beside one busy loop,
and beside as many as `--load` says. The ways to wait take turns in every round; a row is images/s,
and the summary is the median of a way over that of the runtime's default, alone, in the same run:

    default     as OpenMP's runtime waits when nothing is set: libgomp spins for milliseconds
    short       GOMP_SPINCOUNT=1000
    passive     OMP_WAIT_POLICY=PASSIVE
    chosen      what `mixflow-fast` sets by itself, by what runs when it starts
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mixflow_fast.cli.errors import quiet_without_reader

# libgomp does not know the first, and libomp waits so anyway; that it is set keeps
# `openmp.choose_waiting` from choosing.
WAYS: Mapping[str, Mapping[str, str]] = {
    "default": {"KMP_BLOCKTIME": "200"},
    "short": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "chosen": {},
}
_SET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_START_TIMEOUT_S = 300.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way and condition")
    parser.add_argument("--seconds", type=float, default=5.0, help="training that is timed")
    parser.add_argument("--load", type=int, default=8, help="busy loops of the third condition")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args(argv)
    rates: dict[tuple[int, str], list[float]] = {}
    for number in range(options.rounds):
        first = number % len(options.ways)
        for busy in (0, 1, options.load):
            for way in [*options.ways[first:], *options.ways[:first]]:
                with busy_loops(busy):
                    rate = images_per_s(WAYS[way], options.seconds)
                rates.setdefault((busy, way), []).append(rate)
                row = {"busy": busy, "way": way, "round": number, "images_per_s": round(rate, 1)}
                print(json.dumps(row | {"cores": os.cpu_count()}), flush=True)
    alone = statistics.median(rates[0, options.ways[0]])
    for (busy, way), found in rates.items():
        middle = statistics.median(found)
        print(f"{busy} busy loops, {way}: {middle:,.0f} images/s, {middle / alone:.2f} of alone")
    return 0


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """That many processes that do nothing but take a core."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def images_per_s(way: Mapping[str, str], seconds: float) -> float:
    """Rate of a run of the recipe `photos` between its first step and `seconds` later."""
    environment = {name: value for name, value in os.environ.items() if name not in _SET}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mixflow_fast.cli", "train", "photos", f"out={folder}/run"]
        settings = ["train.images=1e9", "train.log_every=1", "train.save_every=0"]
        run = subprocess.Popen(
            [*command, *settings, "train.device=cpu"],
            env=environment | {"DS_ACCELERATOR": "cpu"} | way,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            file = Path(folder, "run", "metrics.jsonl")
            began, first = _wait_for_step(run, file, 0)
            time.sleep(seconds)
            ended, last = _wait_for_step(run, file, first)
            return 64 * (last - first) / (ended - began)
        finally:
            run.kill()
            run.wait()


def _wait_for_step(run: subprocess.Popen, file: Path, after: int) -> tuple[float, int]:
    """(now, newest step) as soon as a step later than `after` is in the file."""
    limit = time.perf_counter() + _START_TIMEOUT_S
    while time.perf_counter() < limit:
        steps = [0]
        with contextlib.suppress(OSError):
            lines = file.read_text().splitlines()
            # The last line may be half written.
            steps += [step_of(line) for line in lines[-50:]]
        if max(steps) > after:
            return time.perf_counter(), max(steps)
        if run.poll() is not None:
            raise RuntimeError(f"the run ended with {run.returncode} before it was timed")
        time.sleep(0.02)
    raise RuntimeError(f"no step after {after} within {_START_TIMEOUT_S:.0f} s")


def step_of(line: str) -> int:
    """Step of a training row; 0 for any other line, and for half of one."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        return 0
    return row["step"] if "images_per_s" in row else 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
