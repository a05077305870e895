"""The cells of the transformer-block ops: what is measured, and the bytes that it moves at least.

| op             | variant              | shape         | in the networks                          |
|----------------|----------------------|---------------|------------------------------------------|
| residual_norm  | norm, per what       | (B, N, D)     | residual, norm and modulation, twice a   |
|                |                      |               | block                                    |
| modulated_norm | the same             | (B, N, D)     | the same without a branch, at the ends   |
| gelu           | bias                 | (B, N, F)     | SiT's perceptron, bias and its gradient  |
| swiglu         | bias                 | (B, N, 2 F)   | DiT-DH's, F = 3072 and 5461 or 5504      |
| qk_norm_rope   | norm and rotation    | (B, N, H, K)  | norm and rotary positions of q and k     |
| attention      | plain, or with a     | (B, N, H, K)  | softmax(q k^T) v with its gradient in    |
|                | rotation             |               | one packed tensor                        |

Modes: "full" is a forward pass and the gradients of every input, "forward" the first alone, and
"recompute", of the activations, the gradients and the output once more, which is then not kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

import benchmarks.rows  # noqa: F401 (chooses Triton's interpreter, before Triton is imported)
from mixflow_fast.kernels.activations.gelu import gelu_bytes
from mixflow_fast.kernels.activations.swiglu import swiglu_bytes
from mixflow_fast.kernels.attention.backends import BACKENDS
from mixflow_fast.kernels.residual_norm.launch import residual_norm_bytes

BLOCK_OPS = ("residual_norm", "modulated_norm", "gelu", "swiglu", "qk_norm_rope", "attention")
# (norm, whether the modulation is per token); (norm of q and k, whether they are rotated).
NORMS = {
    "layer per sample": ("layer", False),
    "rms per sample": ("rms", False),
    "rms per token": ("rms", True),
}
ROTATIONS = {
    "plain": (None, False),
    "rope": (None, True),
    "rms, rope": ("rms", True),
    "layer": ("layer", False),
}
# "math" holds float32 scores: it is there to be right, and nobody would choose it for its speed.
TIMED_BACKENDS = tuple(name for name in BACKENDS if name != "math")


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """One cell: op, mode, variant and shape as in the module's table, and the data's dtype."""

    op: str
    mode: str
    variant: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.op} {self.mode} {self.variant} {shape} {self.dtype_name}"

    @property
    def norm(self) -> str | None:
        return (NORMS | ROTATIONS)[self.variant][0]

    @property
    def per_token(self) -> bool:
        return NORMS[self.variant][1]

    @property
    def rotates(self) -> bool:
        return ROTATIONS[self.variant][1]

    @property
    def providers(self) -> tuple[str, ...]:
        """Who is asked: "liger" and the attention backends only where they do the same."""
        names = ["eager", "compile", "mixflow_fast"]
        if self.op == "modulated_norm" and self.norm == "rms":
            names.insert(2, "liger")
        # Its backward pass writes the gradients over a and b: no call could be repeated.
        if self.op == "swiglu" and self.mode == "forward":
            names.insert(2, "liger")
        return (*names, *(TIMED_BACKENDS if self.op == "attention" else ()))

    @property
    def algorithmic_bytes(self) -> int:
        """Bytes that one pass over each tensor moves; "full": of both directions.

        Those of the ops' own `*_bytes` functions where there are such. Of q and k: read and written
        once each way, their upstream gradients read, qkv's gradient written (v's part is zeros), q
        and k read again for a norm. Of "recompute": upstream gradient and input read, gradient and
        output written. Of attention: qkv, out and their gradients once each, and in
        the backward pass qkv and out again; scores and statistics not at all.
        """
        passes = {"forward": (False,), "recompute": (True,), "full": (False, True)}[self.mode]
        return sum(self._bytes(backward) for backward in passes)

    def _bytes(self, backward: bool) -> int:
        if self.op in ("residual_norm", "modulated_norm"):
            return residual_norm_bytes(
                torch.empty(self.shape, dtype=self.dtype, device="meta"),
                per_token=self.per_token,
                backward=backward,
                has_h=self.op == "residual_norm",
                has_h_bias=self.op == "residual_norm",
                has_weight=self.norm == "rms",
                has_dx_new=self.op == "residual_norm",
                norm=self.norm,
            )
        if self.op in ("gelu", "swiglu"):
            count = gelu_bytes if self.op == "gelu" else swiglu_bytes
            x = torch.empty(self.shape, dtype=self.dtype, device="meta")
            return count(x, x.new_empty(self.shape[-1]), backward, self.mode == "recompute")
        section = self.elements * self.dtype.itemsize
        if self.op == "attention":
            return section * (8 if backward else 4)
        if not backward:
            return 4 * section
        return section * (5 + 2 * (self.norm is not None))

    @property
    def flops(self) -> int | None:
        """Of attention: 4 N^2 K a head and twice that in the backward pass; of others None."""
        if self.op != "attention":
            return None
        B, N, H, K = self.shape
        return (4 if self.mode == "forward" else 12) * B * H * N * N * K


def _cells(mode: str, *cells: tuple[str, str, tuple[int, ...]]) -> list[BlockCase]:
    return [BlockCase(op=o, mode=mode, variant=v, shape=s) for o, v, s in cells]


# The most telling of each op. SiT-XL at B = 256, DiT-DH-XL at B = 64.
MAIN = _cells(
    "full",
    ("residual_norm", "layer per sample", (256, 256, 1152)),
    ("attention", "plain", (256, 256, 16, 72)),
    ("gelu", "bias", (256, 256, 4608)),
    ("residual_norm", "rms per token", (64, 256, 2048)),
    ("swiglu", "bias", (64, 256, 2 * 5504)),
    ("qk_norm_rope", "rope", (64, 256, 16, 72)),
    ("modulated_norm", "rms per sample", (64, 256, 1152)),
)
MORE = [
    *_cells(
        "full",
        ("attention", "plain", (64, 1024, 16, 72)),
        ("attention", "plain", (64, 256, 16, 128)),
        ("residual_norm", "layer per sample", (32, 256, 1152)),
        ("swiglu", "bias", (64, 256, 2 * 5461)),
        ("residual_norm", "rms per sample", (64, 256, 1152)),
        ("attention", "plain", (256, 256, 16, 64)),
    ),
    *_cells(
        "recompute",
        ("gelu", "bias", (256, 256, 4608)),
        ("swiglu", "bias", (64, 256, 2 * 5504)),
    ),
    *_cells(
        "full",
        ("swiglu", "bias", (256, 256, 2 * 3072)),
        ("attention", "rope", (64, 256, 16, 72)),
        ("residual_norm", "layer per sample", (64, 1024, 1152)),
        ("gelu", "bias", (32, 256, 4608)),
        ("qk_norm_rope", "rms, rope", (64, 256, 16, 72)),
        ("qk_norm_rope", "layer", (256, 256, 16, 72)),
        ("modulated_norm", "layer per sample", (256, 256, 1152)),
        ("modulated_norm", "rms per token", (64, 256, 2048)),
        ("attention", "plain", (64, 1024, 16, 64)),
        ("attention", "plain", (16, 1024, 16, 128)),
    ),
    *_cells(
        "forward",
        ("residual_norm", "layer per sample", (256, 256, 1152)),
        ("swiglu", "bias", (64, 256, 2 * 5504)),
        ("gelu", "bias", (256, 256, 4608)),
        ("attention", "plain", (256, 256, 16, 72)),
        ("modulated_norm", "rms per sample", (64, 256, 1152)),
        ("qk_norm_rope", "rope", (64, 256, 16, 72)),
    ),
]
SMOKE = [
    *_cells(
        "full",
        ("residual_norm", "layer per sample", (2, 4, 16)),
        ("residual_norm", "rms per token", (2, 3, 16)),
        ("modulated_norm", "rms per sample", (2, 4, 16)),
        ("gelu", "bias", (2, 3, 16)),
        ("swiglu", "bias", (2, 3, 16)),
        ("qk_norm_rope", "rms, rope", (2, 4, 2, 8)),
        ("attention", "plain", (2, 4, 2, 8)),
        ("attention", "rope", (2, 4, 2, 8)),
    ),
    *_cells("forward", ("swiglu", "bias", (2, 3, 16))),
    *_cells("recompute", ("gelu", "bias", (2, 3, 16)), ("swiglu", "bias", (2, 3, 16))),
]


def block_cases(ops: tuple[str, ...], smoke: bool = False) -> tuple[list[BlockCase], ...]:
    """(the main cells, the others) for `ops`, each the most telling first."""
    main, more = (SMOKE, []) if smoke else (MAIN, MORE)
    return tuple([case for case in cases if case.op in ops] for cases in (main, more))
