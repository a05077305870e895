"""What the loop does between steps: when it is due, and what every duty has at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.metrics.throughput import Throughput
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.run_log import RunLog


class Duty(Protocol):
    """Something between steps: a row of metrics, a preview, a validation, a checkpoint."""

    def due(self, step: int) -> bool:
        """Whether to run after `step` optimizer steps; the same answer on every rank."""
        ...

    def run(self, step: int) -> None:
        """Do it; every rank must call it."""
        ...


@dataclass
class Timetable:
    """Every so many steps and at the end of the run, once at each.

    Attributes:
        every: steps; 0 = only at the end.
        total: optimizer steps of the run.
        last: the step at which it was done last; -1 makes step 0 due as well.
    """

    every: int
    total: int
    last: int

    def due(self, step: int) -> bool:
        """Whether it is time after `step` optimizer steps."""
        regular = self.every > 0 and step % self.every == 0
        return step != self.last and (regular or step == self.total)

    def done(self, step: int) -> None:
        """It is done for this step."""
        self.last = step


@dataclass(frozen=True)
class RunContext:
    """What every duty of a run has at hand.

    Attributes:
        out: run folder.
        engine: has the weights.
        host_group: exchange between the ranks.
        throughput: is paused by what is no training.
        log: rows, and lines for people.
    """

    out: Path
    engine: Engine
    host_group: HostGroup
    throughput: Throughput
    log: RunLog
