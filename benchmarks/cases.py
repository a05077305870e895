"""What is measured: ops, modes, shapes, dtypes, and the bytes that an op cannot avoid.

| op            | mode     | one call                                                             |
|---------------|----------|----------------------------------------------------------------------|
| interpolate   | forward  | draw t, m and x0, write x_m (`MixFlow.prepare`)                      |
| velocity_loss | forward  | the loss, no gradient                                                |
| velocity_loss | full     | the loss and its gradient, upstream gradient 1                       |
| velocity_loss | backward | the same with an upstream gradient of 0.5 on the device: its price   |
| objective     | full     | interpolate, then loss and gradient. The prediction is a given       |
|               |          | tensor: a network stands between the two, so nothing fuses across it |
| step          | step     | a training step of a network (`benchmarks/step.py`)                  |

The ops of a transformer block are in `benchmarks/block_ops.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.block_ops import BLOCK_OPS, BlockCase, block_cases

MODES = {
    "interpolate": ("forward",),
    "velocity_loss": ("full", "forward", "backward"),
    "objective": ("full",),
}
OBJECTIVE_OPS = tuple(MODES)
KERNEL_OPS = (*OBJECTIVE_OPS, *BLOCK_OPS)
OPS = (*KERNEL_OPS, "step")

RAE, SIT = (768, 16, 16), (4, 32, 32)
# Most telling first: a deadline cuts from the end.
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


@dataclass(frozen=True, kw_only=True)
class Case:
    """One cell of the table.

    Attributes:
        op, mode: see the module's table.
        shape: (B, C, H, W).
        dtype: of x1 and x_m.
        pred_dtype: of the prediction and its gradient.
        variant, flops, providers: as `BlockCase`.
    """

    op: str
    mode: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pred_dtype: torch.dtype = torch.bfloat16
    variant = None
    flops = None
    providers = ("eager", "compile", "mixflow_fast")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """bfloat16, or "float32 x1, bfloat16 pred" where the two differ and both are used."""
        x1, pred = (str(d).removeprefix("torch.") for d in (self.dtype, self.pred_dtype))
        return x1 if self.op == "interpolate" or x1 == pred else f"{x1} x1, {pred} pred"

    @property
    def label(self) -> str:
        return f"{self.op} {self.mode} {'x'.join(map(str, self.shape))} {self.dtype_name}"

    @property
    def algorithmic_bytes(self) -> int:
        """Bytes that any implementation moves which stores no noise: each tensor of x1's size once.

        interpolate reads x1 and writes x_m; the loss reads pred and x1 and writes the gradient.
        The (B,) tensors are not counted.
        """
        x1, pred = self.dtype.itemsize, self.pred_dtype.itemsize
        interpolate, loss = 2 * x1, x1 + pred + (0 if self.mode == "forward" else pred)
        per_element = {
            "interpolate": interpolate,
            "velocity_loss": loss,
            "objective": interpolate + loss,
        }[self.op]
        return per_element * self.elements


def kernel_cases(ops: tuple[str, ...], smoke: bool = False) -> list[Case | BlockCase]:
    """The cells of the kernel suite for `ops`, the most telling first."""
    main, more = block_cases(ops, smoke)
    objective = objective_cases(ops, smoke)
    first = sum(case.shape in MAIN_SHAPES and case.dtype != torch.float32 for case in objective)
    return [*objective[:first], *main, *more, *objective[first:]]


def objective_cases(ops: tuple[str, ...], smoke: bool = False) -> list[Case]:
    """The cells of the objective's ops.

    bf16 at every shape in mode "full" ("forward" for interpolate), the other modes at the main
    shapes, and last float32 data there.
    """
    half, single = torch.bfloat16, torch.float32
    chosen = [op for op in OBJECTIVE_OPS if op in ops]
    if smoke:
        return [
            Case(op=op, mode=mode, shape=shape, dtype=half)
            for op in chosen
            for mode in MODES[op]
            for shape in SMOKE_SHAPES[:1]
        ] + [Case(op=op, mode=MODES[op][0], shape=SMOKE_SHAPES[1], dtype=single) for op in chosen]
    first = [
        Case(op=op, mode=MODES[op][0], shape=shape, dtype=half)
        for shape in SHAPES
        for op in reversed(chosen)
    ]
    other_modes = [
        Case(op=op, mode=mode, shape=shape, dtype=half)
        for shape in MAIN_SHAPES
        for op in chosen
        for mode in MODES[op][1:]
    ]
    float32_data = [
        Case(op=op, mode=MODES[op][0], shape=shape, dtype=single)
        for shape in MAIN_SHAPES
        for op in reversed(chosen)
    ]
    main = len(MAIN_SHAPES) * len(chosen)
    return [*first[:main], *other_modes, *first[main:], *float32_data]
