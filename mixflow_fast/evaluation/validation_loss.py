"""Losses of a network at fixed times, on fixed examples with fixed noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.data import Batch, Dataset
from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.flow.clock import DATA_AT_1
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.interpolate import Moments, sample_moments
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.models.weights.source_record import predictor_of
from mixflow_fast.objective.mixflow import MixFlow

Condition = Tensor | Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Condition], Tensor | tuple[Tensor, ...]]
Inputs = Callable[[Batch], Tensor | Moments]
Conditions = Callable[[Batch], Condition]
Part = tuple[int, int, float]  # chunk, point, sum of its losses
# Of noise, posterior samples and labels: the same for every run, so that runs can be compared.
SEED = 0
# Of a mixed source's draws, which use the streams of training: no run's `train.seed` is as large.
_SOURCE_SEED = 2**64 - 1
TIMES = 16
GRID = 8


def bin_centers(count: int) -> list[float]:
    """Centers of `count` equal parts of [0, 1]."""
    return [(i + 0.5) / count for i in range(count)]


@dataclass(frozen=True)
class Losses:
    """Losses of one set of weights, means over the examples.

    Attributes:
        loss: mean over the times.
        loss_by_t: TIMES losses at `bin_centers(TIMES)`.
        grid: rows m, columns t at `bin_centers(GRID)`; None where m > t is not trained.
    """

    loss: float
    loss_by_t: list[float]
    grid: list[list[float | None]]


@dataclass(frozen=True)
class ValidationData:
    """Examples to validate on.

    Attributes:
        dataset: the examples, without flips.
        description: what they are: "held-out examples" or "training examples".
    """

    dataset: Dataset
    description: str


class _Chunk(NamedTuple):
    """Some of the examples on the device."""

    x1: Tensor
    y: Tensor
    cond: Condition
    positions: Tensor
    noise: Tensor


def _of_one_shape(index: Tensor, positions: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Positions whose examples have one shape, bucket by bucket."""
    ends = torch.cumsum(torch.tensor(sizes), 0)
    bucket = torch.searchsorted(ends, index, right=True)
    return [positions[bucket == number] for number in bucket.unique().tolist()]


class ValidationLoss:
    """Losses of a network at fixed times, on fixed examples with fixed noise.

    With times of the engine's clock (0 = noise, 1 = data), means over K examples that are spread
    evenly over the data:

        at TIMES labels t:              E | net(x_t, t) - u(x_t, t) |^2       no slowing, m = t
        at a grid of labels t, m <= t:  E | net(x_m, t) - u*(x_m, m) |^2      what MixFlow trains

    The loss is the objective's own; labels are never dropped. With interval "full" the grid has
    m > t too. With a mixed source the noise ends are those that the source beside the network draws
    at a seed of its own, and the loss has its KL, as in training.

    Args:
        data: the examples.
        mix: the objective.
        device: where the network is.
        inputs: what the network trains on, from a batch on the device.
        conditions: what it is told beside x and t, from such a batch.
        examples: K, at most.
        batch_size: examples in one forward pass, at most.
        rank, ranks: the ranks share the work. The numbers do not depend on their number but for
            rounding.
        all_gather: exchanges values between the ranks, as `HostGroup.all_gather`.

    Attributes:
        examples: K.
        description: what they are, in words.
    """

    def __init__(
        self,
        data: ValidationData,
        mix: MixFlow,
        device: torch.device,
        inputs: Inputs = lambda batch: batch.x,
        conditions: Conditions = lambda batch: batch.y,
        *,
        examples: int,
        batch_size: int,
        rank: int = 0,
        ranks: int = 1,
        all_gather: Callable[[list[Part]], list[list[Part]]] = lambda mine: [mine],
    ) -> None:
        self._mix, self._device, self._rank, self._ranks = mix, device, rank, ranks
        self._inputs, self._conditions = inputs, conditions
        self._all_gather, self.description = all_gather, data.description
        dataset = data.dataset
        self.examples = min(examples, len(dataset))
        index = torch.arange(self.examples) * len(dataset) // self.examples
        size = min(self.examples, batch_size)
        positions = torch.arange(self.examples)
        places = _of_one_shape(index, positions, bucket_sizes(dataset))
        self._chunks = [
            dataset.get(index[part], part, SEED) for place in places for part in place.split(size)
        ]
        self._held: tuple[int, _Chunk] | None = None
        full = mix.schedule.interval == "full"
        self._grid = [
            (row, column) for row in range(GRID) for column in range(GRID) if full or row <= column
        ]
        g = bin_centers(GRID)
        self._points = [(t, t) for t in bin_centers(TIMES)]
        self._points += [(g[column], g[row]) for row, column in self._grid]

    def __call__(self, net: Network) -> Losses:
        """The losses of one set of weights; every rank must call it."""
        means = self.at(net, self._points)
        grid: list[list[float | None]] = [[None] * GRID for _ in range(GRID)]
        for (row, column), value in zip(self._grid, means[TIMES:], strict=True):
            grid[row][column] = value
        at_times = means[:TIMES]
        return Losses(sum(at_times) / TIMES, at_times, grid)

    @torch.no_grad()
    def at(self, net: Network, points: Sequence[tuple[float, float]]) -> list[float]:
        """Mean losses at pairs (label t, input time m) of the engine's clock.

        Every rank must call it.
        """
        tasks = [(c, p) for c in range(len(self._chunks)) for p in range(len(points))]
        # Every n-th task: the ranks' shares differ by one forward pass at most.
        mine = [
            (c, p, self._losses(net, c, points[p])) for c, p in tasks[self._rank :: self._ranks]
        ]
        # One read of the device for all of them.
        sums = torch.stack([losses for *_, losses in mine]).tolist() if mine else []
        parts = [(c, p, total) for (c, p, _), total in zip(mine, sums, strict=True)]
        found = {(c, p): total for part in self._all_gather(parts) for c, p, total in part}
        self._held = None
        return [
            sum(found[c, p] for c in range(len(self._chunks))) / self.examples
            for p in range(len(points))
        ]

    def _losses(self, net: Network, chunk: int, point: tuple[float, float]) -> Tensor:
        """Sum of a chunk's losses at one pair of times, float64 on the device."""
        held = self._on_device(chunk)
        t, m = (
            torch.full((len(held.y),), value, device=self._device)
            for value in (self._own(time) for time in point)
        )
        mix, noise = self._mix, held.noise
        if mix.source is not None:
            mix, noise = self._with_source_of(net), None
        it = mix.prepare(held.x1, ids=held.positions, x0=noise, t=t, slowed_t=m, y=held.y)
        if it.source is not None:
            # Of the run's source: that of a copy without gradients looks frozen.
            weight = self._mix.source.kl_weight(held.x1[0].numel())
            it = replace(it, source=replace(it.source, kl_weight=weight))
        output = net(it.x, it.t, held.cond)
        prediction = output[0] if isinstance(output, tuple) else output
        return mix.loss(prediction, it, reduction="none").double().sum()

    def _with_source_of(self, net: Network) -> MixFlow:
        """The objective with the source that a network carries, its draws the same in all runs."""
        mix = copy.copy(self._mix)
        mix.source, mix.seed = copy.copy(mix.source), _SOURCE_SEED
        mix.input_perturbation = 0.0  # as where the noise is given
        mix.source.predictor = predictor_of(net)
        return mix

    def _on_device(self, chunk: int) -> _Chunk:
        """A chunk and its noise; kept until another chunk is asked for."""
        if self._held is None or self._held[0] != chunk:
            batch = self._chunks[chunk].to(self._device)
            x1 = self._inputs(batch)
            if isinstance(x1, Moments):
                # Drawn here: the objective would draw another sample with every run's seed.
                x1 = sample_moments(x1, SEED, batch.positions, self._mix.impl)
            x1 = x1.float()  # the network casts it, once
            # A stream of its own: the same noise in runs of any seed.
            noise = philox.normal(SEED, Stream.VALIDATION_NOISE, batch.positions, x1[0].numel())
            self._held = (
                chunk,
                _Chunk(x1, batch.y, self._conditions(batch), batch.positions, noise.view(x1.shape)),
            )
        return self._held[1]

    def _own(self, time: float) -> float:
        return time if self._mix.clock == DATA_AT_1 else 1.0 - time
