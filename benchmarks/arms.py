"""The four ways to train SiT-XL/2 that `benchmarks.step` times, as steps without arguments.

| provider     | network and precision          | objective      | optimizer, EMA, host          |
|--------------|--------------------------------|----------------|-------------------------------|
| eager_tf32   | eager, float32 with TF32       | plain lines    | AdamW, EMA in a Python loop,  |
|              |                                |                | `loss.item()` every step      |
| eager_bf16   | eager, bf16 autocast           | plain lines    | the same                      |
| compile      | compiled blocks, bf16 autocast | compiled lines | fused AdamW, foreach EMA      |
| mixflow_fast | the same                       | MixFlow        | the same                      |

Every arm trains the same float32 weights; bf16 means autocast over them. Blocks are compiled one
by one with mode "default". The last two differ in the objective alone, so their ratio is its own.

Model FLOPs per image: forward 24 N D^2 + 4 N^2 D + 12 D^2 a block (N tokens, width D) and the ends;
training three times that, less the gradients of latents and sinusoid, which nobody needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.providers import GAMMA, interpolate, prepare, velocity_loss
from mixflow_fast import MixFlow
from mixflow_fast.models import SiT
from mixflow_fast.optim import AdamWEMA

XL = dict(input_size=32, patch_size=2, hidden_size=1152, depth=28, num_heads=16, num_classes=1000)
TOY = dict(input_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2, num_classes=10)
LR, DECAY = 1e-4, 0.9999
EAGER = "AdamW, Python EMA, loss.item() every step"
ARMS = {
    "eager_tf32": f"eager, float32 with TF32, {EAGER}",
    "eager_bf16": f"eager, bf16 autocast, {EAGER}",
    "compile": "blocks and objective compiled (mode default only), the network's ends eager, no "
    "CUDA graph, bf16 autocast, fused AdamW, foreach EMA",
    "mixflow_fast": "network and optimizer of compile, MixFlow objective",
}

Draws = tuple[Tensor, Tensor, Tensor]
# (rows, draws or None) -> mean loss of these rows of the batch; see `losses`.
Loss = Callable[..., Tensor]


def train_flops(net: SiT) -> float:
    """Model FLOPs (two a multiply-add) per image and training step, see the module's docstring."""
    c = net.config
    N, D = (c["input_size"] // c["patch_size"]) ** 2, c["hidden_size"]
    area = c["patch_size"] ** 2
    mlp = 4 * N * D * int(D * c["mlp_ratio"])
    block = 8 * N * D * D + mlp + 4 * N * N * D + 12 * D * D
    embed = 2 * N * area * c["in_channels"] * D
    final = 2 * N * D * area * net.out_channels + 4 * D * D
    first_of_times, second_of_times = 2 * 256 * D, 2 * D * D
    forward = c["depth"] * block + embed + final + first_of_times + second_of_times
    return 3 * forward - embed - first_of_times


def network(device: torch.device, toy: bool) -> SiT:
    """SiT-XL/2 or the toy, no weight of it zero."""
    torch.manual_seed(0)
    with device:
        net = SiT(**(TOY if toy else XL))
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:  # adaLN-zero would multiply by zeros
                p.add_(torch.randn_like(p), alpha=0.02)
    return net.train()


class PlainState:
    """torch's AdamW and an EMA: in a Python loop as most trainers do it, or tuned.

    Args:
        fused: fused AdamW and the EMA as one foreach call.
    """

    def __init__(self, params: list[Tensor], fused: bool) -> None:
        self._params = params
        self._fused = fused
        self._optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=fused or None)
        self.state = self._optimizer.state
        self.ema = [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self) -> None:
        self._optimizer.step()
        if self._fused:
            torch._foreach_lerp_(self.ema, self._params, 1 - DECAY)
        else:
            for ema, p in zip(self.ema, self._params, strict=True):
                ema.mul_(DECAY).add_(p, alpha=1 - DECAY)

    def state_bytes(self) -> int:
        """Bytes of moments and EMA."""
        tensors = [v for state in self.state.values() for v in state.values()]
        return sum(v.nbytes for v in [*tensors, *self.ema] if isinstance(v, Tensor))


def our_optimizer(params: list[Tensor]) -> AdamWEMA:
    return AdamWEMA(params, lr=LR, ema_decay=DECAY)


@dataclass
class Arm:
    """One provider's training step.

    Attributes:
        loss: see `losses`.
        optimizer: with the EMA; arms may share one.
        reads_loss: `loss.item()` each step.
        micro: samples that a backward pass takes.
    """

    name: str
    loss: Loss
    optimizer: PlainState
    reads_loss: bool
    micro: int
    params: list[Tensor]
    batch: int

    def _parts(self) -> Iterator[tuple[slice, float]]:
        """The micro-batches with their shares of the batch."""
        for first in range(0, self.batch, self.micro):
            rows = slice(first, min(first + self.micro, self.batch))
            yield rows, (rows.stop - rows.start) / self.batch

    def step(self) -> None:
        """One step on the whole batch; gradients are gone afterwards."""
        for rows, share in self._parts():
            loss = self.loss(rows, None)
            (loss * share).backward()
        self.optimizer.step()
        self.drop_gradients()
        if self.reads_loss:
            loss.item()

    def drop_gradients(self) -> None:
        for p in self.params:
            p.grad = None

    def loss_of(self, draws: Draws) -> float:
        """The batch's loss with given noise and times; in the graph that training compiled."""
        return sum(self.loss(rows, draws).item() * share for rows, share in self._parts())

    def exact_loss(self) -> float:
        """Of mixflow_fast, drawing for itself: the loss where x1 - x0 is predicted, so zero."""
        return sum(self.loss(rows, exact=True).item() * share for rows, share in self._parts())


def losses(net: SiT, x1: Tensor, y: Tensor, ids: Tensor, impl: str) -> dict[str, Loss]:
    """Each provider's loss(rows, draws=None), of these rows of the batch.

    Draws (x0, t, m of the whole batch) take the place of the provider's own. That of mixflow_fast
    takes `exact=True`: x1 less the noise in its input stands in for the network's prediction.
    `compile` is left out on the CPU.
    """
    eager_blocks = net.blocks
    kind = x1.device.type

    def plain(
        blocks: nn.ModuleList,
        half: bool,
        prepare_fn: Callable[..., Any] = prepare,
        loss_fn: Callable[..., Tensor] = velocity_loss,
    ) -> Loss:
        def loss(rows: slice, draws: Draws | None = None) -> Tensor:
            data = x1[rows]
            if draws is None:
                x, t, _, x0 = prepare_fn(data, GAMMA)
            else:
                x0, t, m = (value[rows] for value in draws)
                x = interpolate(data, x0, m)
            net.blocks = blocks
            with torch.autocast(kind, torch.bfloat16) if half else nullcontext():
                pred = net(x, t, y[rows])
            return loss_fn(pred, data, x0)

        return loss

    def ours(blocks: nn.ModuleList) -> Loss:
        objective = MixFlow(gamma=GAMMA, clock=net.clock, impl=impl)

        def loss(rows: slice, draws: Draws | None = None, exact: bool = False) -> Tensor:
            if draws is None:
                # Before prepare: the loss draws the same noise again, from this very memory.
                ids[rows].add_(len(ids))
                it = objective.prepare(x1[rows], ids=ids[rows])
            else:
                x0, t, m = (value[rows] for value in draws)
                it = objective.prepare(x1[rows], x0=x0, t=t, slowed_t=m)
            if exact:
                return objective.loss((x1[rows] - it.x0()).requires_grad_(), it)
            net.blocks = blocks
            with torch.autocast(kind, torch.bfloat16):
                pred = net(it.x, it.t, y[rows])
            return objective.loss(pred, it)

        return loss

    made = {"eager_tf32": plain(eager_blocks, False), "eager_bf16": plain(eager_blocks, True)}
    if kind == "cpu":
        return made | {"mixflow_fast": ours(eager_blocks)}
    torch._dynamo.config.recompile_limit = 256
    compiled_blocks = nn.ModuleList(torch.compile(b, dynamic=False) for b in eager_blocks)
    functions = (torch.compile(f, dynamic=False) for f in (prepare, velocity_loss))
    made["compile"] = plain(compiled_blocks, True, *functions)
    return made | {"mixflow_fast": ours(compiled_blocks)}
