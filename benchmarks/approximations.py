"""What a GPU's approximate logarithm, root, sine and cosine give, over the values that noise needs.

Normals are sqrt(-2 ln a) (cos, sin) of an angle. If `lg2.approx` gave a positive result for some a
just below 1, the root would be NaN, about once in ten million normals: every float32 in [1/2, 1] is
asked. Errors are absolute, against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import benchmarks.rows  # noqa: F401 (chooses Triton's interpreter, before Triton is imported)
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.runtime import jit, tl, triton

BLOCK = 1024
# Values of each function; of the logarithm every float32 from 1/2 to 1, 2^23 + 1 of them.
COUNT = (1 << 23) + 1
SMOKE_COUNT = 4097


@dataclass(frozen=True)
class Approximation:
    """An instruction of the GPU.

    Attributes:
        asm: PTX, one float32 in and one out.
        low, high: the ends of what is asked.
        exact: in float64.
    """

    asm: str
    low: float
    high: float
    exact: Callable[[Tensor], Tensor]

    def values(self, count: int, device: torch.device) -> Tensor:
        """(count,) float32 from low to high, neighbours equally far apart in float64."""
        steps = torch.arange(count, dtype=torch.float64, device=device) / (count - 1)
        return (self.low + (self.high - self.low) * steps).float()


APPROXIMATIONS = {
    "lg2.approx": Approximation("lg2.approx.ftz.f32 $0, $1;", 0.5, 1.0, torch.log2),
    # Of the smallest a, 2^-33, the radius is 6.8; its square is what the root is taken of.
    "sqrt.approx": Approximation("sqrt.approx.ftz.f32 $0, $1;", 0.0, 46.0, torch.sqrt),
    "sin.approx": Approximation("sin.approx.ftz.f32 $0, $1;", -math.pi, math.pi, torch.sin),
    "cos.approx": Approximation("cos.approx.ftz.f32 $0, $1;", -math.pi, math.pi, torch.cos),
}


@dataclass(frozen=True)
class Sweep:
    """What an instruction gave.

    Attributes:
        count: values that were asked.
        positive: results above 0.
        largest: of the results.
        error: largest absolute error.
        at: the value that has it.
        nan: results that are no number.
    """

    count: int
    positive: int
    largest: float
    error: float
    at: float
    nan: int


@jit
def _approximate_kernel(x_ptr, out_ptr, count, ASM: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    x = tl.load(x_ptr + offsets, mask=mask, other=1.0)
    y = tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + offsets, y, mask=mask)


def approximate(name: str, x: Tensor) -> Tensor:
    """The instruction's result for each of x (N,) float32; on a CPU PyTorch's, in float32."""
    entry = APPROXIMATIONS[name]
    # The interpreter knows no inline assembly.
    return launch(entry.asm, x) if x.is_cuda else entry.exact(x)


def launch(asm: str, x: Tensor) -> Tensor:
    """One instruction for each of x, (N,) float32."""
    out = torch.full_like(x, math.nan)
    grid = (triton.cdiv(len(x), BLOCK),)
    with runtime.on_device(x):
        _approximate_kernel[grid](x, out, len(x), ASM=asm, BLOCK=BLOCK, num_warps=4)
    return out


def sweep(name: str, device: torch.device, count: int = COUNT) -> Sweep:
    """Ask for `count` values from end to end."""
    entry = APPROXIMATIONS[name]
    x = entry.values(count, device)
    found = approximate(name, x)
    error = (found.double() - entry.exact(x.double())).abs().nan_to_num(nan=math.inf)
    worst = int(error.argmax())
    return Sweep(
        count=count,
        positive=int((found > 0).sum()),
        largest=float(found.nan_to_num(nan=-math.inf).max()),
        error=float(error[worst]),
        at=float(x[worst]),
        nan=int(found.isnan().sum()),
    )
