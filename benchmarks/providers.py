"""The implementations that are compared, as calls without arguments.

`eager` is what a trainer holds today: a few lines of plain PyTorch. They are written for speed as
a careful user would: noise in the data's dtype, arithmetic in float32, and the noise (not a
float32 target) kept for the loss. `compile` is the same lines under torch.compile, static shapes,
in the fastest of the modes that are tried. `mixflow_fast` is `MixFlow.prepare` and `.loss`. Our
own PyTorch reference is no baseline: its integer Philox would make an unfairly slow one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OBJECTIVE_OPS, Case
from mixflow_fast import MixFlow

GAMMA = 0.8
# Arguments of torch.compile. The last mode compiles neighbours of a choice one at a time, several
# seconds a kernel: it is tried where memory bounds bf16, the cells that are claims.
COMPILE_MODES = {
    "default": {},
    "max-autotune without coordinate descent": {"options": {"max_autotune": True}},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
}
SLOW_TO_COMPILE = "max-autotune-no-cudagraphs"
# Below this a call is bound by launches, above it by memory: the two are tuned apart.
SMALL_ELEMENTS = 1 << 23

# What a call returns: the tensors it made, by name, so that they can be checked.
Call = Callable[[], dict[str, Any]]


def interpolate(x1: Tensor, x0: Tensor, slowed_t: Tensor) -> Tensor:
    """x_m = m x1 + (1 - m) x0 in float32, cast to x1's dtype; slowed_t: (B,) float32."""
    m = slowed_t.view(-1, *([1] * (x1.dim() - 1)))
    return (m * x1.float() + (1 - m) * x0.float()).to(x1.dtype)


def prepare(x1: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_m, t, m, x0) for t ~ Beta(2, 1), m ~ U[(1 - gamma) t, t], x0 ~ N(0, I)."""
    x0 = torch.randn_like(x1)
    t = torch.rand(len(x1), device=x1.device).sqrt()
    slowed_t = t * (1 - gamma * torch.rand(len(x1), device=x1.device))
    return interpolate(x1, x0, slowed_t), t, slowed_t, x0


def velocity_loss(pred: Tensor, x1: Tensor, x0: Tensor) -> Tensor:
    """Mean over samples and elements of |pred - (x1 - x0)|^2 in float32."""
    error = pred.float() - (x1.float() - x0.float())
    return error.square().flatten(1).mean(dim=1).mean()


@dataclass(frozen=True)
class Inputs:
    """What every provider of a cell is given.

    Attributes:
        x1: data, of mean 0.5 so that a wrong direction of the path shows.
        x0: noise in x1's dtype, for the providers that store it.
        pred: leaf that requires a gradient.
        ids: (B,) int64 positions of the samples, on the device.
        upstream: 0.5, a float32 scalar on the device.
    """

    x1: Tensor
    x0: Tensor
    pred: Tensor
    ids: Tensor
    upstream: Tensor


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random tensors of the cell's shapes and dtypes."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(dtype: torch.dtype) -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device, dtype=dtype)

    return Inputs(
        x1=normal(case.dtype).add_(0.5),
        x0=normal(case.dtype),
        pred=normal(case.pred_dtype).requires_grad_(),
        ids=torch.arange(len(normal(case.dtype)), device=device) + 10_000,
        upstream=torch.tensor(0.5, device=device),
    )


def _loss_and_gradient(loss: Callable[[], Tensor], case: Case, inputs: Inputs) -> dict[str, Any]:
    if case.mode == "forward":
        with torch.no_grad():
            return {"loss": loss()}
    value = loss()
    upstream = inputs.upstream if case.mode == "backward" else None
    (gradient,) = torch.autograd.grad(value, inputs.pred, upstream)
    return {"loss": value, "gradient": gradient}


def plain_call(
    case: Case,
    inputs: Inputs,
    wrap: Callable[[Any], Any] | None = None,
) -> Call:
    """A call of the plain lines above, or of what `wrap` (torch.compile) makes of them."""
    prepare_fn, loss_fn = (f if wrap is None else wrap(f) for f in (prepare, velocity_loss))

    def interpolate_call() -> dict[str, Any]:
        return dict(zip(("x", "t", "slowed_t", "x0"), prepare_fn(inputs.x1, GAMMA), strict=True))

    def loss_call(x0: Tensor = inputs.x0) -> dict[str, Any]:
        made = _loss_and_gradient(lambda: loss_fn(inputs.pred, inputs.x1, x0), case, inputs)
        return made | {"x0": x0}

    def objective_call() -> dict[str, Any]:
        made = interpolate_call()
        return made | loss_call(made["x0"])

    return {
        "interpolate": interpolate_call,
        "velocity_loss": loss_call,
        "objective": objective_call,
    }[case.op]


def mixflow_call(case: Case, inputs: Inputs, impl: str = "triton") -> Call:
    """A call of `MixFlow(impl=...)`; `x0` in what it returns is a function, called on demand."""
    objective = MixFlow(gamma=GAMMA, clock="data_at_1", impl=impl)
    given = objective.prepare(inputs.x1, ids=inputs.ids)

    def interpolate_call() -> dict[str, Any]:
        it = objective.prepare(inputs.x1, ids=inputs.ids)
        return {"x": it.x, "t": it.t, "slowed_t": it.slowed_t, "x0": it.x0, "it": it}

    def loss_call(it: Any = given) -> dict[str, Any]:
        made = _loss_and_gradient(lambda: objective.loss(inputs.pred, it), case, inputs)
        return made | {"x0": it.x0}

    def objective_call() -> dict[str, Any]:
        made = interpolate_call()
        return made | loss_call(made["it"])

    return {
        "interpolate": interpolate_call,
        "velocity_loss": loss_call,
        "objective": objective_call,
    }[case.op]


def is_small(case: Any) -> bool:
    return case.elements < SMALL_ELEMENTS


def modes_to_try(case: Any) -> list[str]:
    """The modes of torch.compile that are timed for the cell's class."""
    every = case.op in OBJECTIVE_OPS and not is_small(case) and case.dtype is torch.bfloat16
    return [mode for mode in COMPILE_MODES if every or mode != SLOW_TO_COMPILE]


class Compiler:
    """torch.compile of the plain lines, in the fastest mode for the op and the size class.

    Timed at the first cell of (op, mode, variant, small or large, dtype); the winner serves the
    others of that class, which keeps the time spent compiling inside a ten-minute run.

    Args:
        quick_ms: time of a call in milliseconds, a few repetitions.
    """

    def __init__(self, quick_ms: Callable[[Call], float]) -> None:
        self._quick_ms = quick_ms
        self._choice: dict[tuple[Any, ...], tuple[str, str]] = {}
        self._functions: dict[tuple[str, Callable[..., Any]], Callable[..., Any]] = {}
        # Static shapes compile afresh for each; the default of 8 would fall back to eager.
        torch._dynamo.config.recompile_limit = 256

    def call(
        self, case: Any, inputs: Any, plain: Callable[..., Call] = plain_call
    ) -> tuple[Call, str]:
        """The call, and a sentence that says how it was tuned; `plain`: `plain_call` of the op."""
        size = "small" if is_small(case) else "large"
        key = (case.op, case.mode, case.variant, size, case.dtype)
        if key not in self._choice:
            calls = {
                mode: plain(case, inputs, partial(self._compiled, mode))
                for mode in modes_to_try(case)
            }
            times = {mode: self._quick_ms(call) for mode, call in calls.items()}
            best = min(times, key=times.__getitem__)
            text = ", ".join(f"{mode} {ms:.4f} ms" for mode, ms in times.items())
            shape = "x".join(map(str, case.shape))
            how = f"torch.compile, {best}, chosen at {shape} ({text})"
            self._choice[key] = best, how + self._untried(case)
        mode, how = self._choice[key]
        return plain(case, inputs, partial(self._compiled, mode)), how

    @staticmethod
    def _untried(case: Any) -> str:
        left = [mode for mode in COMPILE_MODES if mode not in modes_to_try(case)]
        return f"; not tried: {', '.join(left)}" if left else ""

    def _compiled(self, mode: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The mode's version of a module-level function, made once."""
        key = mode, function
        if key not in self._functions:
            self._functions[key] = torch.compile(function, dynamic=False, **COMPILE_MODES[mode])
        return self._functions[key]
