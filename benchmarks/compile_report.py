"""What the kernels compile to, without a GPU: `python -m benchmarks.compile_report`.

What is compiled is what is launched: each case calls the public functions on CPU tensors, Triton
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch

from benchmarks import block_cases
from mixflow_fast import MixFlow, Moments
from mixflow_fast.kernels import philox, runtime

ARCHS, KNOWN_ARCHS = (80, 90, 100), (80, 86, 89, 90, 100, 120)
SIT, RAE, PIXELS, ODD = (256, 4, 32, 32), (32, 768, 16, 16), (64, 3, 256, 256), (3, 7, 9, 5)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled.

    Attributes:
        op: the operator's name.
        variant: what is particular about this call.
        call: makes it, and calls its argument where what went before was only preparation.
        quick: whether `--quick` has it.
    """

    op: str
    variant: str
    call: Callable[[Callable[[], None]], object]
    quick: bool = False


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
        return list(launches)


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


def _prepare(shape, dtype, given=False, moments=False, patch_size=None, **options):
    x1 = torch.empty(shape, dtype=dtype)
    taken = {}
    if given:
        t = torch.zeros(shape[0])
        taken = dict(x0=torch.empty(shape, dtype=dtype), t=t, slowed_t=t)
    mix = MixFlow(**{"clock": "data_at_1", "impl": "triton"} | options)
    return mix, mix.prepare(Moments(x1, x1) if moments else x1, patch_size=patch_size, **taken)


def _interpolate(mark, **options):
    _prepare(**options)


def _loss(
    mark,
    shape,
    dtype,
    pred_dtype=None,
    mode="full",
    tokens=None,
    weight=None,
    reduction="mean",
    learn_sigma=False,
    **options,
):
    """mode: "forward" (no gradient), "full" (both in one), "backward" (what follows, alone)."""
    mix, it = _prepare(shape, dtype, **options)
    B, C, H, W = shape
    C *= 2 if learn_sigma else 1
    pred_shape = (B, H // tokens * (W // tokens), tokens**2 * C) if tokens else (B, C, H, W)
    pred = torch.empty(pred_shape, dtype=pred_dtype or dtype, requires_grad=mode != "forward")
    weight = None if weight is None else torch.ones(weight)
    mark()
    loss = mix.loss(pred, it, weight=weight, reduction=reduction, learn_sigma=learn_sigma)
    if mode == "backward":
        mark()
        torch.autograd.grad(loss, pred, torch.ones_like(loss))


def _normal(mark, shape):
    numel = torch.Size(shape[1:]).numel()
    philox.normal(0, philox.Stream.NOISE, torch.arange(shape[0]), numel, impl="triton")


def _cases() -> list[Case]:
    """Every kind of launch at least once: not every product of kinds."""

    def case(op, call, variant, shape, quick=False, **options):
        return Case(op, variant, partial(call, shape=shape, **options), quick)

    interpolate = partial(case, "interpolate", _interpolate)
    loss = partial(case, "velocity_loss", _loss)
    backward = partial(case, "velocity_loss", _loss, mode="backward")
    scale = partial(case, "scale_gradient_", _loss, mode="backward")
    noise_at_1 = {"clock": "noise_at_1"}
    plain = [("rae bf16", RAE, BF16), ("rae fp32", RAE, FP32)]
    plain += [("sit bf16", SIT, BF16), ("sit fp32", SIT, FP32)]
    return [
        *(interpolate(name, shape, True, dtype=dtype) for name, shape, dtype in plain),
        interpolate("rae bf16 tokens", RAE, dtype=BF16, patch_size=1),
        interpolate("sit bf16 tokens of 2", SIT, dtype=BF16, patch_size=2),
        interpolate("rae bf16 given", RAE, dtype=BF16, given=True),
        interpolate(
            *("sit bf16 moments, gvp, full interval, noise at 1", SIT),
            **dict(dtype=BF16, moments=True, path="gvp", interval="full", **noise_at_1),
        ),
        interpolate("sit fp16 moments, tokens of 2", SIT, dtype=FP16, moments=True, patch_size=2),
        interpolate(
            *("rae bf16 logit-normal, shift, noise at 1", RAE),
            **dict(dtype=BF16, timesteps="logit-normal", shift=6.93, **noise_at_1),
        ),
        interpolate(
            *("odd fp16 vp, uniform, raw interval, shift", ODD),
            **dict(dtype=FP16, path="vp", timesteps="uniform", interval="raw", shift=2.0),
        ),
        interpolate("odd fp32 tokens", ODD, dtype=FP32, patch_size=1),
        *(loss(name, shape, True, dtype=dtype) for name, shape, dtype in plain),
        loss("rae fp32 data, bf16 prediction", RAE, dtype=FP32, pred_dtype=BF16),
        loss("pixels bf16, no gradient", PIXELS, dtype=BF16, mode="forward"),
        loss("sit bf16 tokens of 2, sigma", SIT, True, dtype=BF16, tokens=2, learn_sigma=True),
        loss("rae bf16 tokens", RAE, dtype=BF16, tokens=1),
        loss(
            *("sit bf16 moments, gvp, noise at 1", SIT),
            **dict(dtype=BF16, moments=True, path="gvp", **noise_at_1),
        ),
        loss("rae bf16 given", RAE, dtype=BF16, given=True),
        loss("sit bf16 data prediction", SIT, dtype=BF16, prediction="data"),
        loss(
            *("sit bf16 score, vp, likelihood weight, sigma", SIT),
            **dict(dtype=BF16, prediction="score", path="vp", loss_weight="likelihood"),
            learn_sigma=True,
        ),
        loss(
            *("sit fp16 noise, gvp, velocity weight, weight per sample", SIT),
            **dict(dtype=FP16, prediction="noise", path="gvp", loss_weight="velocity"),
            **dict(weight=SIT[:1], reduction="none"),
        ),
        loss("sit bf16 mask", SIT, dtype=BF16, weight=(SIT[0], 1, *SIT[2:])),
        loss("odd fp32 tokens of 3", (3, 7, 9, 6), dtype=FP32, tokens=3),
        backward("sit fp16", SIT, dtype=FP16),
        backward("odd fp16 per sample", ODD, dtype=FP16, reduction="none"),
        scale("rae bf16", RAE, True, dtype=BF16),
        scale("sit fp32 per sample", SIT, dtype=FP32, reduction="none"),
        case("normal", _normal, "sit", SIT, True),
        case("normal", _normal, "odd", ODD),
    ]


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


CASES = [*_cases(), *(Case(*row) for row in block_cases.rows())]
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
