"""What the kernels compile to, without a GPU: `python -m benchmarks.compile_report`.

What is compiled is what is launched: each case calls the operators on CPU tensors, Triton
itself specialises every launch for the architecture, and the launch is recorded instead of made.
The records are compiled with Triton's own ptxas. `CASES` has every kind of launch at least once,
not every product of kinds. One row for each kernel, case and architecture, and status 1 if any of
them spills registers, uses local memory or has an atomic.

It measures no speed. Beside each kernel stand two times that an H200 cannot be faster than: that of
issuing the kernel's instructions, where the number of rounds of its loop is known, and that of
moving the bytes of the tensors it is given, each once.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import machine_code
from benchmarks.kernel_work import Work, work_of
from benchmarks.noise_code import normal_formulas
from benchmarks.recorded_launches import Launch, recording, target_of
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.diagnostics.block_cases import EPS, VARIANTS, BlockCase
from mixflow_fast.diagnostics.kernel_cases import ObjectiveCase, Setting
from mixflow_fast.diagnostics.source_cases import SourceCase
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.attention.qk_norm_rope import QkOptions, finish, prepare
from mixflow_fast.kernels.dropout import dropout, layer_keys

RED = ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "atomics")
ARCHS, KNOWN_ARCHS = (80, 90, 100), (80, 86, 89, 90, 100, 120)
CPU = torch.device("cpu")
# What bounds an H200: instructions that its threads issue (132 multiprocessors, 4 warps of 32
# threads a clock, 1.98 GHz), and what a copy reaches.
ISSUE_PER_US, BYTES_PER_US = 132 * 4 * 32 * 1980, 4.3e6
SIT, RAE, ODD = (256, 4, 32, 32), (256, 768, 16, 16), (3, 7, 9, 5)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call whose launches are compiled.

    Attributes:
        call: makes it, and calls its argument where what went before was only preparation.
        kernels: those of its launches that are the operator's; all, if empty.
    """

    op: str
    variant: str
    call: Callable[[Callable[[], None]], object]
    quick: bool = False
    kernels: tuple[str, ...] = ()


def _objective(variant: str, quick: bool, case: ObjectiveCase) -> list[Case]:
    """A case for each operator that `MixFlow` calls, with the kernels that are its own."""
    kernels = {
        "interpolate": ("_interpolate_kernel",),
        "velocity_loss": ("_velocity_loss_kernel", "_reduce_kernel"),
        "scale_gradient_": ("_scale_gradient_kernel",),
    }
    return [Case(op, variant, partial(_launch, case), quick, own) for op, own in kernels.items()]


def _name(case: BlockCase) -> str:
    words = [case.variant, "x".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")]
    words += ["recompute"] if case.mode == "recompute" else []
    words += [f"no {name}" for name in case.without] + [f"frozen {n}" for n in case.frozen]
    words += [f"vectors {case.vector_dtype}"] if case.vector_dtype else []
    return " ".join(words)


def _block(op: str, variant: str, shape: Shape, quick: bool = False, **options: object) -> Case:
    case = BlockCase(op=op, variant=variant, shape=shape, **options)
    return Case(op, _name(case), partial(_launch, case), quick)


def _launch(case: ObjectiveCase | SourceCase | BlockCase, mark: Callable[[], None]) -> None:
    call = case.call(case.inputs(CPU, empty=True), "triton")
    mark()
    call()


def _around_attention(
    variant: str, shape: Shape, quick: bool = False, packed: bool = False, **options: object
) -> Case:
    """What stands around a backend of `attention`; `packed`: one which writes packed gradients."""
    case = BlockCase(op="attention", variant=variant, shape=shape, **options)

    def call(mark: Callable[[], None]) -> None:
        given = {name: x.detach() for name, x in case.inputs(CPU, empty=True).tensors.items()}
        qkv, norm = given["qkv"], VARIANTS[variant].norm or "none"
        tensors = {name: given.get(name) for name in QkOptions._fields[:6]}
        qk = QkOptions(**tensors, norm=norm, eps=EPS)
        if variant != "plain":
            prepare(qkv, qk, "triton")
        out = torch.empty_like(qkv)
        gradients = tuple(torch.empty(shape, dtype=case.dtype) for _ in range(3))
        finish(out.unbind(2)[:2] if packed else gradients, out, qkv, qk, "triton")

    return Case("attention", _name(case) + (", packed" if packed else ""), call, quick)


def _normal(shape: Shape, mark: Callable[[], None]) -> None:
    numel = torch.Size(shape[1:]).numel()
    philox.normal(0, philox.Stream.NOISE, torch.arange(shape[0]), numel, impl="triton")


def _dropout(shape: Shape, dtype: torch.dtype, mark: Callable[[], None]) -> None:
    x, positions = torch.empty(shape, dtype=dtype), torch.arange(shape[0])
    mark()
    dropout(x, 0.13, layer_keys(0, 1)[0], positions, "triton")


def _objective_cases() -> Iterator[Case]:
    for name, shape in (("rae", RAE), ("sit", SIT)):
        for short, dtype in (("bf16", BF16), ("fp32", FP32)):
            case = ObjectiveCase(shape=shape, dtype=dtype, drawn=True)
            yield from _objective(f"{name} {short}", True, case)
    rest = {"prediction": "score", "path": "vp", "loss_weight": "likelihood", "sigma": True}
    noise = {"prediction": "noise", "path": "gvp", "loss_weight": "velocity", "weight": "sample"}
    logit = {"timesteps": "logit-normal", "shift": 6.93, "clock": "noise_at_1"}
    settings = (
        (SIT, FP16, Setting()),
        (ODD, FP16, Setting()),
        (RAE, BF16, Setting(patch_size=1)),
        (SIT, BF16, Setting(patch_size=2)),
        (SIT, BF16, Setting(patch_size=2, sigma=True)),
        ((3, 7, 9, 6), FP32, Setting(patch_size=3)),
        (ODD, FP32, Setting(patch_size=1)),
        (SIT, FP16, Setting(moments=True, patch_size=2)),
        (SIT, BF16, Setting(path="gvp", interval="full", moments=True, clock="noise_at_1")),
        (RAE, BF16, Setting(**logit)),
        (ODD, FP16, Setting(path="vp", timesteps="uniform", interval="raw", shift=2.0)),
        (SIT, BF16, Setting(prediction="data")),
        (SIT, BF16, Setting(**rest)),
        (SIT, FP16, Setting(**noise)),
        (SIT, BF16, Setting(weight="mask")),
    )
    cases = [ObjectiveCase(shape=s, setting=o, dtype=d, drawn=True) for s, d, o in settings]
    cases += [
        ObjectiveCase(shape=RAE, dtype=FP32, pred_dtype=BF16, drawn=True),
        ObjectiveCase(shape=(64, 3, 256, 256), mode="forward", drawn=True),
        ObjectiveCase(shape=RAE, noise_dtype=BF16, setting=Setting(ids=False)),
    ]
    for case in cases:
        quick = case.setting.sigma and case.setting.patch_size is not None
        yield from _objective(case.label, quick, case)
    yield Case("normal", "sit", partial(_normal, SIT), True)
    yield Case("normal", "odd", partial(_normal, ODD))
    # A block of SongUNet-CIFAR10.
    yield Case("dropout", "bf16", partial(_dropout, (64, 256, 32, 32), BF16), True)
    yield Case("dropout", "fp32", partial(_dropout, (64, 256, 32, 32), FP32))
    yield Case("dropout", "odd", partial(_dropout, ODD, FP32))


def _source_cases() -> Iterator[Case]:
    kernels = ("_mixed_source_kernel", "_source_backward_kernel")
    quick = [
        ("rae bf16", SourceCase(shape=RAE, drawn=True)),
        ("rae fp32", SourceCase(shape=RAE, dtype=FP32, drawn=True)),
        ("rae bf16 samples", SourceCase(shape=RAE, mixes="samples", drawn=True)),
        ("sit bf16 tokens", SourceCase(shape=SIT, patch_size=2, drawn=True)),
    ]
    cases = (
        SourceCase(shape=RAE, mixes="samples", dtype=FP32, drawn=True),
        SourceCase(shape=SIT, dtype=FP16, path="gvp", clock="noise_at_1", drawn=True),
        SourceCase(shape=ODD, dtype=FP16, path="vp", mixes="samples", drawn=True),
        SourceCase(shape=ODD, drawn=True),
        SourceCase(shape=SIT, dtype=FP32, patch_size=2, mixes="samples", drawn=True),
        SourceCase(shape=RAE, patch_size=1, drawn=True),
        SourceCase(shape=RAE, mixes="samples"),
        SourceCase(shape=(64, 3, 64, 64), drawn=True),
    )
    named = [*quick, *((case.label.removeprefix("mixed_source "), case) for case in cases)]
    for number, (name, case) in enumerate(named):
        launch = partial(_launch, case)
        yield Case("mixed_source", name, launch, number < len(quick), kernels)


def _norm_cases() -> Iterator[Case]:
    sample, rms, rms_token = "layer per sample", "rms per sample", "rms per token"
    xl, head, wide = (256, 256, 1152), (64, 256, 2048), (8, 256, 4096)
    bare, no_shift = ("h_bias",), ("shift",)
    norm, alone = (partial(_block, op) for op in ("residual_norm", "modulated_norm"))
    yield norm(sample, xl, without=bare, quick=True)
    yield norm(sample, xl, without=bare, dtype=FP32, quick=True)
    yield norm(rms_token, head, without=bare, quick=True)
    yield alone(sample, xl, quick=True)
    yield norm(sample, xl, without=bare, frozen=("shift", "scale", "gate"))
    yield norm("layer per token", head, without=bare)
    yield norm("layer per token", wide, without=bare)
    yield norm(rms_token, (3, 7, 33), without=bare, dtype=FP32)
    yield norm(rms_token, head, without=bare + no_shift, dtype=FP32)
    yield norm(sample, xl, without=bare, dtype=FP32, vector_dtype=BF16)
    yield norm(rms, (64, 256, 1152), without=no_shift, dtype=FP32)
    yield norm(sample, (256, 256, 384))
    yield norm(sample, (256, 256, 768), dtype=FP16)
    yield norm(sample, head)
    yield norm(rms, head, dtype=FP32)
    yield alone(sample, xl, mode="recompute")
    # Without a branch, and x' is used elsewhere.
    yield norm(sample, xl, mode="recompute", without=("h", "gate", "h_bias"))
    yield alone(rms_token, head)
    # Forward and backward pass, and the backward pass that recomputes y.
    for mode in ("full", "recompute"):
        yield norm(sample, xl, mode=mode, quick=True)
        yield norm(sample, xl, mode=mode, dtype=FP32)
        yield norm(sample, (256, 256, 1024), mode=mode)
        yield norm(rms, (64, 256, 1152), mode=mode)
        yield norm(rms_token, head, mode=mode)
        yield norm(rms, wide, mode=mode, dtype=FP32)
        yield norm(rms_token, wide, mode=mode, dtype=FP32)
        yield norm(sample, (3, 7, 1023), mode=mode, dtype=FP16)
        yield norm(sample, wide, mode=mode)
    recompute = partial(norm, mode="recompute", dtype=FP32)
    yield recompute(sample, xl, vector_dtype=BF16)
    yield recompute(rms_token, head, without=no_shift)


def _activation_cases() -> Iterator[Case]:
    for op, width, narrow, odd in (("gelu", 4608, 1536, 1023), ("swiglu", 11008, 4096, 2046)):
        row, wide = partial(_block, op, "bias"), (32, 256, width)
        recompute = partial(row, mode="recompute")
        yield row(wide, quick=True)
        yield row(wide, dtype=FP32, quick=True)
        yield row(wide, vector_dtype=FP32)
        yield row(wide, without=("bias",))
        yield row(wide, frozen=("bias",))
        yield row((32, 256, narrow), dtype=FP16)
        yield row((2, 7, odd))
        yield recompute(wide, quick=True)
        yield recompute(wide, dtype=FP32)
        for shape in ((2, 7, 2046), (257, 257, width), (1, 1, width)):
            yield recompute(shape)
    yield _block("swiglu", "bias", (32, 256, 2 * 2730))


def _attention_cases() -> Iterator[Case]:
    xl, b, odd = (32, 256, 16, 72), (32, 256, 12, 64), (2, 5, 3, 10)
    head, row = (32, 256, 16, 128), _around_attention
    for variant in ("rope", "layer"):
        yield row(variant, xl, quick=True)
        yield row(variant, b, dtype=FP16)
    yield row("rms, rope", xl)
    yield row("rms, rope", odd)
    yield row("rope", xl, dtype=FP32)
    yield row("rope", head)
    yield row("rope", odd, dtype=FP16)
    yield row("layer", xl, vector_dtype=FP32)
    yield row("layer", xl, packed=True, dtype=FP32)
    yield row("layer", (2, 5, 3, 33), dtype=FP32)
    yield row("rms, rope", head)
    yield row("rms, rope", xl, packed=True, dtype=FP32)
    yield row("plain", xl)


CASES = [
    *(*_objective_cases(), *_source_cases()),
    *(*_norm_cases(), *_activation_cases(), *_attention_cases()),
]


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
    source = ASTSource(launch.function, *launch.source)
    with triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=target_of(arch), options=launch.options)
    ptx = kernel.asm["ptx"]
    access = machine_code.global_access(ptx)
    usage = machine_code.ptxas_usage(log.getvalue())
    narrow = machine_code.narrow_accesses(access)
    return {
        "arch": f"sm_{arch}",
        "triton": triton.__version__,
        "ptxas": get_ptxas(arch).version,
        "num_warps": kernel.metadata.num_warps,
        **usage,
        "spills": usage["spill_store_bytes"] + usage["spill_load_bytes"],
        "shared_bytes": kernel.metadata.shared,
        "global_access": access,
        "vector128": narrow <= machine_code.scalar_accesses(kernel.asm["ttgir"]),
        "atomics": machine_code.atomics(ptx),
        "instructions": machine_code.instructions(ptx),
        **_bounds(launch, kernel.asm["cubin"]),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _bounds(launch: Launch, cubin: bytes) -> dict[str, object]:
    """The two times in us, how normals are made, and what an element costs in instructions."""
    instructions = machine_code.parse(machine_code.disassemble(cubin))
    code = machine_code.split(instructions)
    bounds = {"issue_us": None, "bytes_us": launch.moved_bytes / BYTES_PER_US}
    bounds["normals"] = normal_formulas(instructions)
    work = work_of(launch.kernel, launch.arguments, launch.options["num_warps"], code)
    if work is None and code.loop:
        return bounds  # nobody knows how often it goes round
    known, work = work is not None, work or Work(rounds=0, elements=1)
    issued = len(code.once) + len(code.loop) * work.rounds
    bounds["issue_us"] = launch.threads * issued / ISSUE_PER_US
    if known:
        bounds["loop_instructions_per_element"] = len(code.loop) * work.rounds / work.elements
        bounds["prologue_instructions_per_element"] = len(code.once) / work.elements
    return bounds


def report(cases: Sequence[Case], archs: Sequence[int]) -> Iterator[dict[str, object]]:
    """One row for each distinct launch of the cases and each architecture.

    `variant` is the first case that launched it so. Registers, spills (bytes) and stack (local
    memory) are of a thread, warps and shared memory of a program. `global_access`: how many loads
    and stores of how many bits the PTX has; `vector128`: whether everything but single values
    (seed, times) moves 128 bits at once; `instructions`: lines of PTX; `seconds`: compiling took.

    `issue_us`, `bytes_us`: the two bounds of the module's docstring. Rows of the objective, of the
    residual norm's two passes and of q's and k's norm have instructions of the machine that a
    thread issues for an element of the data: in the main loop, and besides it (`prologue`: before
    and after; all of it where no loop is left). `normals`: the formulas of the
    normal numbers that the machine code makes (`benchmarks/noise_code.py`).
    """
    with tempfile.TemporaryDirectory() as folder, runtime.triton.knobs.cache.scope():
        # Triton's own cache would give kernels without ptxas's report on them.
        runtime.triton.knobs.cache.dir = folder
        for arch in archs:
            seen = set()
            for case in cases:
                for launch in launches_of(case, arch):
                    if (key := (launch.kernel, launch.key)) in seen:
                        continue
                    seen.add(key)
                    names = {"op": case.op, "kernel": launch.kernel, "variant": case.variant}
                    try:
                        row = compile_launch(launch, arch)
                    except Exception as error:
                        raise RuntimeError(f"sm_{arch}: {names} does not compile") from error
                    yield names | row


_LINE = "{:<22} {:<14} {:<55} {:>6} {:>5} {:>4} {:>5} {:>5} {:>6} {:>7} {:>7} {:>5}"
_LINE += " {:>8} {:>8} {:>8} {:>8}"
_HEAD = "op kernel variant arch warps regs spill stack shared 128-bit atomics instr".split()
_HEAD += "issue_us bytes_us loop/elt once/elt".split()


def _line(row: dict[str, object]) -> str:
    spill = row["spills"]
    names = (row["op"], row["kernel"].strip("_").removesuffix("_kernel"), row["variant"])
    numbers = (row["num_warps"], row["registers"], spill, row["stack_bytes"], row["shared_bytes"])
    wide = "yes" if row["vector128"] else "no"
    cost = [row["issue_us"], row["bytes_us"]]
    cost += [row.get(f"{part}_instructions_per_element") for part in ("loop", "prologue")]
    costs = ("-" if value is None else f"{value:.1f}" for value in cost)
    counts = row["atomics"], row["instructions"]
    return _LINE.format(*names, row["arch"], *numbers, wide, *counts, *costs)


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
        absent = "Triton is not installed: pip install triton"
        why = "TRITON_INTERPRET=1 is set: unset it" if runtime.triton else absent
        print(f"kernels cannot be compiled: {why}", file=sys.stderr)
        return 2
    # The launchers' default, given explicitly: Triton warns where it is not.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    chosen = [c for c in cases if (not args.op or c.op in args.op) and (c.quick or not args.quick)]
    if not args.json:
        print(_LINE.format(*_HEAD))
    rows, red = 0, 0
    for row in report(chosen, args.arch):
        rows, red = rows + 1, red + any(row[name] for name in RED)
        print(json.dumps(row) if args.json else _line(row), flush=True)
    if not args.json:
        print(f"{rows} kernels, {red} with spills, local memory or atomics")
    return min(red, 1)


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
