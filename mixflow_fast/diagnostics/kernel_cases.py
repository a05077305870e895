"""Errors of the kernels against float64 arithmetic, next to plain PyTorch's in the same dtype.

    err(ours, float64) <= 2 err(eager in the same dtype, float64) + floor        (relative RMS)

float64 truth and eager are `MixFlow(impl="reference")` on the same numbers: that file is held to
tensors of the official implementations by the tests. x0, t and m are given, so that all three see
the same ones; the draws have their own checks (`benchmarks/draws.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.verify import relative_rms
from mixflow_fast import MixFlow, Moments

FLOORS = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))


@dataclass(frozen=True)
class Finding:
    """One checked number.

    Attributes:
        check: what was looked at, with its settings.
        tensor: "x", "loss", "gradient", ...
        dtype: of the data, a torch name.
        error, limit: passed when error <= limit; for yes-or-no checks 0 or 1 and 0.
        eager_error: of plain PyTorch in the same dtype, where there is one.
    """

    check: str
    tensor: str
    dtype: str
    error: float
    limit: float
    eager_error: float | None = None
    op: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


@dataclass(frozen=True)
class Setting:
    """What of the objective a check switches on."""

    path: str = "linear"
    prediction: str = "velocity"
    clock: str = "data_at_1"
    target_at: str = "slowed"
    loss_weight: str | None = None
    layout: str = "nchw"  # "tokens": patches of 2, the prediction with sigma channels
    moments: bool = False
    weight: str | None = None  # "sample" or "element"

    def objective(self, impl: str) -> MixFlow:
        return MixFlow(
            gamma=0.8,
            clock=self.clock,
            path=self.path,
            prediction=self.prediction,
            target_at=self.target_at,
            loss_weight=self.loss_weight,
            impl=impl,
        )

    def __str__(self) -> str:
        words = [self.path, self.prediction, self.clock]
        if self.target_at == "label":
            words.append("target at label")
        if self.loss_weight:
            words.append(f"{self.loss_weight} loss weight")
        if self.layout == "tokens":
            words.append("tokens")
        if self.moments:
            words.append("moments")
        if self.weight:
            words.append(f"{self.weight} weights")
        return " ".join(words)


# What the speeds are measured with, then each path with each prediction, each of both kinds in both
# clocks, and what else the kernels can do.
TIMED = Setting()
SETTINGS = (
    TIMED,
    Setting(clock="noise_at_1", weight="sample"),
    Setting(layout="tokens", weight="element"),
    Setting(moments=True, clock="noise_at_1"),
    Setting("gvp", "velocity", "noise_at_1", target_at="label"),
    Setting("vp", "velocity", "data_at_1"),
    Setting("linear", "score", "data_at_1", loss_weight="likelihood"),
    Setting("linear", "noise", "noise_at_1", loss_weight="velocity"),
    Setting("gvp", "noise", "data_at_1"),
    Setting("vp", "noise", "noise_at_1", target_at="label", loss_weight="likelihood"),
    Setting("gvp", "score", "noise_at_1", loss_weight="velocity"),
    Setting("vp", "score", "data_at_1", layout="tokens"),
    Setting("linear", "data", "noise_at_1"),
    Setting("gvp", "data", "data_at_1"),
    Setting("vp", "data", "noise_at_1"),
)


def _patches(x: Tensor, channels: int) -> Tensor:
    """(B, C, H, W) -> tokens (B, H/2 W/2, 4 channels), zeros in channels that x has not."""
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))
    B, C, H, W = x.shape
    grid = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 3, 5, 1)
    return grid.reshape(B, -1, 4 * C)


def _inputs(
    setting: Setting, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Random tensors; the times cover the four buckets evenly."""
    generator = torch.Generator(device).manual_seed(7)

    def normal(of: tuple[int, ...] = shape, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(of, generator=generator, device=device, dtype=as_dtype)

    batch = shape[0]
    t = (torch.arange(batch, device=device, dtype=torch.float32) + 0.5) / batch
    slowing = 0.8 * torch.rand(batch, generator=generator, device=device)
    slowed = t * (1 - slowing) if setting.clock == "data_at_1" else t + slowing * (1 - t)
    x1: Any = normal() + 0.5
    if setting.moments:
        x1 = Moments(x1, normal().abs() * 0.3, 0.18215)
    weight = None
    if setting.weight is not None:
        of = (batch,) if setting.weight == "sample" else shape
        weight = torch.rand(of, generator=generator, device=device) + 0.5
    pred = normal()
    if setting.layout == "tokens":
        pred = _patches(pred, 2 * shape[1])
    return {
        "x1": x1,
        "x0": normal(as_dtype=torch.float32),
        "t": t,
        "slowed_t": slowed,
        "pred": pred,
        "weight": weight,
        "upstream": torch.rand(batch, generator=generator, device=device) + 0.5,
        "ids": torch.arange(batch, device=device) + (1 << 33),
    }


def _double(value: Any) -> Any:
    if isinstance(value, Moments):
        return Moments(value.mean.double(), value.std.double(), value.scale)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(setting: Setting, impl: str, given: dict[str, Any]) -> dict[str, Tensor]:
    objective = setting.objective(impl)
    tokens = {"patch_size": 2} if setting.layout == "tokens" else {}
    sigma = {"learn_sigma": True} if setting.layout == "tokens" else {}
    it = objective.prepare(
        given["x1"],
        ids=given["ids"],
        x0=given["x0"],
        t=given["t"],
        slowed_t=given["slowed_t"],
        **tokens,
    )
    pred = given["pred"].clone().requires_grad_()
    losses = objective.loss(pred, it, weight=given["weight"], reduction="none", **sigma)
    (of_each,) = torch.autograd.grad(losses, pred, given["upstream"].to(losses.dtype))
    total = objective.loss(pred, it, weight=given["weight"], reduction="sum", **sigma)
    (gradient,) = torch.autograd.grad(total, pred)
    made = {
        "x": it.x,
        "losses": losses.detach(),
        "loss": total.detach(),
        "gradient": gradient,
        "gradient, any upstream": of_each,
    }
    return made


def errors(
    setting: Setting,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    impl: str,
    ops: tuple[str, ...] = ("interpolate", "velocity_loss"),
) -> Iterator[Finding]:
    """Findings of one setting at one shape and dtype: x_m, losses by t bucket, gradients."""
    given = _inputs(setting, shape, dtype, device)
    ours = _run(setting, impl, given)
    eager = _run(setting, "reference", given)
    truth = _run(setting, "reference", {name: _double(value) for name, value in given.items()})
    where = f"{setting} {'x'.join(map(str, shape))}"
    name = str(dtype).removeprefix("torch.")

    def finding(tensor: str, pick: Any) -> Finding:
        a, e, b = pick(ours), pick(eager), pick(truth)
        eager_error = relative_rms(e, b)
        wrong_form = a.shape != b.shape or a.dtype != e.dtype
        error = float("inf") if wrong_form else relative_rms(a, b)
        limit = 2 * eager_error + FLOORS[e.dtype]
        return Finding(where, tensor, name, error, limit, eager_error)

    if "interpolate" in ops:
        yield finding("x", lambda made: made["x"])
    if "velocity_loss" not in ops:
        return
    for low, high in BUCKETS:
        inside = (given["t"] >= low) & (given["t"] < high)
        if inside.any():
            yield finding(
                f"losses, t in [{low:g}, {high:g})", lambda made, i=inside: made["losses"][i]
            )
    for tensor in ("loss", "gradient", "gradient, any upstream"):
        yield finding(tensor, lambda made, tensor=tensor: made[tensor])
    if setting.layout == "tokens":
        sigma = ours["gradient"].unflatten(-1, (4, -1))[..., shape[1] :]
        yield Finding(where, "gradient of the sigma half", name, sigma.abs().max().item(), 0.0)


def plan(level: str) -> list[tuple[Setting, torch.dtype]]:
    """Settings and dtypes of a level, the most telling first.

    "timed": what the speeds are measured with, in the three dtypes. "smoke": each path and each
    prediction once. "full": every setting in float32 and in one of the two half dtypes by turns.
    """
    single, halves = torch.float32, (torch.bfloat16, torch.float16)
    timed = [(TIMED, dtype) for dtype in (torch.bfloat16, torch.float16, single)]
    if level == "timed":
        return timed
    if level == "smoke":
        chosen = [SETTINGS[2], SETTINGS[4], SETTINGS[9], SETTINGS[6]]
        return timed + list(zip(chosen, (*halves, single, single), strict=True))
    if level != "full":
        raise ValueError(f'level must be "timed", "smoke" or "full", got {level!r}')
    others = list(enumerate(SETTINGS))[1:]
    by_turns = [(setting, halves[number % 2]) for number, setting in others]
    return timed + [(s, d) for (_, s), d in product(others, [single])] + by_turns
