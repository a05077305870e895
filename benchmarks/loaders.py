"""Loaders of training data on this machine: `python -m benchmarks.loaders`.

Parts of `benchmarks/data.py` and, on a GPU, what `mixflow-fast data bench` measures: batches that
have reached the device. Loaders of a part take turns; rows are rates, CPU time and ratios by round.
A part whose packages are not installed is named and left out.

Exit status: 0 measured, 1 a part failed, 2 no such device.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import rows
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.data.throughput import Contestant, Rates, race
from mixflow_fast.messages import error_line

Make = Callable[[Path, argparse.Namespace, contextlib.ExitStack], dict[str, Contestant]]
# Shape of an example in the rows.
SHAPES = {"device-256": [3, 256, 256], "images-256": [3, 256, 256], "latents": [8, 32, 32]}
NEEDS = {"device-256": ("sklearn",), "images-256": ("sklearn", "nvidia.dali"), "latents": ()}
# Seconds of a part besides its turns: files are written, workers start.
AROUND = 30.0


def to_device(
    folder: Path, options: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, Contestant]:
    """Prepared images, decoded by threads and by DALI, in batches on the device."""
    from benchmarks.data_files import write_jpegs, write_prepared
    from mixflow_fast.cli.data.bench import loaders_of
    from mixflow_fast.data.prepared_images import PreparedImages

    jpegs = folder / "jpegs for the device"
    write_jpegs(jpegs, options.images)
    size = 64 if options.smoke else 256
    images = PreparedImages(write_prepared(jpegs, folder / "webp for the device", size, "webp"))
    batch = 4 if options.smoke else 64
    found, left_out = loaders_of(
        images, torch.device(options.device), options.threads, batch, stack
    )
    for line in left_out:
        print(line)
    return found


def _of_data(part: str) -> Make:
    from benchmarks import data

    return data.LOADERS[part]


def parts(smoke: bool) -> dict[str, Callable[[], Make]]:
    """What makes the loaders of each part. A smoke run leaves out what starts processes."""
    found = {"latents": partial(_of_data, "latents"), "device-256": lambda: to_device}
    return found if smoke else found | {"images-256": partial(_of_data, "images-256")}


def write_rows(writer: rows.Writer, part: str, rates: dict[str, Rates], options) -> None:
    """Rows of a part, and a line on each loader."""
    base = next(iter(rates))
    how = f"turns of {options.seconds} s, {options.threads} threads or workers each"
    for name, found in rates.items():
        fields = dict(op="loader", provider=name, mode=part, shape=SHAPES[part], dtype="uint8")
        fields |= dict(timing=how, note="")
        for metric, values in (("examples_per_s", found.per_s), ("cpu_ms", found.cpu_ms)):
            writer.add(metric=metric, **rows.percentiles(values)._asdict(), **fields)
        ratio = "1"
        if name != base:
            times = [[1 / rate for rate in each.per_s] for each in (rates[base], found)]
            ratio = rows.paired_ratio(*times)
            fields["note"] = "per round"
            writer.add(metric=f"speedup_over_{base}", **ratio._asdict(), **fields)
        print(f"  {part:11} {name:18} {found.per_s[0]:12,.0f} /s  {ratio} of {base}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loaders", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, metavar="S", help="seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/loaders"))
    parser.add_argument("--smoke", action="store_true", help="few data, a test of the harness")
    options = parser.parse_args(argv)
    try:
        device, deadline = rows.pick(options.device), rows.Deadline(options.deadline)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    options.seconds, options.rounds = (0.02, 1) if options.smoke else (3.0, 5)
    options.images, options.rows = (8, 64) if options.smoke else (512, 4096)
    options.threads = 1 if options.smoke else max(1, min(16, len(os.sched_getaffinity(0)) - 1))
    environment = rows.environment(device)
    note = "smoke: not a speed" if options.smoke else ""
    writer = rows.Writer(options.out / "rows.jsonl", environment, note)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    before = rows.conditions(device)
    print(before, flush=True)
    failed = []
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for part, make in parts(options.smoke).items():
            if missing := [name for name in NEEDS[part] if not _is_there(name)]:
                print(f"{part}: left out, not installed: {', '.join(missing)}", flush=True)
            elif deadline.fits(part, 0.0 if options.smoke else AROUND):
                try:
                    with contextlib.ExitStack() as stack:
                        loaders = make()(Path(folder), options, stack)
                        rates = race(loaders, options.seconds, options.rounds)
                    write_rows(writer, part, rates, options)
                except Exception as error:  # the other parts are worth having
                    failed.append(f"{part}: {error_line(error)}")
                    print(f"RED {failed[-1]}", flush=True)
    state = environment | {"before": before, "after": rows.conditions(device)}
    rows.keep_state(options.out, "loaders", state)
    if deadline.left_out:
        print(deadline.report())
    print(f"{writer.count} rows in {writer.path}, {deadline.spent():.1f} s")
    return 1 if failed else 0


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
