"""The operator mixed_source with inputs, as `kernel_checks` checks it (see `kernel_cases`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

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
from mixflow_fast.flow.source import SourceMode, bounded_log_var, halves
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source import mix_and_interpolate, mix_and_interpolate_reference

OUTPUTS = ("x", "x0", "kl")
# Narrower than a run's, so that some of the log-variances are clamped.
LOG_VAR_RANGE = (-1.5, 0.75)


def _ours(predicted: Tensor, **given: object) -> tuple[Tensor, Tensor, Tensor]:
    options = {"log_var": None, "log_var_range": LOG_VAR_RANGE, **given}
    return mix_and_interpolate(mean=predicted, **options)


def _reference(predicted: Tensor, **given: object) -> tuple[Tensor, Tensor, Tensor]:
    mean, log_var = halves(predicted, None)
    log_var = bounded_log_var(log_var, LOG_VAR_RANGE)
    return mix_and_interpolate_reference(mean=mean, log_var=log_var, **given)


@dataclass(frozen=True, kw_only=True)
class SourceCase:
    """`mix_and_interpolate` and its gradient, of a predictor's one tensor.

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
        """A source that is neither near N(0, I) nor far from it; weights from 0 to 1, both ends."""
        draw = Draw(device, self.dtype, empty)
        B, C, H, W = self.shape
        single = partial(draw.normal, dtype=torch.float32)
        tensors = {
            "x1": draw.normal(*self.shape, mean=0.5),
            "predicted": single(B, 2 * C, H, W).requires_grad_(self.mode != "forward"),
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
        # What the operator calls mode is none of `function_call`'s.
        function = partial(_ours, **self._options(inputs), impl=impl)
        return function_call(function, inputs, OUTPUTS, self.mode)

    def reference(self, inputs: Inputs) -> Call:
        function = partial(_reference, **self._options(inputs))
        return function_call(function, inputs, OUTPUTS, self.mode)

    def parts(self, inputs: Inputs, found: Tensors) -> Tensors:
        """The gradient's halves apart, so that neither hides behind the other's size."""
        parts = dict(found)
        if "dpredicted" in parts:
            parts["dmean"], parts["dlog_var"] = parts.pop("dpredicted").chunk(2, dim=1)
        return parts
