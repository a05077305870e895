"""Steps of a sampler as CUDA graphs: network, guidance, update and noise in one launch.

Everything that a step reads lies in buffers that keep their places: the state, labels and ids, a
table with a row of times, numbers and the guidance scale for each step, the keys of the noise, and
the number of the step, which the step itself counts up. So a replay needs nothing from the host,
and the host waits for nothing.

Steps of one kind (formula, and which of their evaluations are guided) share a graph. With a
guidance interval there are graphs of 2B and of B rows. A kind that occurs once in a plan is not
captured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.sampling.solvers import Formula, PlannedVelocity, Step, checked_velocity

# Runs what was captured once more.
Replay = Callable[[], None]
# (a step on fixed buffers) -> its replay. The step is recorded and not run.
Capture = Callable[[Callable[[], None]], Replay]
# Of a replayed step's update against the same step eagerly: both run the same kernels, and a number
# that was frozen at the capture is off by more.
_LIMIT = 1e-3


class CudaCapture:
    """Captures on the current GPU; all graphs share their memory, since they run one by one."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        # Other threads (of a decoder, of a loader) may go on using the device.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            step()
        return graph.replay


@dataclass(frozen=True)
class _Kind:
    """What steps have in common that can be replayed as one graph."""

    formula: Formula
    guided: tuple[bool, ...]
    numbers: int


@dataclass
class _Graph:
    """A captured kind; it is held against the eager step when it is replayed for the first time."""

    replay: Replay
    checked: bool = False


class GraphLoop:
    """A plan on buffers for batches of one size.

    The first step of a kind runs eagerly (kernels are compiled and loaded by it) and is captured
    then. The next one is replayed and run eagerly too, and the two are compared.

    Args:
        plan: the steps.
        memory: tensors that the plan's formulas remember beside the state.
        velocity_of: labels (B,), or None -> the velocity; called once, with the labels' buffer.
        shape: (B, C, H, W).
        labelled: whether there are labels.
        scale: of the guidance.
        device: of all buffers.
        capture: makes a replay of a step; by default a CUDA graph.
    """

    def __init__(
        self,
        plan: Sequence[Step],
        memory: int,
        velocity_of: Callable[[Tensor | None], PlannedVelocity],
        shape: tuple[int, ...],
        labelled: bool,
        scale: float,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._device = device
        with self._on_device():
            self._capture = CudaCapture() if capture is None else capture
        self._shape = shape
        self._states = tuple(torch.zeros(shape, device=device) for _ in range(1 + memory))
        self._ids = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self._labels = torch.zeros_like(self._ids) if labelled else None
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._keys = torch.zeros(len(plan), dtype=torch.int64, device=device)
        self._velocity = velocity_of(self._labels)
        self._most = max(len(step.times) for step in plan)
        self._table = self._table_of(plan, scale).to(device)
        self._kinds = [self._kind(step) for step in plan]
        self._occurrences = Counter(self._kinds)
        self._graphs: dict[_Kind, _Graph] = {}

    @torch.inference_mode()
    def run(self, x: Tensor, ids: Tensor, labels: Tensor | None, keys: Tensor | None) -> Tensor:
        """The state at the plan's end.

        Args:
            x: (B, C, H, W) float32, the state at its start.
            ids: (B,) int64, of the noise.
            labels: (B,) int64, or None.
            keys: (N,) int64 of the noise of each step, on any device; None for a method without.
        """
        for buffer in self._states:
            buffer.zero_()
        self._states[0].copy_(x)
        self._ids.copy_(ids)
        if self._labels is not None:
            self._labels.copy_(labels)
        if keys is not None:
            self._keys.copy_(keys)
        self._index.zero_()
        with self._on_device():
            for kind in self._kinds:
                self._advance(kind)
        return self._states[0].clone()

    def _on_device(self) -> AbstractContextManager[None]:
        """Streams, captures and pools are those of the current GPU."""
        on_gpu = self._device.type == "cuda"
        return torch.cuda.device(self._device) if on_gpu else nullcontext()

    @property
    def captured(self) -> int:
        """Graphs so far."""
        return len(self._graphs)

    def _advance(self, kind: _Kind) -> None:
        graph = self._graphs.get(kind)
        if graph is None:
            self._step(kind)
            if self._occurrences[kind] > 1:
                self._graphs[kind] = _Graph(self._capture(lambda: self._step(kind)))
        elif graph.checked:
            graph.replay()
        else:
            self._check(graph, kind)

    def _check(self, graph: _Graph, kind: _Kind) -> None:
        """Replay a step and run it eagerly from the same state, whose result is kept."""
        kept = (*self._states, self._index)
        before = [buffer.clone() for buffer in kept]
        graph.replay()
        replayed = self._states[0].clone()
        for buffer, value in zip(kept, before, strict=True):
            buffer.copy_(value)
        self._step(kind)
        update = (self._states[0] - before[0]).double().norm()
        error = float((replayed - self._states[0]).double().norm() / update.clamp(min=1e-30))
        if not error <= _LIMIT:
            raise RuntimeError(
                f"a step replayed from its CUDA graph differs from the same step by {error:.3g} of "
                f"what the step changes (at most {_LIMIT:g}): the graph reads something that does "
                'not lie in fixed memory; use mode="compile"'
            )
        graph.checked = True

    def _kind(self, step: Step) -> _Kind:
        guided = tuple(self._velocity.guided_at(t, step.times[0]) for t in step.times)
        return _Kind(step.formula, guided, len(step.numbers))

    def _table_of(self, plan: Sequence[Step], scale: float) -> Tensor:
        """(N, 1 + times + numbers) float32: scale, times and numbers of each step, filled up."""
        width = 1 + self._most + max(len(step.numbers) for step in plan)
        table = torch.zeros(len(plan), width, dtype=torch.float64)
        for row, step in zip(table, plan, strict=True):
            row[0] = scale
            row[1 : 1 + len(step.times)] = torch.tensor(step.times, dtype=torch.float64)
            first = 1 + self._most
            row[first : first + len(step.numbers)] = torch.tensor(step.numbers, dtype=torch.float64)
        return table.float()

    def _step(self, kind: _Kind) -> None:
        """The step whose number is in memory, from and into the buffers of the state."""
        scale, *row = self._table.index_select(0, self._index)[0].unbind()
        times, numbers = row[: self._most], row[self._most :][: kind.numbers]

        def at(x: Tensor, number: int) -> Tensor:
            t = times[number].expand(len(x)).contiguous()
            return checked_velocity(self._velocity.planned(x, t, kind.guided[number], scale), x)

        def noise() -> Tensor:
            key = self._keys.index_select(0, self._index)[0]
            numel = math.prod(self._shape[1:])
            return normal(key, Stream.SAMPLE_SDE, self._ids, numel).view(self._shape)

        moved = kind.formula(at, self._states, numbers, noise)
        for buffer, value in zip(self._states, moved, strict=True):
            buffer.copy_(value)
        self._index.add_(1)
