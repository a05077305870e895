"""Losses and norms of the last steps, kept on the device until they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast.objective.mixflow import Interpolation, MixFlow

# Equal parts of [0, 1], of the label time t that the network is told, in its own clock.
T_BUCKETS = 8


@dataclass(frozen=True)
class BadStep:
    """One rank's record of a step, on the CPU.

    Attributes:
        step: its number, from 1 on.
        norm: the global gradient norm, not finite.
        losses: (A,) of the rank's micro-batches.
        each: (A, M) of their samples.
    """

    step: int
    norm: float
    losses: Tensor
    each: Tensor


@dataclass(frozen=True)
class StepOutput:
    """What the network made of a micro-batch of M examples.

    Attributes:
        it: what the network was fed, with its times.
        y: (M,) int64 labels as the network saw them, some dropped.
        pred: the prediction, of the shape of it.x.
        alignment: scalar term of the teacher, not weighted.
        loss: scalar loss with the weighted term.
    """

    it: Interpolation
    y: Tensor
    pred: Tensor
    alignment: Tensor
    loss: Tensor


class StepRecord:
    """Losses and gradient norms of the steps since they were drained, on the device.

    A step that waited for its loss would leave the device idle: so it is only noted, and read where
    metrics are written and before each save.

    Args:
        device: device of this rank.
        steps: how many may pass before `drain`.
        microsteps: micro-batches of a step on this rank.
        microbatch: samples in one.

    Attributes:
        last_norm: gradient norm of the last step that was drained; None without any.
    """

    def __init__(self, device: torch.device, steps: int, microsteps: int, microbatch: int) -> None:
        self._each = torch.zeros(steps, microsteps, microbatch, device=device)
        self._losses = torch.zeros(steps, microsteps, device=device)
        self._norms = torch.zeros(steps, device=device)
        self._numbers: list[int] = []
        self._t: list[Tensor] = []
        self._edges = torch.arange(T_BUCKETS, device=device)
        self.last_norm: float | None = None
        self.clear_means()

    def reset(self) -> None:
        """Begin anew: the steps in it are not the run's any more."""
        self._numbers, self._t = [], []
        self.clear_means()

    def clear_means(self) -> None:
        """Start the means anew."""
        device = self._norms.device
        # Steps, loss, alignment; then by t: sums of the loss, counts.
        self._sums = torch.zeros(3, device=device)
        self._by_t = torch.zeros(2, T_BUCKETS, dtype=torch.float64, device=device)

    def micro_batch(self, loss: Tensor, mix: MixFlow, pred: Tensor, it: Interpolation) -> Tensor:
        """Note a micro-batch; returns the loss to go back from, which has the same bits.

        Args:
            loss: its whole loss.
            mix, pred, it: give the loss of each sample, without a gradient.
        """
        slot, part = len(self._numbers) % len(self._norms), len(self._t)
        with torch.no_grad():
            self._each[slot, part] = mix.loss(pred.detach(), it, reduction="none")
            self._losses[slot, part] = loss.detach()
        self._t.append(it.t)
        # Times 1, or NaN where the loss is infinite or NaN: its gradient alone might be finite.
        return loss * (1 + 0 * loss.detach())

    def end_step(self, number: int, means: Tensor, norm: Tensor | float) -> None:
        """Note the end of optimizer step `number` with its (loss, alignment) and gradient norm."""
        slot = len(self._numbers) % len(self._norms)
        self._norms[slot] = norm
        good = torch.isfinite(self._norms[slot])
        self._sums += torch.where(good, torch.cat([torch.ones_like(means[:1]), means]), 0.0)
        t = torch.cat(self._t).float()
        bucket = (t * T_BUCKETS).long().clamp(0, T_BUCKETS - 1)
        inside = (bucket[:, None] == self._edges) & good
        each = self._each[slot].reshape(-1, 1).double()
        # Not index_add_, whose order of summation differs from run to run on a GPU.
        self._by_t += torch.stack([torch.where(inside, each, 0.0).sum(0), inside.double().sum(0)])
        self._numbers.append(number)
        self._t = []

    def drain(self) -> list[tuple[int, BadStep | None]]:
        """Every step since the last call, with its record if it was bad. Waits for the device."""
        count = min(len(self._numbers), len(self._norms))
        first = len(self._numbers) - count
        norms = self._norms.tolist()
        seen: list[tuple[int, BadStep | None]] = []
        for place in range(first, first + count):
            slot, number = place % len(self._norms), self._numbers[place]
            bad = None
            if not math.isfinite(norms[slot]):
                bad = BadStep(number, norms[slot], self._losses[slot].cpu(), self._each[slot].cpu())
            seen.append((number, bad))
        self._numbers = []
        self.last_norm = norms[slot] if seen else None
        return seen

    def means(self) -> tuple[Tensor, Tensor]:
        """((steps, loss, alignment), (2, T_BUCKETS)) summed over the ranks."""
        # Divided first: what is added over the ranks are the ranks' means.
        steps = self._sums[0]
        own = torch.cat([steps[None], self._sums[1:] / steps.clamp(min=1)])
        whole = torch.cat([own.double(), self._by_t.flatten()])
        dist.all_reduce(whole)
        whole = whole.cpu()
        return whole[:3] / dist.get_world_size(), whole[3:].view(2, T_BUCKETS)
