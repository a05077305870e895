"""Whether a provider computes, at the very shape that is timed, what all of them should.

Everything is compared with float64 arithmetic on the noise and times which the provider itself
used, so providers with different generators are held to the same formula.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.providers import GAMMA, Inputs

# Relative RMS error that storing a result in the dtype explains, with a margin of about two.
STORED = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
LOSS = 1e-5


def relative_rms(value: Tensor, truth: Tensor) -> float:
    """RMS of value - truth over RMS of truth, in float64; inf where a value is not finite."""
    difference = (value.detach().double() - truth).square().mean().sqrt()
    error = (difference / truth.square().mean().sqrt().clamp_min(1e-300)).item()
    return error if math.isfinite(error) else math.inf


def verify(case: Case, inputs: Inputs, made: dict[str, Any]) -> list[str]:
    """What is wrong with the tensors that a call returned: one line each, empty if nothing is."""
    x0 = made["x0"]() if callable(made["x0"]) else made["x0"]
    x1, x0 = inputs.x1.double(), x0.double()
    wrong = []

    def limit(name: str, error: float, allowed: float) -> None:
        if not error <= allowed:
            wrong.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")

    if case.op != "velocity_loss":
        t, slowed_t = made["t"].double(), made["slowed_t"].double()
        m = slowed_t.view(-1, *([1] * (x1.dim() - 1)))
        error = relative_rms(made["x"], m * x1 + (1 - m) * x0)
        limit("x_m, relative RMS error", error, STORED[case.dtype])
        if made["x"].dtype != case.dtype:
            wrong.append(f"x_m has dtype {made['x'].dtype}, expected {case.dtype}")
        if not bool(((slowed_t <= t) & (slowed_t >= (1 - GAMMA) * t - 1e-6)).all()):
            wrong.append("slowed_t is not in [(1 - gamma) t, t]")
        # Standard deviation of Beta(2, 1) is 1 / sqrt(18).
        spread = 6 / math.sqrt(18 * len(t))
        limit("mean of t less 2/3", abs(t.mean().item() - 2 / 3), spread)
        limit("mean of x0", abs(x0.mean().item()), 6 / math.sqrt(case.elements) + 1e-3)
        # 6 standard errors of a sample's variance, and what bf16 rounding does to it.
        spread = 6 * math.sqrt(2 / case.elements) + 1e-3
        limit("variance of x0 less 1", abs(x0.square().mean().item() - 1), spread)
    if case.op != "interpolate":
        error = inputs.pred.detach().double() - (x1 - x0)
        limit("loss", relative_rms(made["loss"], error.square().mean()), LOSS)
        if case.mode != "forward":
            upstream = inputs.upstream.item() if case.mode == "backward" else 1.0
            truth = error * (2 * upstream / case.elements)
            allowed = STORED[case.pred_dtype]
            limit("gradient, relative RMS error", relative_rms(made["gradient"], truth), allowed)
            if made["gradient"].dtype != case.pred_dtype:
                wrong.append(f"gradient has dtype {made['gradient'].dtype}")
    return wrong
