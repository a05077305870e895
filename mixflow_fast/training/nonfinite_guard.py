"""Stop, skip or roll back where the loss or the gradient of a step is not finite.

Every step is noted on the device (`step_record.py`) and read where metrics are written and before
each save, so no step waits. A loss that is not finite makes its gradient NaN, which the reduction
over the ranks carries to all of them: the norm alone decides, and all ranks decide alike.

    train.on_nonfinite: stop      the run ends with an error that names the samples
                        skip      the step leaves weights, moments and EMAs as they were
                        rollback  the run goes on from its newest checkpoint without that step

In each case `OUT/nonfinite/step_N` (`nonfinite_report.py`) says which samples it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.training.nonfinite_report import Examiner, Finding
from mixflow_fast.training.step_record import BadStep, StepRecord

# Folders that one run writes; later steps are only counted.
MAX_DUMPS = 10


class TrainingDiverged(RuntimeError):
    """The loss or the gradient became infinite or not a number."""


class RollBack(Exception):
    """The run is to go on from its newest checkpoint, without the bad step."""


@dataclass
class GuardState:
    """What a run that goes on from a checkpoint has to know of its bad steps.

    Attributes:
        left_out: optimizer steps that the run passes over, after going back before them.
        skipped: steps that were skipped so far.
        in_a_row: of these, the last ones without a good step between them.
        rollbacks: how often the run went back.
    """

    left_out: list[int] = field(default_factory=list)
    skipped: int = 0
    in_a_row: int = 0
    rollbacks: int = 0

    @classmethod
    def from_record(cls, record: Mapping[str, object]) -> GuardState:
        """What a checkpoint holds; what a later release added to it is passed over."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in record.items() if name in known})


class NonFiniteGuard:
    """Stops, skips or goes back where a step was not finite.

    Args:
        section: of the configuration: what to do, and how often.
        out: run folder.
        record: what the steps note in.
        examiner: finds the samples behind a bad step.
        aligned: whether the loss has REPA's term.
        state: what `state` was when the checkpoint was written; None for a new run.

    Attributes:
        record: as given.
        state: for state.json.
        log: prints a line.
        settle: waits for the checkpoint that is being written, which may be the one to read.
    """

    def __init__(
        self,
        section: TrainConfig,
        out: Path,
        record: StepRecord,
        examiner: Examiner,
        aligned: bool,
        state: GuardState | None = None,
    ) -> None:
        self._section, self._out, self.record = section, out, record
        self._examiner, self._aligned = examiner, aligned
        self.state = state or GuardState()
        self.log: Callable[[str], None] = lambda _: None
        self.settle: Callable[[], None] = lambda: None
        self._dumps = 0
        self._last_norm: float | None = None

    def check(self) -> None:
        """Read the steps since the last call. Every rank must call it; waits for the device.

        Raises:
            TrainingDiverged: a bad step, or more than the configuration allows.
            RollBack: as configured.
        """
        steps = self.record.drain()
        if not steps:
            return
        self._last_norm = self.record.last_norm
        bad = [step for _, step in steps if step is not None]
        longest = 0
        for _, step in steps:
            self.state.in_a_row = 0 if step is None else self.state.in_a_row + 1
            longest = max(longest, self.state.in_a_row)
        if not bad:
            return
        now = steps[-1][0]
        if self._section.on_nonfinite == "skip":
            self._skip(bad, now, longest)
        elif self._section.on_nonfinite == "rollback":
            self._roll_back(bad[0], now)
        else:
            found = self._examine(bad[0], now)
            raise TrainingDiverged(f"{found.text} {self._saved()} {found.advice}")

    def _skip(self, bad: list[BadStep], now: int, longest: int) -> None:
        """The optimizer left the steps out already: count them, or give up."""
        self.state.skipped += len(bad)
        most = self._section.max_skips
        found = Finding("", "")
        if longest > most or self._dumps < MAX_DUMPS:
            found = self._examine(bad[0], now)
        if longest > most:
            raise TrainingDiverged(
                f"{found.text} Steps skipped in a row: {longest}, more than train.max_skips = "
                f"{most}. {self._saved()} {found.advice}"
            )
        steps = ", ".join(str(step.step) for step in bad)
        self.log(f"{self._out}: skipped step {steps}. {found.text}".rstrip())

    def _roll_back(self, bad: BadStep, now: int) -> None:
        found, times = self._examine(bad, now), self.state.rollbacks
        if times >= self._section.max_rollbacks:
            raise TrainingDiverged(
                f"{found.text} The run went back {times} times already, train.max_rollbacks"
                f" = {self._section.max_rollbacks}. {self._saved()} {found.advice}"
            )
        self.state.rollbacks += 1
        self.state.left_out = [*self.state.left_out, bad.step]
        self.record.reset()
        raise RollBack(found.text)

    def row(self) -> dict[str, object]:
        """Losses of the steps since the last call, over the ranks; every rank must call it.

        Returns:
            "loss" and "alignment": means over the steps that were not skipped, None without any;
            "grad_norm": of the last step before clipping, None if it is not finite; "loss_by_t":
            mean loss (without alignment) of the samples by label t, in `T_BUCKETS` equal parts of
            [0, 1] in the network's clock, None where there was none; "count_by_t": their number;
            "skipped" steps and "rollbacks" of the run so far, where the configuration allows any.

        Raises:
            TrainingDiverged, RollBack: as `check`, which comes first.
        """
        self.check()
        (steps, loss, alignment), (sums, counts) = (x.tolist() for x in self.record.means())
        self.record.clear_means()
        norm, mode, state = self._last_norm, self._section.on_nonfinite, self.state
        row: dict[str, object] = {"loss": loss if steps else None}
        if self._aligned:
            row["alignment"] = alignment if steps else None
        row["grad_norm"] = norm if norm is not None and math.isfinite(norm) else None
        row["loss_by_t"] = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        row["count_by_t"] = [int(n) for n in counts]
        if mode != "stop" or state.skipped or state.left_out:
            row["skipped"] = state.skipped + len(state.left_out)
        if mode == "rollback" or state.rollbacks:
            row["rollbacks"] = state.rollbacks
        return row

    def _examine(self, bad: BadStep, now: int) -> Finding:
        """What was found of a bad step; the folder with the rest is written."""
        self.settle()
        folder = None
        if self._dumps < MAX_DUMPS:
            self._dumps += 1
            folder = self._out / "nonfinite"
        return self._examiner.report(bad, now, folder)

    def _saved(self) -> str:
        if self._section.on_nonfinite == "skip":
            return f"Nothing of them is in the checkpoints in {self._out}."
        return (
            f"Nothing of it was saved: the newest checkpoint in {self._out}, if any, is from "
            "before."
        )
