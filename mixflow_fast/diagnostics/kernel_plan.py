"""What is checked on a device, most telling first: operators, shapes, settings and dtypes.

"timed" is what the speeds are measured with. "smoke" is that in three dtypes, bits, graphs, and
each path and each prediction once. "full" is every setting, in float32 and in one of the two half
dtypes by turns, odd shapes, and torch.compile on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Literal, NamedTuple

import torch

from mixflow_fast.diagnostics import kernel_checks, kernel_replays
from mixflow_fast.diagnostics.block_cases import BLOCK_OPS, BlockCase
from mixflow_fast.diagnostics.kernel_cases import Case, Mode, ObjectiveCase, Setting
from mixflow_fast.diagnostics.kernel_checks import Finding
from mixflow_fast.diagnostics.source_cases import SourceCase

Level = Literal["timed", "smoke", "full"]
Row = tuple[str, Mode, str, tuple[int, ...]]  # op, mode, variant, shape
HALVES = (torch.bfloat16, torch.float16)
# The checks that an operator's own are not enough without: what it calls, and all in one graph.
NEEDS = {
    "interpolate": ("normal",),
    "velocity_loss": ("normal", "interpolate"),
    "objective": ("normal", "interpolate", "velocity_loss"),
    "mixed_source": ("normal",),
} | dict.fromkeys(BLOCK_OPS, ("block",))

# A batch of at least four covers the four buckets of t. The odd one has rows that no vector fits.
GPU_SHAPE, CPU_SHAPE = (8, 4, 32, 32), (4, 4, 4, 4)
GPU_TIMED_SHAPES = (GPU_SHAPE, (5, 3, 7, 9), (256, 4, 32, 32), (64, 768, 16, 16))
CPU_TIMED_SHAPES = (CPU_SHAPE,)
GPU_BITS_SHAPE, CPU_BITS_SHAPE = (256, 4, 32, 32), (3, 3, 5, 3)

# What the speeds are measured with, then each path with each prediction, each of both kinds in both
# clocks, and what else the kernels can do.
TIMED = Setting()
SETTINGS = (
    TIMED,
    Setting(clock="noise_at_1", weight="sample"),
    Setting(patch_size=2, sigma=True, weight="element"),
    Setting(moments=True, clock="noise_at_1"),
    Setting("gvp", "velocity", "noise_at_1", target_at="label"),
    Setting("vp", "velocity", "data_at_1"),
    Setting("linear", "score", "data_at_1", loss_weight="likelihood"),
    Setting("linear", "noise", "noise_at_1", loss_weight="velocity"),
    Setting("gvp", "noise", "data_at_1"),
    Setting("vp", "noise", "noise_at_1", target_at="label", loss_weight="likelihood"),
    Setting("gvp", "score", "noise_at_1", loss_weight="velocity"),
    Setting("vp", "score", "data_at_1", patch_size=2, sigma=True),
    Setting("linear", "data", "noise_at_1"),
    Setting("gvp", "data", "data_at_1"),
    Setting("vp", "data", "noise_at_1"),
)
# Of the mixed source beside what is timed, the first one in a smoke run; shapes are the device's.
SOURCES = (
    SourceCase(shape=CPU_SHAPE, mixes="samples", patch_size=2, drawn=True),
    SourceCase(shape=CPU_SHAPE, mixes="samples", path="gvp", clock="noise_at_1"),
    SourceCase(shape=CPU_SHAPE, path="vp", drawn=True),
    SourceCase(shape=CPU_SHAPE, patch_size=2, clock="noise_at_1"),
)
SMOKE_SETTINGS = (SETTINGS[2], SETTINGS[4], SETTINGS[9], SETTINGS[6])

# What is timed, at the timed widths, so that the very kernels are checked; last the CPU's shape.
_TIMED = (
    ("residual_norm", "full", "layer per sample", (4, 256, 1152), (2, 3, 33)),
    ("residual_norm", "full", "rms per token", (2, 256, 2048), (2, 3, 32)),
    ("gelu", "full", "bias", (4, 256, 4608), (2, 3, 33)),
    ("swiglu", "full", "bias", (4, 256, 2 * 5504), (2, 3, 2 * 17)),
    ("qk_norm_rope", "full", "rope", (4, 256, 16, 72), (2, 3, 2, 8)),
    ("attention", "full", "plain", (4, 256, 16, 72), (2, 3, 2, 8)),
    ("modulated_norm", "full", "rms per sample", (4, 256, 1152), (2, 3, 32)),
    ("gelu", "recompute", "bias", (4, 256, 4608), (2, 3, 33)),
    ("swiglu", "recompute", "bias", (4, 256, 2 * 5504), (2, 3, 2 * 17)),
)
GPU_TIMED: tuple[Row, ...] = tuple(row[:4] for row in _TIMED)
CPU_TIMED: tuple[Row, ...] = tuple((*row[:3], row[4]) for row in _TIMED)
GPU_MORE: tuple[Row, ...] = (
    ("residual_norm", "full", "rms per sample", (4, 256, 1152)),
    ("attention", "full", "rms, rope", (2, 256, 16, 128)),
    ("qk_norm_rope", "full", "layer", (4, 256, 16, 72)),
    ("residual_norm", "full", "layer per sample", (3, 7, 1023)),
    ("swiglu", "full", "bias", (3, 7, 2 * 5461)),
    ("gelu", "full", "bias", (3, 7, 1023)),
    ("qk_norm_rope", "full", "rms, rope", (3, 7, 5, 10)),
    ("modulated_norm", "full", "layer per sample", (4, 256, 1152)),
    ("attention", "full", "plain", (2, 1024, 16, 64)),
    ("residual_norm", "recompute", "layer per sample", (4, 256, 1152)),
)
CPU_MORE: tuple[Row, ...] = (
    ("residual_norm", "full", "rms per sample", (2, 5, 64)),
    ("qk_norm_rope", "full", "layer", (2, 3, 2, 10)),
    ("attention", "full", "rms, rope", (2, 5, 2, 8)),
    ("residual_norm", "recompute", "layer per sample", (2, 3, 33)),
)


class Task(NamedTuple):
    """A check: the operators that it is about, its name, and what makes its findings."""

    ops: tuple[str, ...]
    name: str
    run: Callable[[], Iterable[Finding]]


def tasks(
    device: torch.device, impl: str, level: Level, ops: Iterable[str] = tuple(NEEDS)
) -> Iterator[Task]:
    """The checks of a level for some operators; "step", a training step, needs all of its own."""
    ops = set(ops)
    ops |= NEEDS.keys() - {"mixed_source"} if "step" in ops else set()
    ops -= {"step"}
    yield from _block_tasks(device, impl, level, [op for op in BLOCK_OPS if op in ops])
    objective = ops - set(BLOCK_OPS) - {"mixed_source"}
    yield from _objective_tasks(device, impl, level, objective)
    if "mixed_source" in ops:
        if not objective:
            yield _words(device, impl)
        yield from _source_tasks(device, impl, level)


def _source_tasks(device: torch.device, impl: str, level: Level) -> Iterator[Task]:
    on_gpu = device.type == "cuda"
    shape = GPU_SHAPE if on_gpu else CPU_SHAPE
    timed = [SourceCase(shape=s) for s in (GPU_TIMED_SHAPES if on_gpu else CPU_TIMED_SHAPES)]
    rest = [replace(case, shape=shape) for case in SOURCES]
    bits = SourceCase(shape=GPU_BITS_SHAPE if on_gpu else CPU_BITS_SHAPE, drawn=True)
    chosen = [(case, torch.bfloat16) for case in timed]
    if level != "timed":
        chosen += [(timed[0], torch.float16), (timed[0], torch.float32), (rest[0], torch.float32)]
    if level == "full":
        chosen += [(case, dtype) for case in rest[1:] for dtype in (torch.float32, HALVES[0])]
    for case, dtype in chosen:
        case = replace(case, dtype=dtype)
        yield Task(case.ops, case.label, partial(kernel_checks.errors, case, device, impl))
    yield _same_bits(bits, device, impl)
    if level != "timed":
        yield _same_bits(replace(bits, mixes="samples", dtype=torch.float32), device, impl)


def _block_tasks(device: torch.device, impl: str, level: Level, ops: list[str]) -> Iterator[Task]:
    def cases(rows: Iterable[Row]) -> list[BlockCase]:
        return [
            BlockCase(op=op, variant=variant, shape=shape, mode=mode)
            for op, mode, variant, shape in rows
            if op in ops
        ]

    def errors(case: BlockCase, dtype: torch.dtype) -> Task:
        case = replace(case, dtype=dtype)
        run = partial(kernel_checks.errors, case, device, impl, every_backend=True)
        return Task(case.ops, case.label, run)

    on_gpu, whole = device.type == "cuda", set(ops) == set(BLOCK_OPS)
    timed = cases(GPU_TIMED if on_gpu else CPU_TIMED)
    for case in timed:
        yield errors(case, torch.bfloat16)
    if level == "timed":
        return
    for case in timed:
        # Backends of attention may differ from run to run.
        if case.op != "attention":
            yield _same_bits(case, device, impl)
    if whole:
        replays = partial(kernel_replays.block_replays, device, impl)
        yield Task(("block",), "graph replays of a block", replays)
    for dtype in (torch.float32, torch.float16):
        for case in timed:
            yield errors(case, dtype)
    if level == "smoke":
        return
    for number, case in enumerate(cases(GPU_MORE if on_gpu else CPU_MORE)):
        yield errors(case, HALVES[number % 2])
        yield errors(case, torch.float32)
    if on_gpu and whole:
        compiled = partial(kernel_replays.block_compiled, device, impl)
        yield Task(("block",), "torch.compile of a block", compiled)


def _words(device: torch.device, impl: str) -> Task:
    return Task(("normal",), "philox words", partial(kernel_checks.words, device, impl))


def _same_bits(case: Case, device: torch.device, impl: str) -> Task:
    run = partial(kernel_checks.same_bits, case, device, impl)
    return Task(case.ops, f"same bits, {case.label}", run)


def _objective_tasks(
    device: torch.device, impl: str, level: Level, ops: set[str]
) -> Iterator[Task]:
    if not ops:
        return
    on_gpu = device.type == "cuda"
    needed = ops.union(*(NEEDS[op] for op in ops))
    whole = "velocity_loss" in needed

    def of_needed(task: Task) -> Task:
        """Without what the same call finds about the loss, where nobody asked."""
        made_by = tuple(op for op in task.ops if op in needed)
        return Task(made_by, task.name, lambda: (f for f in task.run() if f.op in needed))

    def errors(setting: Setting, shape: tuple[int, ...], dtype: torch.dtype) -> Task:
        case = ObjectiveCase(setting=setting, shape=shape, dtype=dtype)
        return Task(case.ops, case.label, partial(kernel_checks.errors, case, device, impl))

    plan = _plan(level)
    for setting, dtype in plan:
        if setting == TIMED:
            for shape in GPU_TIMED_SHAPES if on_gpu else CPU_TIMED_SHAPES:
                yield of_needed(errors(setting, shape, dtype))
    yield _words(device, impl)
    draws = ("normal", "interpolate", "velocity_loss")
    yield of_needed(Task(draws, "philox normals", partial(kernel_checks.normals, device, impl)))
    yield Task(("interpolate",), "times", partial(kernel_checks.times, device, impl))
    shape = GPU_BITS_SHAPE if on_gpu else CPU_BITS_SHAPE
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.bfloat16,):
        case = ObjectiveCase(shape=shape, dtype=dtype, drawn=True)
        yield of_needed(_same_bits(case, device, impl))
    if whole:
        replays = partial(kernel_replays.objective_replays, device, impl)
        yield Task(("objective",), "graph replays", replays)
    for setting, dtype in plan:
        if setting != TIMED:
            yield of_needed(errors(setting, GPU_SHAPE if on_gpu else CPU_SHAPE, dtype))
    # Last, as it is slow: on a GPU most of a minute, on the CPU minutes.
    if on_gpu and level == "full" and whole:
        compiled = partial(kernel_replays.objective_compiled, device, impl)
        yield Task(("objective",), "torch.compile", compiled)


def _plan(level: Level) -> list[tuple[Setting, torch.dtype]]:
    """Settings and dtypes of a level, the most telling first."""
    timed = [(TIMED, dtype) for dtype in (*HALVES, torch.float32)]
    if level == "timed":
        return timed
    if level == "smoke":
        dtypes = (*HALVES, torch.float32, torch.float32)
        return timed + list(zip(SMOKE_SETTINGS, dtypes, strict=True))
    if level != "full":
        raise ValueError(f'level must be "timed", "smoke" or "full", got {level!r}')
    by_turns = [(setting, HALVES[n % 2]) for n, setting in enumerate(SETTINGS)][1:]
    return timed + [(setting, torch.float32) for setting in SETTINGS[1:]] + by_turns
