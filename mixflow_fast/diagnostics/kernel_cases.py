"""An operator with inputs: what `kernel_checks` checks, and those of the objective.

`ObjectiveCase` are the operators interpolate and velocity_loss, called by `MixFlow`; `block_cases`
has those of a transformer block.

Modes: "full" is a forward pass and the gradients, "forward" the first alone, and "recompute" the
gradients together with an output that was not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.objective.mixflow import MixFlow

SEED = 0x9E3779B97F4A7C15
BUCKETS = ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))

Mode = Literal["full", "forward", "backward", "recompute", "step"]
Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]
Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Inputs:
    """What an operator is given.

    Attributes:
        tensors: arguments by name; where shift, scale and gate are, they are chunks of one tensor.
        upstream: a gradient for each output.
        shared: names of the arguments without a batch dimension, whose gradients sum over it.
    """

    tensors: Tensors
    upstream: tuple[Tensor, ...]
    shared: frozenset[str] = frozenset()

    @property
    def trained(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]

    def double(self) -> Inputs:
        """The same numbers in float64."""
        return self._mapped(lambda name, x: x.double() if x.is_floating_point() else x)

    def rows(self, rows: slice | list[int]) -> Inputs:
        """Some samples of the batch as the whole of it."""
        return self._mapped(lambda name, x: x if name in self.shared else x[rows])

    def _mapped(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        tensors = {
            name: change(name, tensor.detach()).requires_grad_(tensor.requires_grad)
            for name, tensor in self.tensors.items()
        }
        upstream = tuple(change("upstream", gradient) for gradient in self.upstream)
        return replace(self, tensors=tensors, upstream=upstream)


class Case(Protocol):
    """An operator at one shape, dtype and variant."""

    dtype: torch.dtype

    @property
    def ops(self) -> tuple[str, ...]:
        """Operators that the call runs."""

    @property
    def name(self) -> str:
        """What is called, and how."""

    @property
    def label(self) -> str:
        """The name with the dtype."""

    def op_of(self, tensor: str) -> str:
        """The operator that made the named result."""

    def inputs(self, device: torch.device, empty: bool = False) -> Inputs:
        """Random arguments, the same ones every time; `empty`: memory that nobody wrote."""

    def call(self, inputs: Inputs, impl: str) -> Call:
        """A call of the operator: results by name, gradients as "d" and the argument's name."""

    def reference(self, inputs: Inputs) -> Call:
        """The same in plain PyTorch; of float64 inputs it is the truth."""

    def parts(self, inputs: Inputs, found: Tensors) -> Tensors:
        """The results as they are judged."""


class Draw:
    """Tensors of one random generator, or unwritten memory of the same shapes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, empty: bool) -> None:
        self._generator = torch.Generator(device).manual_seed(7)
        self._device, self._dtype, self._empty = device, dtype, empty

    def normal(
        self, *shape: int, mean: float = 0.0, std: float = 1.0, dtype: torch.dtype | None = None
    ) -> Tensor:
        options = {"device": self._device, "dtype": dtype or self._dtype}
        if self._empty:
            return torch.empty(shape, **options)
        values = torch.randn(shape, generator=self._generator, **options)
        return values if (mean, std) == (0.0, 1.0) else values.mul_(std).add_(mean)

    def uniform(self, *shape: int, low: float = 0.0) -> Tensor:
        """Float32 numbers between low and low + 1."""
        return torch.rand(shape, generator=self._generator, device=self._device) + low


@dataclass(frozen=True)
class Setting:
    """What of the objective a case switches on; the defaults are what the speeds are measured with.

    Attributes:
        patch_size: the prediction comes as tokens of such patches; None: in x1's shape.
        sigma: the prediction has a second half of channels, whose gradient is zero.
        ids: the samples have positions; without them nothing can be drawn that a check knows.
        weight: None, or the shape of a weight: one per "sample" or "element", or a "mask".
    """

    path: str = "linear"
    prediction: str = "velocity"
    clock: str = "data_at_1"
    target_at: str = "slowed"
    loss_weight: str | None = None
    patch_size: int | None = None
    sigma: bool = False
    moments: bool = False
    weight: Literal["sample", "element", "mask"] | None = None
    timesteps: str = "beta21"
    interval: str = "shifted"
    ids: bool = True
    shift: float = 1.0

    def objective(self, impl: str) -> MixFlow:
        names = ("clock", "path", "prediction", "target_at", "loss_weight")
        options = {n: getattr(self, n) for n in (*names, "timesteps", "interval", "shift")}
        return MixFlow(gamma=0.8, seed=SEED, impl=impl, **options)

    def __str__(self) -> str:
        words = [self.path, self.prediction, self.clock]
        words += ["target at label"] if self.target_at == "label" else []
        words += [f"{self.loss_weight} loss weight"] if self.loss_weight else []
        words += [f"tokens of {self.patch_size}"] if self.patch_size else []
        words += [name for name in ("sigma", "moments") if getattr(self, name)]
        words += [f"weight per {self.weight}"] if self.weight else []
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class ObjectiveCase:
    """`MixFlow.prepare` and `.loss`, which call interpolate and velocity_loss.

    Attributes:
        shape: (B, C, H, W).
        dtype: of x1 and, if `pred_dtype` is None, of the prediction.
        noise_dtype: of x0, where it is given.
        drawn: noise and times are drawn from seed and ids; otherwise they are arguments, so that
            every implementation sees the same ones.
    """

    shape: tuple[int, ...]
    setting: Setting = Setting()
    dtype: torch.dtype = torch.bfloat16
    pred_dtype: torch.dtype | None = None
    noise_dtype: torch.dtype = torch.float32
    drawn: bool = False
    mode: Mode = "full"

    ops = ("interpolate", "velocity_loss")

    @property
    def name(self) -> str:
        return f"{self.setting}{' drawn' if self.drawn else ''} {shape_name(self.shape)}"

    @property
    def label(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)}"

    def op_of(self, tensor: str) -> str:
        return "interpolate" if tensor in ("x", "t", "slowed_t") else "velocity_loss"

    def inputs(self, device: torch.device, empty: bool = False) -> Inputs:
        """The given times cover the four buckets evenly."""
        draw, setting = Draw(device, self.dtype, empty), self.setting
        B, C, H, W = self.shape
        t = (torch.arange(B, device=device, dtype=torch.float32) + 0.5) / B
        slowing = 0.8 * draw.uniform(B)
        slowed = t * (1 - slowing) if setting.clock == "data_at_1" else t + slowing * (1 - t)
        tensors = {"x1": draw.normal(*self.shape, mean=0.5), "t": t, "slowed_t": slowed}
        tensors["x0"] = draw.normal(*self.shape, dtype=self.noise_dtype)
        if setting.ids:
            tensors["ids"] = torch.arange(B, device=device) + (1 << 33)
        if setting.moments:
            tensors["std"] = draw.normal(*self.shape, std=0.3).abs_()
        if setting.weight:
            of = {"sample": (B,), "element": self.shape, "mask": (B, 1, H, W)}[setting.weight]
            tensors["weight"] = draw.uniform(*of, low=0.5)
        C *= 1 + setting.sigma
        p = setting.patch_size
        shape = (B, H // p * (W // p), p * p * C) if p else (B, C, H, W)
        pred = draw.normal(*shape, dtype=self.pred_dtype)
        tensors["pred"] = pred.requires_grad_(self.mode != "forward")
        return Inputs(tensors, (draw.uniform(B, low=0.5),))

    def call(self, inputs: Inputs, impl: str) -> Call:
        mix = self.setting.objective(impl)
        return lambda: self._run(mix, inputs)

    def reference(self, inputs: Inputs) -> Call:
        return self.call(inputs, "reference")

    def _run(self, mix: MixFlow, inputs: Inputs) -> Tensors:
        """The sum of the losses with its gradient, and each loss with a gradient of its own."""
        given, pred = inputs.tensors, inputs.tensors["pred"]
        x1 = Moments(given["x1"], given["std"], 0.18215) if self.setting.moments else given["x1"]
        times = () if self.drawn else ("x0", "t", "slowed_t")
        it = mix.prepare(
            x1,
            ids=given.get("ids"),
            patch_size=self.setting.patch_size,
            **{name: given[name] for name in times},
        )
        options = {"weight": given.get("weight"), "learn_sigma": self.setting.sigma}
        losses = mix.loss(pred, it, reduction="none", **options)
        total = mix.loss(pred, it, reduction="sum", **options)
        found = {"x": it.x, "losses": losses.detach(), "loss": total.detach()}
        if self.drawn:
            found |= {"t": it.t, "slowed_t": it.slowed_t}
        if self.mode == "forward":
            return found
        (of_each,) = torch.autograd.grad(losses, pred, inputs.upstream[0].to(losses.dtype))
        (found["dpred"],) = torch.autograd.grad(total, pred)
        found["dpred, any upstream"] = of_each
        if self.setting.sigma:
            channels = given["x1"].shape[1]
            grad = found["dpred"]
            if self.setting.patch_size:
                grad = grad.unflatten(-1, (-1, 2 * channels)).movedim(-1, 1)
            found["dpred, sigma half"] = grad[:, channels:]
        return found

    def parts(self, inputs: Inputs, found: Tensors) -> Tensors:
        """The losses by bucket of t: an error at one end must not hide behind the other's size."""
        if self.drawn:
            return found
        t, parts = inputs.tensors["t"], dict(found)
        losses = parts.pop("losses")
        for low, high in BUCKETS:
            inside = (t >= low) & (t < high)
            if inside.any():
                parts[f"losses, t in [{low:g}, {high:g})"] = losses[inside]
        return parts


def function_call(
    function: Function, inputs: Inputs, outputs: tuple[str, ...], mode: Mode, **options: object
) -> Call:
    """A call of a function of the arguments by name: its outputs, and every gradient."""

    def forward() -> Tensors:
        made = function(**inputs.tensors, **options)
        return dict(zip(outputs, made if isinstance(made, tuple) else (made,), strict=True))

    def without_gradient() -> Tensors:
        with torch.no_grad():
            return forward()

    def full() -> Tensors:
        made = forward()
        wanted = [inputs.tensors[name] for name in inputs.trained]
        gradients = torch.autograd.grad(list(made.values()), wanted, inputs.upstream)
        found = {f"d{n}": g for n, g in zip(inputs.trained, gradients, strict=True)}
        return {name: value.detach() for name, value in made.items()} | found

    return without_gradient if mode == "forward" else full


def shape_name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
