"""Every Triton kernel against its reference on one device, at small shapes: what `doctor` runs.

    err(kernel, float64) <= 2 err(reference in the same dtype, float64) + floor     (relative RMS)

for every output and the gradient of every input, under an upstream gradient that is not 1. Where
the kernels cannot run, the operators' own path on that device is held to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.activations.gelu import gelu, gelu_recompute, gelu_reference
from mixflow_fast.kernels.activations.swiglu import swiglu, swiglu_recompute, swiglu_reference
from mixflow_fast.kernels.attention.choice import FLOORS as ATTENTION_FLOORS
from mixflow_fast.kernels.attention.op import attention, attention_reference
from mixflow_fast.kernels.attention.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from mixflow_fast.kernels.residual_norm.reference import (
    modulated_norm_reference,
    residual_norm_reference,
)
from mixflow_fast.messages import error_line
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.optim.adamw_ema import AdamWEMA

DTYPES = (torch.bfloat16, torch.float32)
FLOORS = {torch.float32: 2e-6, torch.bfloat16: 1e-3}
_SEED = 7

Outputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Finding:
    """One operator in one dtype: its worst tensor, with the error and what was allowed."""

    op: str
    dtype: str
    tensor: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


@dataclass(frozen=True)
class Case:
    """An operator with inputs.

    Attributes:
        op: its name.
        shapes: of the random inputs that get a gradient, in data's dtype.
        ours, reference: (inputs, impl) -> outputs; the reference ignores impl.
        again: (upstream gradient, inputs, impl) -> outputs of the backward pass that recomputes y.
    """

    op: str
    shapes: dict[str, tuple[int, ...]]
    ours: Callable[[Outputs, str], Outputs]
    reference: Callable[[Outputs, str], Outputs]
    recompute: Callable[[Tensor, Outputs, str], Outputs] | None = None
    floors: Mapping[torch.dtype, float] | None = None


def check_kernels(device: torch.device) -> list[Finding]:
    """All operators, forward and backward, in bfloat16 and float32."""
    impl = "triton" if runtime.can_launch(device) else "auto"
    findings = [_check_normal(device, impl)]
    for case in _cases(device):
        findings += [_check(case, dtype, device, impl) for dtype in DTYPES]
    return findings


def check_optimizer(device: torch.device) -> Finding:
    """Three steps of `AdamWEMA` in csrc against the same in foreach calls, weights and EMA."""
    results = []
    for impl in ("csrc", "foreach"):
        generator = torch.Generator().manual_seed(_SEED)
        p = torch.randn(1027, generator=generator).to(device).requires_grad_()
        optimizer = AdamWEMA(
            [p], lr=1e-2, weight_decay=0.1, ema_decay=0.9, grad_clip=1.0, impl=impl
        )
        for _ in range(3):
            p.grad = torch.randn(1027, generator=generator).to(device)
            optimizer.step()
        results.append({"weights": p.detach(), "ema": optimizer.state[p]["ema"]})
    errors = {name: _error(x, results[1][name].double()) for name, x in results[0].items()}
    worst = max(errors, key=errors.__getitem__)
    return Finding("AdamWEMA", "fp32", worst, errors[worst], 1e-6)


def _check(case: Case, dtype: torch.dtype, device: torch.device, impl: str) -> Finding:
    generator = torch.Generator().manual_seed(_SEED)
    inputs = {}
    for name, shape in case.shapes.items():
        inputs[name] = torch.randn(shape, generator=generator).to(device, dtype)
    try:
        ours = _run(case, case.ours, inputs, impl)
        eager = _run(case, case.reference, inputs, "reference")
        exact = {name: x.double() for name, x in inputs.items()}
        truth = _run(case, case.reference, exact, "reference")
    # A kernel that does not compile or launch is a finding, not the end of the others' checks.
    except Exception as error:
        text = error_line(error)
        return Finding(case.op, _name(dtype), text, float("nan"), 0.0)
    floor = (case.floors or FLOORS)[dtype]
    worst = None
    for name, x in ours.items():
        limit = 2 * _error(eager[name], truth[name]) + floor
        finding = Finding(case.op, _name(dtype), name, _error(x, truth[name]), limit)
        if worst is None or not finding.error / limit <= worst.error / worst.limit:
            worst = finding
        if not finding.passed:
            break
    return worst


def _run(case: Case, function: Callable, inputs: Outputs, impl: str) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    outputs = function(leaves, impl)
    results = {name: x.detach() for name, x in outputs.items()}
    found = {name: x for name, x in outputs.items() if x.requires_grad}
    upstream = [_upstream(x) for x in found.values()]
    if found:
        gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), upstream)
        results |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    if case.recompute is not None:
        plain = {name: x.detach() for name, x in leaves.items()}
        results |= case.recompute(upstream[0], plain, impl)
    return results


def _upstream(like: Tensor) -> Tensor:
    numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(_SEED + 1))
    # Rounded as the 16-bit run rounds it, so that all runs see the same.
    return (numbers + 0.5).bfloat16().to(like.device, like.dtype)


def _error(x: Tensor, truth: Tensor) -> float:
    x, truth = x.double(), truth.double()
    return ((x - truth).norm() / truth.norm().clamp_min(1e-12)).item()


def _name(dtype: torch.dtype) -> str:
    return {"bfloat16": "bf16", "float32": "fp32"}[str(dtype).removeprefix("torch.")]


def _check_normal(device: torch.device, impl: str) -> Finding:
    """The random numbers: nearly the reference's bits (logarithm and cosine differ in the last)."""
    positions = torch.tensor([0, 1, 2**40], device=device)
    try:
        ours = philox.normal(_SEED, Stream.NOISE, positions, 33, impl)
        truth = philox.normal_reference(_SEED, Stream.NOISE, positions.cpu(), 33)
        error = (ours.cpu() - truth).abs().max().item()
    except Exception as error:
        return Finding("normal", "fp32", f"{type(error).__name__}: {error}", float("nan"), 0.0)
    return Finding("normal", "fp32", "numbers", error, 1e-5)


def _cases(device: torch.device) -> list[Case]:
    B, N, D = (2, 64, 1152) if device.type == "cuda" else (2, 3, 32)
    H, K = (16, 72) if device.type == "cuda" else (2, 8)
    angles = torch.outer(torch.arange(N), 10.0 ** -torch.linspace(0, 3, K // 2)).repeat(1, 2)
    rope = {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}
    stream, per_sample, per_token = (B, N, D), (B, D), (B, N, D)
    qkv = {"qkv": (B, N, 3, H, K)}
    weights = {"q_weight": (K,), "k_weight": (K,)}
    return [
        *_objective(device),
        Case(
            "residual_norm",
            dict(x=stream, h=stream, gate=per_sample, shift=per_sample, scale=per_sample)
            | {"h_bias": (D,)},
            partial(_pair, residual_norm, ("x'", "y"), {"norm": "layer"}),
            partial(_pair, residual_norm_reference, ("x'", "y"), {"norm": "layer"}),
        ),
        Case(
            "residual_norm rms",
            dict(x=stream, h=stream, gate=per_token, shift=per_token, scale=per_token)
            | {"weight": (D,)},
            partial(_pair, residual_norm, ("x'", "y"), {"norm": "rms"}),
            partial(_pair, residual_norm_reference, ("x'", "y"), {"norm": "rms"}),
        ),
        Case(
            "modulated_norm",
            dict(x=stream, shift=per_sample, scale=per_sample),
            partial(_one, modulated_norm, {}),
            partial(_one, modulated_norm_reference, {}),
        ),
        Case(
            "gelu",
            {"x": stream, "bias": (D,)},
            partial(_one, gelu, {}),
            partial(_one, gelu_reference, {}),
            partial(_recompute, gelu_recompute),
        ),
        Case(
            "swiglu",
            {"x": stream, "bias": (D,)},
            partial(_one, swiglu, {}),
            partial(_one, swiglu_reference, {}),
            partial(_recompute, swiglu_recompute),
        ),
        Case(
            "qk_norm_rope",
            qkv | weights,
            partial(_pair, qk_norm_rope, ("q", "k"), {"norm": "rms", **rope}),
            partial(_pair, qk_norm_rope_reference, ("q", "k"), {"norm": "rms", **rope}),
        ),
        Case(
            "qk_norm_rope without norm",
            qkv,
            partial(_pair, qk_norm_rope, ("q", "k"), rope),
            partial(_pair, qk_norm_rope_reference, ("q", "k"), rope),
        ),
        Case(
            "attention",
            qkv | weights,
            partial(_one, attention, {"norm": "rms"}),
            partial(_one, attention_reference, {"norm": "rms"}),
            floors=ATTENTION_FLOORS,
        ),
    ]


def _one(function: Callable, options: dict, inputs: Outputs, impl: str) -> Outputs:
    return {"y": function(**inputs, **options, **_impl(function, impl))}


def _pair(
    function: Callable, names: tuple[str, str], options: dict, inputs: Outputs, impl: str
) -> Outputs:
    return dict(zip(names, function(**inputs, **options, **_impl(function, impl)), strict=True))


def _impl(function: Callable, impl: str) -> dict[str, str]:
    return {} if function.__name__.endswith("_reference") else {"impl": impl}


def _recompute(function: Callable, dy: Tensor, inputs: Outputs, impl: str) -> Outputs:
    dx, dbias, y = function(dy, inputs["x"], inputs["bias"], impl=impl)
    return {"dx recomputed": dx, "dbias recomputed": dbias, "y recomputed": y}


def _objective(device: torch.device) -> list[Case]:
    """interpolate and velocity_loss, through `MixFlow`, which draws noise and times inside."""
    B, shape = 4, (4, 32, 32) if device.type == "cuda" else (4, 4, 4)
    ids = torch.arange(B, device=device)
    weight = torch.linspace(0.5, 1.5, B, device=device)

    def run(options: dict, inputs: Outputs, impl: str) -> Outputs:
        mix = MixFlow(**options, seed=_SEED, impl=impl)
        it = mix.prepare(inputs["x1"].detach(), ids=ids)
        loss = mix.loss(inputs["pred"], it, weight=weight)
        # The data gets no gradient; a zero keeps its place.
        loss = loss + 0 * inputs["x1"].sum().to(loss.dtype)
        return {"x": it.x, "t": it.t, "slowed_t": it.slowed_t, "loss": loss}

    return [
        Case(
            name,
            {"x1": (B, *shape), "pred": (B, *shape)},
            partial(run, options),
            partial(run, options),
        )
        for name, options in (
            ("interpolate, velocity_loss", {"gamma": 0.8, "clock": "data_at_1"}),
            (
                "interpolate, velocity_loss: gvp, noise",
                {"gamma": 0.8, "clock": "noise_at_1", "path": "gvp", "prediction": "noise"},
            ),
        )
    ]
