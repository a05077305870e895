"""The operator mixed_source with inputs, as `kernel_checks` checks it (see `kernel_cases`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mixflow_fast.diagnostics.kernel_cases import (
    SEED,
    Call,
    Draw,
    Inputs,
    Mode,
    Tensors,
    dtype_name,
    function_call,
    shape_name,
)
from mixflow_fast.flow.source import SourceMode
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source import mix_and_interpolate, mix_and_interpolate_reference

OUTPUTS = ("x", "x0", "kl")


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """`mix_and_interpolate` and its gradient.

    Attributes:
        shape: (B, C, H, W).
        mixes: mode of the mixture.
        patch_size: p writes x as tokens; 0 in the data's shape.
        dtype: of x1 and x; the source is float32.
        drawn: noise is drawn from seed and ids; otherwise it is an argument.
    """

    shape: tuple[int, ...]
    mixes: SourceMode = "moments"
    path: str = "linear"
    clock: str = "data_at_1"
    patch_size: int = 0
    dtype: torch.dtype = torch.bfloat16
    drawn: bool = False
    mode: Mode = "full"

    ops = ("mixed_source",)

    @property
    def name(self) -> str:
        words = ["mixed_source", self.mixes, self.path, self.clock]
        words += [f"tokens of {self.patch_size}"] if self.patch_size else []
        words += ["drawn"] if self.drawn else []
        return " ".join([*words, shape_name(self.shape)])

    @property
    def label(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)}"

    def op_of(self, tensor: str) -> str:
        return "mixed_source"

    def inputs(self, device: torch.device, empty: bool = False) -> Inputs:
        """A source that is neither near N(0, I) nor far from it, and weights from 0 to 1."""
        draw = Draw(device, self.dtype, empty)
        B, C, H, W = self.shape
        single = partial(draw.normal, dtype=torch.float32)
        tensors = {
            "x1": draw.normal(*self.shape, mean=0.5),
            "mean": single(*self.shape).requires_grad_(self.mode != "forward"),
            "log_var": single(*self.shape, mean=-0.5).requires_grad_(self.mode != "forward"),
            "w": torch.linspace(0, 1, B, device=device),
            "slowed_t": draw.uniform(B),
            "ids": torch.arange(B, device=device) + (1 << 33),
        }
        if not self.drawn:
            tensors["eps"], tensors["eps1"] = single(*self.shape), single(*self.shape)
        p = self.patch_size
        shape = (B, H // p * (W // p), p * p * C) if p else self.shape
        upstream = draw.normal(*shape), single(*self.shape), draw.uniform(B, low=0.5)
        return Inputs(tensors, upstream)

    def _options(self, inputs: Inputs) -> dict[str, object]:
        seed = philox.seed_tensor(SEED, inputs.tensors["x1"].device)
        names = {"clock": self.clock, "path": self.path, "mode": self.mixes}
        return {"seed": seed, "patch_size": self.patch_size, **names}

    def call(self, inputs: Inputs, impl: str) -> Call:
        # The function's own argument is called mode, too.
        function = partial(mix_and_interpolate, **self._options(inputs), impl=impl)
        return function_call(function, inputs, OUTPUTS, self.mode)

    def reference(self, inputs: Inputs) -> Call:
        function = partial(mix_and_interpolate_reference, **self._options(inputs))
        return function_call(function, inputs, OUTPUTS, self.mode)

    def parts(self, inputs: Inputs, found: Tensors) -> Tensors:
        return found
