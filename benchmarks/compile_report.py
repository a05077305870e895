"""What the kernels compile to, without a GPU: `python -m benchmarks.compile_report`.

What is compiled is what is launched: each case calls the operators on CPU tensors, Triton
itself specialises every launch for the architecture, and the launch is recorded instead of made.
The records are compiled with Triton's own ptxas. One row for each kernel, case and architecture,
and status 1 if any of them spills registers, uses local memory or has an atomic. It says nothing
about speed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from unittest import mock

from benchmarks.compile_cases import CASES, Case
from mixflow_fast.kernels import runtime

ARCHS, KNOWN_ARCHS = (80, 90, 100), (80, 86, 89, 90, 100, 120)


@dataclass(frozen=True)
class Launch:
    """A launch that was not made: the arguments of `triton.compile`."""

    function: object
    key: str = field(repr=False)
    signature: dict[str, str]
    constants: dict
    attributes: dict
    options: dict

    @property
    def kernel(self) -> str:
        return self.function.fn.__name__


class _NoDevice:
    """What Triton asks a driver before it compiles, answered for an architecture."""

    def __init__(self, arch: int) -> None:
        self.target = _target(arch)

    def get_current_device(self) -> str:
        # Triton keeps a launcher for each device: one that no real device has, for each target.
        return f"offline sm_{self.target.arch}"

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> object:
        return self.target


def _target(arch: int) -> object:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Inside, kernels can be launched on CPU tensors: the list grows, outputs stay unwritten."""
    triton, launches = runtime.triton, []

    def record(*, fn, key, compile, **_) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        # JSON knows no tuples, and Triton hashes the options.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        signature, constants = compile["signature"], compile["constants"]
        launches.append(
            Launch(fn.jit_function, key, signature, constants, compile["configs"][0], options)
        )
        return True  # Triton then neither compiles nor launches.

    driver = triton.runtime.driver
    active = driver._active
    with triton.knobs.runtime.scope(), mock.patch.object(runtime, "can_launch", lambda _: True):
        triton.knobs.runtime.jit_cache_hook = record
        driver.set_active(_NoDevice(arch))
        try:
            yield launches
        finally:
            driver.set_active(active)


def launches_of(case: Case, arch: int) -> list[Launch]:
    with recording(arch) as launches:
        case.call(launches.clear)
        return [x for x in launches if not case.kernels or x.kernel in case.kernels]


def compile_launch(launch: Launch, arch: int) -> dict[str, object]:
    """The row of a launch, without the names of its case; see `report`."""
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    triton = runtime.triton
    started = time.perf_counter()
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    with triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=_target(arch), options=launch.options)
    ptx = kernel.asm["ptx"]
    access = global_access(ptx)
    return {
        "arch": f"sm_{arch}",
        "triton": triton.__version__,
        "ptxas": get_ptxas(arch).version,
        "num_warps": kernel.metadata.num_warps,
        **ptxas_usage(log.getvalue()),
        "shared_bytes": kernel.metadata.shared,
        "global_access": access,
        "vector128": narrow_accesses(access) <= scalar_accesses(kernel.asm["ttgir"]),
        "atomics": atomics(ptx),
        "instructions": instructions(ptx),
        "seconds": round(time.perf_counter() - started, 2),
    }


def ptxas_usage(log: str) -> dict[str, int]:
    """Registers of a kernel, and bytes of its spills and stack frame, from `ptxas -v`."""
    registers = re.findall(r"Used (\d+) registers", log)
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    if len(registers) != 1 or not frames:
        raise RuntimeError(f"ptxas -v did not report one kernel's registers and spills:\n{log}")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*frames, strict=True))
    return {
        "registers": int(registers[0]),
        "spill_store_bytes": stores,
        "spill_load_bytes": loads,
        "stack_bytes": stack,
    }


def _code(ptx: str) -> str:
    """The instructions of PTX text, one a line: no comments, labels, directives or debug data."""
    lines = (line.partition("//")[0].strip() for line in ptx.splitlines())
    return "\n".join(line for line in lines if line.endswith(";") and line[0] not in ".;")


def global_access(ptx: str) -> dict[str, int]:
    """How often each global load and store occurs in the PTX: {"load 128": 2, "store 16": 1}."""
    found: Counter[str] = Counter()
    for op, modifiers in re.findall(r"\b(ld|st)((?:\.[\w:]+)+)\s", _code(ptx)):
        parts = modifiers.split(".")
        if "global" in parts:
            lanes = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
            bits = int(re.search(r"\d+$", parts[-1])[0])
            found[f"{'load' if op == 'ld' else 'store'} {lanes * bits}"] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\S*\.global\S* .*?\], (\w+)", _code(ptx)):
        found[f"load {8 * int(size, 0)}"] += 1
    return dict(sorted(found.items()))


def atomics(ptx: str) -> int:
    return len(re.findall(r"\b(?:atom|red|cp\.reduce)\.", _code(ptx)))


def instructions(ptx: str) -> int:
    return len(_code(ptx).splitlines())


def narrow_accesses(access: dict[str, int]) -> int:
    return sum(count for name, count in access.items() if int(name.split()[1]) < 128)


def scalar_accesses(ttgir: str) -> int:
    """Loads and stores of a single value (seed, position, times): they cannot be wide."""
    lines = re.findall(r"^.*\btt\.(?:load|store)\b.*$", ttgir, re.MULTILINE)
    return sum("tensor<" not in line for line in lines)


def is_red(row: dict[str, object]) -> bool:
    names = ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "atomics")
    return any(row[name] for name in names)


def report(cases: Sequence[Case], archs: Sequence[int]) -> Iterator[dict[str, object]]:
    """One row for each distinct launch of the cases and each architecture.

    A row's fields:
        op, kernel, variant: operator, kernel, and the first case that launched it so.
        arch, triton, ptxas: what it was compiled for and with.
        registers: of a thread. num_warps: of a program.
        spill_store_bytes, spill_load_bytes, stack_bytes: of a thread; stack is local memory.
        shared_bytes: of a program.
        global_access: how many loads and stores of how many bits the PTX has.
        vector128: whether everything but single values (seed, times) moves 128 bits at once.
        atomics, instructions: how many the PTX has.
        seconds: compiling took.
    """
    with tempfile.TemporaryDirectory() as folder, runtime.triton.knobs.cache.scope():
        # Triton's own cache would give kernels without what ptxas said of them.
        runtime.triton.knobs.cache.dir = folder
        for arch in archs:
            seen = set()
            for case in cases:
                for launch in launches_of(case, arch):
                    if (launch.kernel, launch.key) in seen:
                        continue
                    seen.add((launch.kernel, launch.key))
                    names = {"op": case.op, "kernel": launch.kernel, "variant": case.variant}
                    try:
                        row = compile_launch(launch, arch)
                    except Exception as error:
                        raise RuntimeError(f"sm_{arch}: {names} does not compile") from error
                    yield names | row


_LINE = "{:<22} {:<14} {:<55} {:>6} {:>5} {:>4} {:>5} {:>5} {:>6} {:>7} {:>7} {:>5}"
_HEAD = ("op", "kernel", "variant", "arch", "warps", "regs", "spill", "stack", "shared", "128-bit")


def _line(row: dict[str, object]) -> str:
    spill = row["spill_store_bytes"] + row["spill_load_bytes"]
    names = (row["op"], row["kernel"].strip("_").removesuffix("_kernel"), row["variant"])
    numbers = (row["num_warps"], row["registers"], spill, row["stack_bytes"], row["shared_bytes"])
    wide = "yes" if row["vector128"] else "no"
    return _LINE.format(*names, row["arch"], *numbers, wide, row["atomics"], row["instructions"])


def main(argv: Sequence[str] | None = None, cases: Sequence[Case] = CASES) -> int:
    """Prints the report; 0, 1 for a red row, 2 where kernels cannot be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report")
    parser.description = "Registers, spills and memory access of every kernel, without a GPU."
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", type=int, nargs="+", choices=KNOWN_ARCHS, default=ARCHS)
    parser.add_argument("--op", action="append", choices=sorted({case.op for case in cases}))
    parser.add_argument("--quick", action="store_true", help="the common variants of every kernel")
    args = parser.parse_args(argv)
    if runtime.triton is None or runtime.interpreting():
        reason = "TRITON_INTERPRET=1 is set" if runtime.triton else "Triton is not installed"
        way_out = "unset it" if runtime.triton else "pip install triton"
        print(f"kernels cannot be compiled: {reason}: {way_out}", file=sys.stderr)
        return 2
    # The launchers' default, said aloud: Triton warns where it is not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    chosen = [c for c in cases if (not args.op or c.op in args.op) and (c.quick or not args.quick)]
    if not args.json:
        print(_LINE.format(*_HEAD, "atomics", "instr"))
    rows = []
    for row in report(chosen, args.arch):
        rows.append(row)
        print(json.dumps(row) if args.json else _line(row), flush=True)
    red = [row for row in rows if is_red(row)]
    if not args.json:
        print(f"{len(rows)} kernels, {len(red)} with spills, local memory or atomics")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
