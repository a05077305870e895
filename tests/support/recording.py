"""A stand-in for CUDA graphs on the CPU: what is recorded runs again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mixflow_fast.training.capture import Work
from tests.support.recorded_graph import record


class RecorderStandIn:
    """As CUDA graphs do, it computes nothing while it records, and a replay writes into the memory
    of the recording: here NaN until the first one.

    A network's passes run again as they are in Python. An optimizer's step, which is what runs
    without gradients, is recorded by its operators: numbers of the host are those of the recording.

    Attributes:
        rehearsals, recordings, replays: how many there were, of passes and steps.
        steps: replays of steps among them.
        replaying: entered around each replay, as a count of launches is paused.
    """

    def __init__(self, *_: object) -> None:
        self.rehearsals = self.recordings = self.replays = self.steps = 0
        self.replaying = _nothing

    def rehearse(self, work: Work) -> None:
        self.rehearsals += 1
        work()

    def record(self, work: Work) -> tuple[list[Tensor], Callable[[], None]]:
        self.recordings += 1
        if not torch.is_grad_enabled():
            return [], self._step(record(work))
        kept = [torch.full_like(made.detach(), torch.nan) for made in work()]

        def replay() -> None:
            self.replays += 1
            with self.replaying(), torch.enable_grad():
                made = work()
                for place, value in zip(kept, made, strict=True):
                    place.data.copy_(value.detach())  # autograd does not see a replay write

        return kept, replay

    def _step(self, recorded: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replays += 1
            self.steps += 1
            with self.replaying():
                recorded()

        return replay


@contextmanager
def _nothing() -> Iterator[None]:
    yield
