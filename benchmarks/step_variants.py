"""The ways to train a network that `benchmarks.step` times, and what they are made of.

`RECIPES` is the table of providers. All but the first have bf16 weights, as under DeepSpeed's bf16:
the network's weights and gradients are bf16, the optimizer reads float32 copies of the gradients,
updates float32 masters and their EMA, and casts them back. In `LADDER` each row has one technique
more than the row before.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from benchmarks.plain import GAMMA, interpolate, prepare, velocity_loss
from benchmarks.step_optimizers import KINDS, OptimizerStep, Weights
from mixflow_fast import MixFlow
from mixflow_fast.kernels.attention.choice import choose_backend
from mixflow_fast.models import DiTDH, SiT, Transformer
from mixflow_fast.models.blocks import SwiGLU
from mixflow_fast.models.execution import Execution

XL = dict(input_size=32, patch_size=2, hidden_size=1152, depth=28, num_heads=16, num_classes=1000)
TOY = dict(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
# The clock is the objective's here: it changes no speed, and all arms must have the same loss.
DITDH_XL = dict(clock="data_at_1")
DITDH_TOY = dict(
    clock="data_at_1", input_size=4, in_channels=4, hidden_size=(16, 32), depth=(1, 1),
    num_heads=(2, 2), num_classes=10,
)  # fmt: skip
# Operators of mode "fused" by network.
FUSED_OPS = {
    SiT: ("residual_norm", "modulated_norm", "gelu", "attention"),
    DiTDH: ("residual_norm", "modulated_norm", "swiglu", "qk_norm_rope", "attention"),
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What an arm is made of.

    Attributes:
        optimizer: a name of `KINDS`.
        half: bf16 weights and float32 masters, else float32 with TF32.
        reads_loss: `loss.item()` each step.
        padded: DiT-DH's SwiGLU runs at a multiple of 64 columns.
        adds: what it has that the row before in `LADDER` has not.
    """

    execution: Execution
    objective: Literal["plain", "compiled", "mixflow"] = "compiled"
    optimizer: str = "tuned"
    half: bool = True
    reads_loss: bool = False
    padded: bool = True
    adds: str = ""

    @property
    def note(self) -> str:
        """How the arm is set up, for its rows."""
        mode = "eager" if self.execution.mode == "eager" else f"{self.execution.mode}, blocks"
        mode += " compiled (mode default only), ends eager" if self.execution.compiles else ""
        recomputed = self.execution.checkpointing
        mode += "" if recomputed == "none" else f", checkpointing {recomputed}"
        precision = "bf16 weights, float32 masters" if self.half else "float32 with TF32"
        objective = "MixFlow" if self.objective == "mixflow" else f"{self.objective} lines"
        parts = [mode, precision, f"objective: {objective}", KINDS[self.optimizer].note]
        parts += ["loss.item() every step"] if self.reads_loss else []
        parts += [] if self.padded else ["SwiGLU not padded"]
        return ", ".join(parts)

    def ops(self, network: type[Transformer]) -> set[str]:
        """Operators of this project that a step runs."""
        ops = set(FUSED_OPS[network] if self.execution.mode == "fused" else ())
        # The whole objective is red where a part of it is (`run.red_ops`).
        return ops | ({"objective"} if self.objective == "mixflow" else set())


_EAGER = dict(execution=Execution(), objective="plain")
_FUSED = Execution(mode="fused", attention="auto")
_TRAINER = dict(objective="mixflow", optimizer="adamwema")
RECIPES = {
    "eager_tf32": Recipe(**_EAGER, optimizer="plain", half=False, reads_loss=True),
    "eager_bf16": Recipe(**_EAGER, optimizer="plain", reads_loss=True, adds="bf16, eager"),
    "eager_tuned": Recipe(**_EAGER, adds="fused AdamW, foreach EMA, no loss.item()"),
    "compile_unpadded": Recipe(execution=Execution(mode="compile"), padded=False),
    "compile": Recipe(execution=Execution(mode="compile"), adds="torch.compile"),
    "fused_flash": Recipe(execution=replace(_FUSED, attention="flash"), adds="fused operators"),
    "fused": Recipe(execution=_FUSED, adds="attention backend by test"),
    "mixflow_fast": Recipe(execution=_FUSED, objective="mixflow", adds="MixFlow objective"),
    "mixflow_fast_adamwema": Recipe(execution=_FUSED, **_TRAINER, adds="the trainer's AdamWEMA"),
    "mixflow_fast_recompute": Recipe(
        execution=replace(_FUSED, checkpointing="elementwise"),
        **_TRAINER,
        adds="activations recomputed (peak memory)",
    ),
}
LADDER = (
    *("eager_bf16", "eager_tuned", "compile", "fused_flash", "fused"),
    *("mixflow_fast", "mixflow_fast_adamwema", "mixflow_fast_recompute"),
)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network, a batch, and the arms that take turns on it.

    Attributes:
        seconds: what it takes on an H200, compilation included, by estimate.
        image_gb: what the passes keep of an image in bf16, GB: 20 A a block (`benchmarks.census`,
            the eager mode keeps most), and some for what comes and goes.
        details: the optimizers are measured here, if they are not yet, and launches, if no
            later workload with details runs.
    """

    name: str
    network: type[Transformer]
    options: Mapping[str, object]
    batch: int
    arms: tuple[str, ...]
    seconds: float = 1.0
    image_gb: float = 0.0
    details: bool = False

    @property
    def label(self) -> str:
        """Name and batch as they are printed."""
        return f"step {self.name} B={self.batch}"


def workloads(smoke: bool) -> tuple[Workload, ...]:
    """The most telling first."""
    every, two = ("eager_tf32", *LADDER), ("compile", "mixflow_fast")
    # Its batch fits at once in every arm: here peak memory compares.
    basis = tuple(name for name in every if name not in ("eager_tuned", "fused_flash"))
    if smoke:
        toy = dict(name="toy SiT", network=SiT, options=TOY, batch=4)
        rae = dict(name="toy DiT-DH", network=DiTDH, options=DITDH_TOY, batch=2)
        some = ("eager_bf16", "compile_unpadded", "mixflow_fast")
        return Workload(**toy, arms=every, details=True), Workload(**rae, arms=some)
    sit = dict(name="SiT-XL/2-256", network=SiT, options=XL)
    rae = dict(name="DiT-DH-XL-256", network=DiTDH, options=DITDH_XL)
    large = dict(name="SiT-XL/2-512", network=SiT, options=XL | {"input_size": 64})
    return (
        Workload(**sit, batch=256, arms=every, seconds=125, image_gb=0.36, details=True),
        Workload(**sit, batch=32, arms=basis, seconds=70, image_gb=0.36, details=True),
        Workload(**rae, batch=64, arms=("compile_unpadded", *two), seconds=100, image_gb=0.5),
        Workload(**large, batch=32, arms=two, seconds=60, image_gb=1.4),
    )


def network(workload: Workload, device: torch.device) -> Transformer:
    """The workload's network in float32, no weight of it zero."""
    torch.manual_seed(0)
    with device:
        net = workload.network(**workload.options)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:  # adaLN-zero would multiply by zeros
                p.add_(torch.randn_like(p), alpha=0.02)
    return net.train()


def twin(net: Transformer, recipe: Recipe) -> Transformer:
    """The same parameters and buffers in a network of its own that runs as the recipe says.

    On the CPU nothing is compiled: that takes a minute, and a smoke run times nothing.
    """
    tensors = [*net.parameters(), *net.buffers()]
    other = copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})
    on_cpu = tensors[0].device.type == "cpu"
    other.set_execution(replace(recipe.execution, compiled=False) if on_cpu else recipe.execution)
    if not recipe.padded:
        for module in other.modules():
            if isinstance(module, SwiGLU):
                module.padded = False
    return other


def backends(net: Transformer, batch: int) -> str:
    """What attention="auto" chose for the network's blocks: "cudnn", "flash2 and efficient"."""
    tokens = (net.input_size // net.patch_size) ** 2
    weight = net.blocks[0].attn.qkv.weight
    heads = [(b.attn.num_heads, b.attn.qkv.in_features // b.attn.num_heads) for b in net.blocks]
    chosen = [
        choose_backend(batch, tokens, count, size, weight.dtype, weight.device).backend
        for count, size in dict.fromkeys(heads)
    ]
    return " and ".join(dict.fromkeys(chosen))


Draws = tuple[Tensor, Tensor, Tensor]
# (rows, draws or None) -> mean loss of these rows of the batch; see `make_loss`.
Loss = Callable[..., Tensor]


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def make_loss(
    recipe: Recipe, net: Transformer, x1: Tensor, y: Tensor, ids: Tensor, impl: str
) -> Loss:
    """An arm's loss(rows, draws=None), of these rows of the batch.

    Draws (x0, t, m of the whole batch) take the place of the arm's own. With the objective
    "mixflow" it takes `exact=True`: x1 less the noise in its input stands in for the prediction.
    """
    prepare_fn, loss_fn = prepare, velocity_loss
    if recipe.objective == "compiled" and x1.device.type != "cpu":
        prepare_fn, loss_fn = _compiled(prepare), _compiled(velocity_loss)
    objective = MixFlow(gamma=GAMMA, clock=net.clock, impl=impl)

    def plain(rows: slice, draws: Draws | None = None) -> Tensor:
        data = x1[rows]
        if draws is None:
            x, t, _, x0 = prepare_fn(data, GAMMA)
        else:
            x0, t, m = (value[rows] for value in draws)
            x = interpolate(data, x0, m)
        return loss_fn(net(x, t, y[rows]), data, x0)

    def ours(rows: slice, draws: Draws | None = None, exact: bool = False) -> Tensor:
        if draws is None:
            # Before prepare: the loss draws the same noise again, from this very memory.
            ids[rows].add_(len(ids))
            it = objective.prepare(x1[rows], ids=ids[rows])
        else:
            x0, t, m = (value[rows] for value in draws)
            it = objective.prepare(x1[rows], x0=x0, t=t, slowed_t=m)
        if exact:
            return objective.loss((x1[rows] - it.x0()).requires_grad_(), it)
        return objective.loss(net(it.x, it.t, y[rows]), it)

    return ours if recipe.objective == "mixflow" else plain


@dataclass
class Arm:
    """One provider's training step; arms may share a network and an optimizer with its EMA.

    `micro` is the number of samples that a backward pass takes.
    """

    name: str
    recipe: Recipe
    loss: Loss
    net: Transformer | None
    optimizer: OptimizerStep | None
    weights: Weights | None
    micro: int
    batch: int

    @property
    def note(self) -> str:
        """How the arm is set up, with what was chosen on this device."""
        if self.net is None:
            return self.recipe.note
        execution = self.net.execution
        note = replace(self.recipe, execution=execution).note
        if execution.mode == "fused":
            note += f", attention {execution.attention}"
            if execution.attention == "auto":
                note += f": {backends(self.net, self.micro)}"
        if self.micro < self.batch:
            note += f"; does not fit at once, accumulated from micro-batches of {self.micro}"
        return note

    def _parts(self) -> Iterator[tuple[slice, float]]:
        """The micro-batches with their shares of the batch."""
        for first in range(0, self.batch, self.micro):
            rows = slice(first, min(first + self.micro, self.batch))
            yield rows, (rows.stop - rows.start) / self.batch

    def step(self) -> None:
        """One step on the whole batch; gradients are gone afterwards."""
        for rows, share in self._parts():
            loss = self.loss(rows)
            (loss * share).backward()
        self.optimizer.step()
        self.drop_gradients()
        if self.recipe.reads_loss:
            loss.item()

    def warm(self, clear: Callable[[], object]) -> None:
        """A step; the micro-batch is halved until it fits the device's memory."""
        while True:
            try:
                return self.step()
            except torch.OutOfMemoryError:
                self.drop_gradients()
                if self.micro == 1:
                    raise
                self.micro //= 2
            # Outside the handler, whose traceback holds the tensors of the failed step.
            clear()

    def drop_gradients(self) -> None:
        """Free the gradients of networks and masters."""
        for p in (*self.weights.params, *self.weights.masters):
            p.grad = None

    def resident_bytes(self) -> int:
        """What a run of this arm alone keeps between steps."""
        held = self.weights.nbytes(self.recipe.half, ema=not self.optimizer.has_ema)
        return held + self.optimizer.state_bytes()

    def loss_of(self, draws: Draws) -> float:
        """The batch's loss with given noise and times; in the graph that training compiled."""
        return sum(self.loss(rows, draws).item() * share for rows, share in self._parts())

    def exact_loss(self) -> float:
        """The loss of mixflow_fast, drawing for itself, where x1 - x0 is predicted: zero."""
        return sum(self.loss(rows, exact=True).item() * share for rows, share in self._parts())
