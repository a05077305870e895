"""Losses and norms of the last steps, kept on the device until they are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast.distributed import process_group
from mixflow_fast.objective.mixflow import Interpolation

# Equal parts of [0, 1], of the label time t that the network is told, in its own clock.
T_BUCKETS = 8
# Steps that are added up at once, which bounds the memory for it.
_CHUNK = 64


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
        samples: (M,) float32 losses of the samples, without the term and without a gradient.
        cond: the prompts' embeddings as the network saw them; empty for one that is told labels.
    """

    it: Interpolation
    y: Tensor
    pred: Tensor
    alignment: Tensor
    loss: Tensor
    samples: Tensor
    cond: Mapping[str, Tensor] = field(default_factory=dict)


# Called after a step with its number, what its micro-batches gave on this rank, and this rank's
# mean (loss, alignment). Whoever sets it keeps a step's tensors alive until it returns; in mode
# graph `pred` holds until the next forward pass.
OnStep = Callable[[int, list[StepOutput], Tensor], None]


class _Part(NamedTuple):
    """Of a micro-batch: loss and alignment, scalars; losses and times t of its M samples."""

    loss: Tensor
    alignment: Tensor
    samples: Tensor
    t: Tensor


class StepRecord:
    """Losses and gradient norms of the steps since they were drained, on the device.

    A step that waited for its loss would leave the device idle: so it is only noted, in one copy,
    and read and added up where metrics are written and before each save.

    Args:
        device: device of this rank.
        steps: how many may pass before `drain`; later ones take the places of the first.
        microsteps: micro-batches of a step on this rank.
        microbatch: samples in one.

    Attributes:
        last_norm: gradient norm of the last step that was drained; None without any.
    """

    def __init__(self, device: torch.device, steps: int, microsteps: int, microbatch: int) -> None:
        self._microsteps, self._samples = microsteps, microsteps * microbatch
        # Of a step: losses of the samples, their times t, losses of the micro-batches, mean loss
        # and mean alignment, gradient norm.
        self._rows = torch.zeros(steps, 2 * self._samples + microsteps + 3, device=device)
        self._parts: list[_Part] = []
        self._numbers: list[int] = []
        self._edges = torch.arange(T_BUCKETS, device=device)
        self._zero, self._one = torch.zeros((), device=device), torch.ones((), device=device)
        self.last_norm: float | None = None
        self.clear_means()

    def reset(self) -> None:
        """Begin anew: the steps in it are not the run's any more."""
        self._numbers, self._parts = [], []
        self.clear_means()

    def clear_means(self) -> None:
        """Start the means anew."""
        # Steps, loss, alignment; then by t: sums of the loss, counts.
        like = dict(dtype=torch.float64, device=self._rows.device)
        self._sums, self._by_t = torch.zeros(3, **like), torch.zeros(2, T_BUCKETS, **like)

    def micro_batch(self, made: StepOutput) -> Tensor:
        """Note a micro-batch; returns the loss to go back from, which has the same bits."""
        loss, alignment = made.loss.detach(), made.alignment.detach()
        # Kept without its graph, and without the prediction.
        self._parts.append(_Part(loss, alignment, made.samples, made.it.t))
        # Times 1, or NaN where the loss is infinite or NaN: its gradient alone might be finite.
        return made.loss * torch.addcmul(self._one, loss, self._zero)

    def end_step(self, number: int, norm: Tensor | float) -> Tensor:
        """Note the end of optimizer step `number` with its gradient norm.

        Returns:
            (2,) float32 on the device: means of loss and alignment over the micro-batches.
        """
        parts, self._parts = self._parts, []
        assert len(parts) == self._microsteps, (len(parts), self._microsteps)
        scalars = torch.stack([p.loss for p in parts] + [p.alignment for p in parts])
        means = scalars.view(2, -1).mean(1)
        if not isinstance(norm, Tensor):
            norm = torch.full((), norm, device=self._rows.device)
        torch.cat(
            [
                *(p.samples for p in parts),
                *(p.t for p in parts),
                scalars[: self._microsteps],
                means,
                norm.to(self._rows).reshape(1),
            ],
            out=self._rows[len(self._numbers) % len(self._rows)],
        )
        self._numbers.append(number)
        return means

    def drain(self) -> list[tuple[int, BadStep | None]]:
        """Every step since the last call, with its record if it was bad. Waits for the device."""
        count = min(len(self._numbers), len(self._rows))
        for rows in self._rows[:count].split(_CHUNK):
            self._add_up(rows)
        first = len(self._numbers) - count
        norms = self._rows[:, -1].tolist()
        seen: list[tuple[int, BadStep | None]] = []
        for place in range(first, first + count):
            slot, number = place % len(norms), self._numbers[place]
            bad = None if math.isfinite(norms[slot]) else self._bad_step(number, self._rows[slot])
            seen.append((number, bad))
        self._numbers = []
        self.last_norm = norms[slot] if seen else None
        return seen

    def _bad_step(self, number: int, row: Tensor) -> BadStep:
        row, n = row.cpu(), self._samples
        losses = row[2 * n : 2 * n + self._microsteps]
        return BadStep(number, float(row[-1]), losses, row[:n].view(self._microsteps, -1))

    def _add_up(self, rows: Tensor) -> None:
        """Add steps to the means; those that are bad count for nothing."""
        rows = rows.double()
        good, n = rows[:, -1].isfinite(), self._samples
        means = torch.where(good[:, None], rows[:, -3:-1], 0.0).sum(0)
        self._sums += torch.cat([good.double().sum(0, keepdim=True), means])
        each, t = rows[:, :n, None], rows[:, n : 2 * n, None]
        bucket = (t * T_BUCKETS).long().clamp(0, T_BUCKETS - 1)
        inside = (bucket == self._edges) & good[:, None, None]
        # Not index_add_, whose order of summation differs from run to run on a GPU.
        sums = torch.where(inside, each, 0.0).sum((0, 1))
        self._by_t += torch.stack([sums, inside.double().sum((0, 1))])

    def means(self) -> tuple[Tensor, Tensor]:
        """((steps, loss, alignment), (2, T_BUCKETS)) summed over the ranks."""
        # Divided first: what is added over the ranks are the ranks' means.
        steps = self._sums[0]
        own = torch.cat([steps[None], self._sums[1:] / steps.clamp(min=1)])
        whole = torch.cat([own, self._by_t.flatten()])
        ranks = process_group.world_size()
        if ranks > 1:
            dist.all_reduce(whole)
        whole = whole.cpu()
        return whole[:3] / ranks, whole[3:].view(2, T_BUCKETS)
