"""The first half minute on a GPU nobody has measured: `python -m benchmarks.first_contact`.

Versions, the rates of a copy and of a matrix product, the device's approximate functions
(`benchmarks/approximations.py`), and each kernel once at a small shape: does it compile, run and
give the right numbers, and how long did the first call take. The same of the optimizer's step in a
CUDA graph. What follows in the suite costs minutes; this says first whether they are worth
spending.

Exit status: 0 all right, 1 a kernel is wrong or failed, 2 no such device.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import rows, timing
from benchmarks.approximations import APPROXIMATIONS, COUNT, SMOKE_COUNT, sweep
from benchmarks.checks import verify
from benchmarks.ops import KERNEL_OPS, REGISTRY, Cell, kernel_cells
from benchmarks.step_optimizers import describe_adamwema
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.diagnostics.kernel_replays import optimizer_replays
from mixflow_fast.messages import error_line

# What other parts use where it is installed.
PACKAGES = ("triton", "numpy", "matplotlib", "torchdiffeq", "deepspeed", "liger_kernel",
            "flash_attn", "apex", "nvidia-dali-cuda130", "diffusers", "scikit-learn")  # fmt: skip
SECONDS = 30.0


def describe(device: torch.device) -> list[str]:
    """The machine and the packages, a line each."""
    lines = [f"python {sys.version.split()[0]}, {torch.get_num_threads()} threads"]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        lines.append(
            f"{found.name}: sm_{found.major}{found.minor}, {found.multi_processor_count} "
            f"multiprocessors, {found.total_memory / 2**30:.1f} GiB"
        )
    versions = []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {name}")
    return [*lines, ", ".join(versions)]


def write_rates(device: torch.device, writer: rows.Writer) -> None:
    """Rows of a copy and of a product, on a CPU of small ones."""
    if device.type == "cuda":
        copy, size = timing.copy_bandwidth(timing.CudaTimer()) / 1e9, 8192
        product = timing.matmul_tflops(size)
    else:
        source, size = torch.ones(1 << 20), 256
        ms = min(timing.wall_ms(source.clone, 1, device) for _ in range(3))
        copy = 2 * source.nbytes / ms / 1e6
        a = torch.ones(size, size)
        ms = min(timing.wall_ms(lambda: a @ a, 1, device) for _ in range(3))
        product = 2 * size**3 / ms / 1e9
    fields = dict(provider="torch", mode="forward")
    elements = 1 << 28 if device.type == "cuda" else 1 << 20
    writer.add(op="copy", metric="gb_per_s", p50=copy, shape=[elements], dtype="float32",
               note="read plus written", **fields)  # fmt: skip
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    writer.add(op="matmul", metric="model_tflops", p50=product, shape=3 * [size], dtype=dtype,
               note=f"{dtype} product", **fields)  # fmt: skip
    print(f"copy {copy:.4g} GB/s, product of {size}^3 {product:.3g} TFLOP/s", flush=True)


def write_approximations(device: torch.device, writer: rows.Writer, count: int) -> None:
    """Rows of each instruction's largest error, and of results of lg2 above zero.

    Raises:
        ValueError: results that are no number, of which one ends a run; after all rows.
    """
    faulty = []
    how = "every value asked once" if device.type == "cuda" else "PyTorch's: no GPU"
    for name in APPROXIMATIONS:
        found = sweep(name, device, count)
        fields = dict(op=name, provider="device", mode="forward", shape=[found.count],
                      dtype="float32", timing=None)  # fmt: skip
        # Of a result that is no number there is no error to write down; the next row counts them.
        error = found.error if math.isfinite(found.error) else None
        writer.add(metric="max_abs_error", p50=error, note=f"at {found.at!r}; {how}", **fields)
        writer.add(metric="nan_results", p50=float(found.nan), note=how, **fields)
        text = f"{name}: largest error {found.error:.3g} at {found.at!r}, {found.nan} NaN"
        if name == "lg2.approx":
            note = f"largest result {found.largest!r}; {how}"
            writer.add(metric="positive_results", p50=float(found.positive), note=note, **fields)
            text += f", {found.positive} positive of {found.count} (largest {found.largest!r})"
        print(text, flush=True)
        faulty += [f"{name} gave NaN for {found.nan} of {found.count} values"] * (found.nan > 0)
    if faulty:
        raise ValueError("; ".join(faulty))


def write_optimizer(device: torch.device, writer: rows.Writer) -> None:
    """A row of the optimizer's first steps in a CUDA graph, held against the same without one.

    Raises:
        ValueError: they differ; after the row.
    """
    start = time.perf_counter()
    findings = list(optimizer_replays(device))
    ms = (time.perf_counter() - start) * 1e3
    faults = [f"{f.tensor} is off by {f.error:.3g}" for f in findings if not f.passed]
    how = "CUDA graph" if device.type == "cuda" else "no graph: no GPU"
    note = f"20 steps with their capture and 20 without; {how}; {describe_adamwema(device.type)}; "
    writer.add(op="optimizer", provider="mixflow_fast_captured", mode="step",
               metric="first_call_ms", p50=ms, shape=[1027], dtype="float32",
               timing="one call", note=note + ("; ".join(faults) or "right"))  # fmt: skip
    print(f"{'RED' if faults else 'ok':4}{ms:10.1f} ms  optimizer's steps, {note}", flush=True)
    if faults:
        raise ValueError("; ".join(faults))


def write_kernels(
    device: torch.device, writer: rows.Writer, deadline: rows.Deadline, ops: Sequence[str]
) -> list[str]:
    """A row of each kernel cell's first call; what was wrong, a line each."""
    impl = "triton" if device.type == "cuda" else "reference"
    wrong, expected = [], rows.Expectation(first=3.0, cap=6.0)
    for cell in kernel_cells(ops, smoke=True):
        if not deadline.fits(cell.label, expected.seconds()):
            continue
        start = deadline.spent()
        ms, faults = _first_call(cell, device, impl)
        expected.saw(deadline.spent() - start)
        note = "first call, compilation included; " + ("; ".join(faults) or "right")
        out = rows.CellRows(
            writer, cell.op, cell.mode, cell.variant, list(cell.shape), cell.dtype_name, "one call"
        )
        out.add("mixflow_fast", "first_call_ms", ms, note)
        print(f"{'RED' if faults else 'ok':4}{ms or 0:10.1f} ms  {cell.label}", flush=True)
        wrong += [f"{cell.label}: {fault}" for fault in faults]
    return wrong


def _first_call(cell: Cell, device: torch.device, impl: str) -> tuple[float | None, list[str]]:
    """(milliseconds, what is wrong)."""
    op = REGISTRY[cell.op]
    try:
        inputs = op.inputs(cell, device)
        start = time.perf_counter()
        call, _ = op.ours(cell, inputs, impl)
        made = call()
        rows.synchronize(device)
        ms = (time.perf_counter() - start) * 1e3
        return ms, verify(cell, inputs, made, "mixflow_fast")
    except Exception as error:  # the other kernels are worth knowing
        return None, [error_line(error)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_contact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--deadline", type=float, metavar="S", default=SECONDS, help="seconds")
    parser.add_argument("--out", type=Path, metavar="FOLDER", default=Path("runs/first_contact"))
    parser.add_argument("--op", action="append", choices=KERNEL_OPS, help="repeatable")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, a test of the harness")
    options = parser.parse_args(argv)
    try:
        device, deadline = rows.pick(options.device), rows.Deadline(options.deadline)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    environment = rows.environment(device)
    note = "smoke: not a speed" if options.smoke else ""
    writer = rows.Writer(options.out / "rows.jsonl", environment, note)
    print(", ".join(f"{key} {value}" for key, value in environment.items()))
    before = rows.conditions(device)
    print("\n".join([*describe(device), before]), flush=True)
    wrong = []
    count = SMOKE_COUNT if options.smoke else COUNT
    first = {
        "rates": partial(write_rates, device, writer),
        "approximations": partial(write_approximations, device, writer, count),
        "optimizer": partial(write_optimizer, device, writer),
    }
    for name, write in first.items():
        try:
            write()
        except Exception as error:  # the kernels are worth knowing all the same
            wrong.append(f"{name}: {error_line(error)}")
    wrong += write_kernels(device, writer, deadline, options.op or KERNEL_OPS)
    state = environment | {"before": before, "after": rows.conditions(device)}
    rows.keep_state(options.out, "first contact", state)
    if deadline.left_out:
        print(deadline.report())
    if wrong:
        print("RED:", *wrong, sep="\n  ")
    print(f"{writer.count} rows in {writer.path}, {deadline.spent():.1f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
