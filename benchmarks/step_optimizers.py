"""Optimizers of the training step: float32 masters of bf16 weights, AdamW, and an EMA.

As under DeepSpeed's bf16: the network's weights and gradients are bf16, the optimizer reads float32
copies of the gradients, updates float32 masters and their EMA, and casts them back.

| kind          | AdamW and EMA                                                          |
|---------------|------------------------------------------------------------------------|
| plain         | torch's AdamW as it comes, casts and EMA in a Python loop              |
| tuned         | fused AdamW; casts and EMA as foreach calls                            |
| adamwema      | `mixflow_fast.optim.AdamWEMA` with the gradient norm; casts as foreach;|
|               | one pass of `csrc/` where it was built, foreach calls elsewhere        |
| apex          | NVIDIA apex's FusedAdam, EMA as a foreach call                         |
| apex_adamwema | `mixflow_fast.optim.ApexAdamWEMA`: adamwema by apex's FusedAdam        |
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mixflow_fast import extension
from mixflow_fast.models import Transformer
from mixflow_fast.optim.apex import OPTIMIZERS

LR, DECAY = 1e-4, 0.9999
KINDS = {
    "plain": "AdamW, casts and EMA in a Python loop",
    "tuned": "fused AdamW, foreach EMA",
    "adamwema": "AdamWEMA, with the gradient norm",
    "apex": "apex FusedAdam, foreach EMA",
    "apex_adamwema": "ApexAdamWEMA: apex FusedAdam, with the gradient norm and EMA",
}
# What nobody can avoid moving for a parameter, all float32: gradient, weight, moments, EMA.
STEP_BYTES = 4 + 4 * 8
# Bytes a parameter between steps, float32: two moments, gradients of bf16 weights, an own EMA.
STATE_BYTES = {"plain": 8, "tuned": 12, "adamwema": 16, "apex": 12, "apex_adamwema": 16}
# Those of the package, with an EMA of their own, by `optim.name`.
_OURS = {"adamwema": "adamw_ema", "apex_adamwema": "apex_fused_adam"}


class Weights:
    """A network's weights in float32 and in bf16, and one EMA; all arms train the same.

    Attributes:
        single, half: the network with float32 and with bf16 weights. The parameters of the first
            are the masters of the second.
        masters, params: what is trained of `single` and of `half`.
        ema: of the masters.
    """

    def __init__(self, net: Transformer) -> None:
        self.single, self.half = net, copy.deepcopy(net).to(torch.bfloat16)
        self.masters, self.params = (
            [p for p in network.parameters() if p.requires_grad] for network in (net, self.half)
        )
        self.ema = [p.detach().clone() for p in self.masters]

    @torch.no_grad()
    def settle(self) -> None:
        """The bf16 weights are those of the masters again, whoever stepped last."""
        for p, master in zip(self.params, self.masters, strict=True):
            p.copy_(master)

    def nbytes(self, half: bool, ema: bool) -> int:
        """Of what a run with these weights holds: network, masters, and the EMA if it is used."""
        networks = (self.single, self.half) if half else (self.single,)
        held = [t for net in networks for t in (*net.parameters(), *net.buffers())]
        return sum(t.nbytes for t in (*held, *(self.ema if ema else ())))


class OptimizerStep:
    """One way to step.

    Args:
        kind: of `KINDS`.
        weights: the masters, their bf16 copies and the EMA.
        half: gradients come from the bf16 network.

    Attributes:
        has_ema: it has an EMA of its own, and leaves that of `weights` alone.
    """

    def __init__(self, kind: str, weights: Weights, half: bool) -> None:
        self._kind, self._weights, self._half = kind, weights, half
        self._inner = _inner(kind, weights.masters)
        self.has_ema = kind in _OURS
        self._gradients: list[Tensor] = []

    @torch.no_grad()
    def step(self) -> None:
        """Gradients are read from the network's parameters, or from the masters without `half`."""
        w, loop = self._weights, self._kind == "plain"
        if self._half:
            self._take_gradients(loop)
        self._inner.step()
        if loop:
            for ema, p in zip(w.ema, w.masters, strict=True):
                ema.mul_(DECAY).add_(p, alpha=1 - DECAY)
        elif not self.has_ema:
            torch._foreach_lerp_(w.ema, w.masters, 1 - DECAY)
        if self._half and loop:
            w.settle()
        elif self._half:
            torch._foreach_copy_(w.params, w.masters)

    def _take_gradients(self, loop: bool) -> None:
        w = self._weights
        if loop:
            for p, master in zip(w.params, w.masters, strict=True):
                master.grad = p.grad.float()
            return
        if not self._gradients:
            self._gradients = [torch.empty_like(master) for master in w.masters]
        torch._foreach_copy_(self._gradients, [p.grad for p in w.params])
        for master, gradient in zip(w.masters, self._gradients, strict=True):
            master.grad = gradient

    def forget(self) -> None:
        """Gives the memory of moments and gradients back; the next step starts them anew."""
        self._inner.state.clear()
        self._gradients = []

    def state_bytes(self) -> int:
        """Bytes of moments, of float32 gradients that are kept, and of an EMA of its own."""
        states = [v for state in self._inner.state.values() for v in state.values()]
        return sum(v.nbytes for v in (*states, *self._gradients) if isinstance(v, Tensor))


def describe_adamwema(device_type: str) -> str:
    """Which of its implementations `AdamWEMA` takes here."""
    status = extension.load()
    if status.serves(device_type):
        return f"one pass of csrc ({status.state})"
    return f"foreach calls: csrc is not there for {device_type} ({status.reason})"


def _inner(kind: str, masters: list[nn.Parameter]) -> Any:
    if kind in _OURS:
        return OPTIMIZERS[_OURS[kind]](masters, lr=LR, ema_decay=DECAY)
    if kind == "apex":
        from apex.optimizers import FusedAdam

        return FusedAdam(masters, lr=LR, weight_decay=0.0, adam_w_mode=True)
    fused = True if kind == "tuned" else None
    return torch.optim.AdamW(masters, lr=LR, weight_decay=0.0, fused=fused)
