"""Loss and gradient of every step are looked at on the device; what to do where one is not finite.

A record of the steps since the last look stays on the device: the loss of every sample, of every
micro-batch, and the global gradient norm. It is read where metrics are written and before each
save, so no step waits. A loss that is not finite makes its gradient NaN, which the reduction over
the ranks carries to all of them: the norm alone decides, and all ranks decide alike.

    train.on_nonfinite: stop      the run ends with an error that names the samples
                        skip      the step leaves weights, moments and EMAs as they were
                        rollback  the run goes on from its newest checkpoint without that step

In each case `OUT/nonfinite/step_N` (`mixflow_fast.nonfinite`) says which samples it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixflow_fast.config.schema import Config
from mixflow_fast.data import Dataset
from mixflow_fast.distributed import process_group
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training import nonfinite_report
from mixflow_fast.training.engine import Engine
from mixflow_fast.training.step_record import BadStep, StepOutput, StepRecord

# Folders that one run writes; later steps are only counted.
MAX_DUMPS = 10


class TrainingDiverged(RuntimeError):
    """The loss or the gradient became infinite or not a number."""


class RollBack(Exception):
    """The run is to go on from its newest checkpoint, without the bad step."""


class NonFiniteGuard:
    """The rules of one run, and its `StepRecord`.

    Args:
        config: of the run.
        mix, source, engine: of the run, the engine started.
        forward: what a training step does with a micro-batch, up to its losses.
        agreement: of the ranks.
        device: of this rank.
        state: what `state` returned when the checkpoint was written; None for a new run.

    Attributes:
        record: what the steps note in.
        left_out: optimizer steps that the run passes over, after going back before them.
        say: prints a line.
    """

    def __init__(
        self,
        config: Config,
        mix: MixFlow,
        dataset: Dataset,
        engine: Engine,
        forward: Callable[[Any, Any], StepOutput],
        host_group: HostGroup,
        device: torch.device,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._config, self._mix, self._dataset = config, mix, dataset
        self._engine, self._forward, self._host_group = engine, forward, host_group
        self._device, self.mode = device, config.train.on_nonfinite
        state = state or {}
        self.left_out: list[int] = list(state.get("left_out", ()))
        self._skipped: int = state.get("skipped", 0)
        self._in_a_row: int = state.get("in_a_row", 0)
        self._rollbacks: int = state.get("rollbacks", 0)
        self.log: Callable[[str], None] = lambda _: None
        self._dumps = 0
        self._last_norm: float | None = None
        self.forget()

    def state(self) -> dict[str, Any]:
        """What a run that goes on from this checkpoint needs; for state.json."""
        return {
            "left_out": self.left_out,
            "skipped": self._skipped,
            "in_a_row": self._in_a_row,
            "rollbacks": self._rollbacks,
        }

    def forget(self) -> None:
        """Begin the record anew: the steps in it are not the run's any more."""
        micro = self._config.microbatch(process_group.world_size())
        share = self._config.train.global_batch_size // process_group.world_size()
        steps = min(self._config.train.log_every, self._config.steps)
        self.record = StepRecord(self._device, steps, share // micro, micro)

    def check(self) -> None:
        """Look at the steps since the last look. Every rank must call it; waits for the device.

        Raises:
            TrainingDiverged: a bad step, or more than the configuration allows.
            RollBack: as configured.
        """
        seen = self.record.look()
        if not seen:
            return
        self._last_norm = self.record.last_norm
        bad = [step for _, step in seen if step is not None]
        longest = 0
        for _, step in seen:
            self._in_a_row = 0 if step is None else self._in_a_row + 1
            longest = max(longest, self._in_a_row)
        if not bad:
            return
        c = self._config.train
        too_many = longest > c.max_skips
        text = ""
        if self.mode != "skip" or too_many or self._dumps < MAX_DUMPS:
            text = self._report(bad[0], seen[-1][0])
        if self.mode == "skip":
            self._skipped += len(bad)
            if too_many:
                raise TrainingDiverged(
                    f"{text} Steps skipped in a row: {longest}, more than train.max_skips = "
                    f"{c.max_skips}. {self._saved()} {_ADVICE}"
                )
            steps = ", ".join(str(step.step) for step in bad)
            self.log(f"{self._config.out}: skipped step {steps}. {text}".rstrip())
        elif self.mode == "rollback":
            if self._rollbacks >= c.max_rollbacks:
                raise TrainingDiverged(
                    f"{text} The run went back {self._rollbacks} times already, train.max_rollbacks"
                    f" = {c.max_rollbacks}. {self._saved()} {_ADVICE}"
                )
            self._rollbacks += 1
            self.left_out = [*self.left_out, bad[0].step]
            self.forget()
            raise RollBack(text)
        else:
            raise TrainingDiverged(f"{text} {self._saved()} {_ADVICE}")

    def row(self) -> dict[str, Any]:
        """Of the steps since the last call, over the ranks; every rank must call it. Checks first.

        Returns:
            "loss" and "alignment": means over the steps that were not skipped, None without any;
            "grad_norm": of the last step before clipping, None if it is not finite; "loss_by_t":
            mean loss (without alignment) of the samples by label t, in `T_BUCKETS` equal parts of
            [0, 1] in the network's clock, None where there was none; "count_by_t": their number;
            "skipped" steps and "rollbacks" of the run so far, where the configuration allows any.

        Raises:
            TrainingDiverged, RollBack: as `check`.
        """
        self.check()
        (steps, loss, alignment), (sums, counts) = (x.tolist() for x in self.record.means())
        self.record.clear_means()
        norm = self._last_norm
        row = {"loss": loss if steps else None}
        if self._config.objective.alignment_weight:
            row["alignment"] = alignment if steps else None
        row["grad_norm"] = norm if norm is not None and math.isfinite(norm) else None
        row["loss_by_t"] = [s / n if n else None for s, n in zip(sums, counts, strict=True)]
        row["count_by_t"] = [int(n) for n in counts]
        if self.mode != "stop" or self._skipped or self.left_out:
            row["skipped"] = self._skipped + len(self.left_out)
        if self.mode == "rollback" or self._rollbacks:
            row["rollbacks"] = self._rollbacks
        return row

    def _report(self, bad: BadStep, now: int) -> str:
        """One sentence or three on a bad step; the folder with the rest is written."""
        folder = None
        if self._dumps < MAX_DUMPS:
            self._dumps += 1
            folder = Path(self._config.out) / "nonfinite"
        return nonfinite_report.report(
            bad,
            now,
            folder,
            config=self._config,
            dataset=self._dataset,
            mix=self._mix,
            engine=self._engine,
            forward=self._forward,
            host_group=self._host_group,
            device=self._device,
            untouched=self.mode == "skip",
        )

    def _saved(self) -> str:
        out = self._config.out
        if self.mode == "skip":
            return f"Nothing of them is in the checkpoints in {out}."
        return f"Nothing of it was saved: the newest checkpoint in {out}, if any, is from before."


_ADVICE = (
    "Mend or remove samples whose data are not finite; lower optim.lr or set optim.grad_clip; or "
    "resume with train.on_nonfinite=skip"
)
