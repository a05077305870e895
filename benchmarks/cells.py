"""The cells that are timed, most telling first: a deadline cuts from the end."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from benchmarks.ops import FAMILIES, Cell
from mixflow_fast.diagnostics.kernel_cases import Mode

Row = tuple[str, Mode, str, tuple[int, ...]]  # op, mode, variant, shape

RAE, SIT = (768, 16, 16), (4, 32, 32)
SHAPES = (
    (256, *RAE),
    (256, *SIT),
    (32, *SIT),
    (64, *RAE),
    (64, 3, 256, 256),
    (32, 4, 64, 64),
    (256, 4, 64, 64),
    (64, 768, 32, 32),
    (256, 768, 32, 32),
)
MAIN_SHAPES = SHAPES[:2]
SMOKE_SHAPES = ((2, 4, 4, 4), (3, 8, 2, 2))
MODES = {
    "interpolate": ("forward",),
    "velocity_loss": ("full", "forward", "backward"),
    "objective": ("full",),
}

# SiT-XL at B = 256, DiT-DH-XL at B = 64.
BLOCK_MAIN: tuple[Row, ...] = (
    ("residual_norm", "full", "layer per sample", (256, 256, 1152)),
    ("attention", "full", "plain", (256, 256, 16, 72)),
    ("gelu", "full", "bias", (256, 256, 4608)),
    ("residual_norm", "full", "rms per token", (64, 256, 2048)),
    ("swiglu", "full", "bias", (64, 256, 2 * 5504)),
    ("qk_norm_rope", "full", "rope", (64, 256, 16, 72)),
    ("modulated_norm", "full", "rms per sample", (64, 256, 1152)),
)
BLOCK_MORE: tuple[Row, ...] = (
    ("attention", "full", "plain", (64, 1024, 16, 72)),
    ("attention", "full", "plain", (64, 256, 16, 128)),
    ("residual_norm", "full", "layer per sample", (32, 256, 1152)),
    ("swiglu", "full", "bias", (64, 256, 2 * 5461)),
    ("residual_norm", "full", "rms per sample", (64, 256, 1152)),
    ("attention", "full", "plain", (256, 256, 16, 64)),
    ("gelu", "recompute", "bias", (256, 256, 4608)),
    ("swiglu", "recompute", "bias", (64, 256, 2 * 5504)),
    ("swiglu", "full", "bias", (256, 256, 2 * 3072)),
    ("attention", "full", "rope", (64, 256, 16, 72)),
    ("residual_norm", "full", "layer per sample", (64, 1024, 1152)),
    ("gelu", "full", "bias", (32, 256, 4608)),
    ("qk_norm_rope", "full", "rms, rope", (64, 256, 16, 72)),
    ("qk_norm_rope", "full", "layer", (256, 256, 16, 72)),
    ("modulated_norm", "full", "layer per sample", (256, 256, 1152)),
    ("modulated_norm", "full", "rms per token", (64, 256, 2048)),
    ("attention", "full", "plain", (64, 1024, 16, 64)),
    ("attention", "full", "plain", (16, 1024, 16, 128)),
    ("residual_norm", "forward", "layer per sample", (256, 256, 1152)),
    ("swiglu", "forward", "bias", (64, 256, 2 * 5504)),
    ("gelu", "forward", "bias", (256, 256, 4608)),
    ("attention", "forward", "plain", (256, 256, 16, 72)),
    ("modulated_norm", "forward", "rms per sample", (64, 256, 1152)),
    ("qk_norm_rope", "forward", "rope", (64, 256, 16, 72)),
)
BLOCK_SMOKE: tuple[Row, ...] = (
    ("residual_norm", "full", "layer per sample", (2, 4, 16)),
    ("residual_norm", "full", "rms per token", (2, 3, 16)),
    ("modulated_norm", "full", "rms per sample", (2, 4, 16)),
    ("gelu", "full", "bias", (2, 3, 16)),
    ("swiglu", "full", "bias", (2, 3, 16)),
    ("qk_norm_rope", "full", "rms, rope", (2, 4, 2, 8)),
    ("attention", "full", "plain", (2, 4, 2, 8)),
    ("attention", "full", "rope", (2, 4, 2, 8)),
    ("swiglu", "forward", "bias", (2, 3, 16)),
    ("gelu", "recompute", "bias", (2, 3, 16)),
    ("swiglu", "recompute", "bias", (2, 3, 16)),
)


def kernel_cells(ops: Iterable[str], smoke: bool = False) -> list[Cell]:
    """The cells of the kernel suite for `ops`, the most telling first."""
    ops = set(ops)
    main, more = (BLOCK_SMOKE, ()) if smoke else (BLOCK_MAIN, BLOCK_MORE)
    first, rest = _objective_smoke(ops) if smoke else _objective(ops)
    return [*first, *_block(main, ops), *_block(more, ops), *rest]


def _block(rows: Iterable[Row], ops: set[str]) -> list[Cell]:
    return [
        Cell(op=op, mode=mode, variant=variant, shape=shape)
        for op, mode, variant, shape in rows
        if op in ops
    ]


def _objective(ops: set[str]) -> tuple[list[Cell], list[Cell]]:
    """(bf16 at the main shapes, the rest).

    bf16 at every shape in mode "full" ("forward" for interpolate), the other modes at the main
    shapes, and last float32 data there.
    """
    chosen = [op for op in FAMILIES["objective"] if op in ops]

    def of_shapes(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[Cell]:
        return [
            Cell(op=op, mode=MODES[op][0], shape=shape, dtype=dtype)
            for shape in shapes
            for op in reversed(chosen)
        ]

    other_modes = [
        Cell(op=op, mode=mode, shape=shape)
        for shape in MAIN_SHAPES
        for op in chosen
        for mode in MODES[op][1:]
    ]
    main = [*of_shapes(MAIN_SHAPES, torch.bfloat16), *other_modes]
    rest = of_shapes(SHAPES[len(MAIN_SHAPES) :], torch.bfloat16)
    return main, [*rest, *of_shapes(MAIN_SHAPES, torch.float32)]


def _objective_smoke(ops: set[str]) -> tuple[list[Cell], list[Cell]]:
    chosen = [op for op in FAMILIES["objective"] if op in ops]
    half = [Cell(op=op, mode=mode, shape=SMOKE_SHAPES[0]) for op in chosen for mode in MODES[op]]
    single = torch.float32
    return half, [
        Cell(op=op, mode=MODES[op][0], shape=SMOKE_SHAPES[1], dtype=single) for op in chosen
    ]
