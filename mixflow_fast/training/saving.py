"""Resumable checkpoints: what goes into one, and the duty that writes them beside training."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mixflow_fast.checkpoints.run_folder import RunState
from mixflow_fast.checkpoints.writing import CheckpointWriter, SaveError, SaveInProgress
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.lost_ranks import is_peer_failure
from mixflow_fast.models import save_weights
from mixflow_fast.training.duty import RunContext, Timetable
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.nonfinite_guard import RollBack

# How long a run that ends with an error waits for the checkpoint that is being written.
RESCUE_S = 60.0
# How long a run waits for one without a word.
SAY_AFTER_S = 2.0


def begin_save(
    out: Path,
    engine: Engine,
    state: RunState,
    section: TrainConfig,
    host_group: HostGroup,
    weights: bool,
) -> SaveInProgress:
    """Copy a run's state to the host; a thread writes it while training goes on.

    Every rank must call it, and wait for one save before it begins the next.

    Args:
        out: run folder.
        engine: has the weights and the optimizer's state.
        state: the rest, for state.json.
        section: which checkpoints stay.
        host_group: for this thread alone.
        weights: the checkpoint gets a weights.pt, too.
    """
    writer = CheckpointWriter(out, state.step, host_group)
    if writer.ready():
        engine.save(writer)
        if weights:
            writes = host_group.rank == 0
            states = engine.full_states(stepped=state.step > 0, keep=writes)
            if writes:
                path, metadata = writer.folder / "weights.pt", state.metadata
                writer.later(lambda: save_weights(path, *states, metadata))
    keep = section.keep_last, section.keep_every
    return SaveInProgress(state.step, lambda: writer.commit(state, *keep))


class Checkpoints:
    """The duty that writes resumable checkpoints, one at a time, while training goes on.

    A checkpoint that cannot be written (a full disk) is a warning, and the next one is tried: the
    run loses nothing by going on. Only the last one of a run must succeed.

    Args:
        context: what every duty has at hand.
        timetable: when it is due.
        check: raises where the weights must not be saved.
        begin: copies the state and begins to write it.
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        check: Callable[[], None],
        begin: Callable[[], SaveInProgress],
    ) -> None:
        self._context, self._timetable = context, timetable
        self._check, self._begin = check, begin
        self._saving: SaveInProgress | None = None
        self._stood_still_s = 0.0

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end of the run."""
        if self._saving is not None and self._saving.done:
            self.settle()
        return self._timetable.due(step)

    def run(self, step: int) -> None:
        """Check the steps since the last look, and begin to save. Every rank must call it."""
        self._timetable.done(step)
        with self._context.throughput.paused():
            started = time.perf_counter()
            self._check()
            self.settle()
            self._saving = self._begin()
            self._stood_still_s = time.perf_counter() - started

    def settle(self) -> None:
        """Wait for what is being written; where it failed, warn."""
        try:
            self.finish()
        except SaveError as error:
            self._context.log.log(f"warning: {error}. Training goes on to the next checkpoint")

    def finish(self, limit_s: float | None = None) -> None:
        """Wait for what is being written.

        Args:
            limit_s: how long; None: as long as it takes.

        Raises:
            SaveError: it could not be written.
        """
        saving, self._saving = self._saving, None
        if saving is None:
            return
        path = saving.wait(SAY_AFTER_S if limit_s is None else limit_s)
        if path is None and limit_s is None:
            text = f"{self._context.out}: waiting for the checkpoint of step {saving.step}"
            self._context.log.log(f"{text}, which is being written")
            path = saving.wait()
        # Others need not see the new name yet: network file systems remember what was there.
        if path is not None and self._context.host_group.rank == 0:
            self._context.log.row(
                "checkpoint",
                saving.step,
                stood_still_s=self._stood_still_s,
                written_s=saving.seconds,
                bytes=sum(file.stat().st_size for file in path.iterdir()),
            )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Where training inside ends with an error, what is being written is finished first.

        The other ranks finish it too, in their threads, while they wait for this rank. Not so
        where the error is that another rank is gone.
        """
        try:
            yield
        except RollBack:  # goes on from the newest checkpoint, which this may become
            self.settle()
            raise
        except Exception as error:
            if not is_peer_failure(error):
                with contextlib.suppress(SaveError, RuntimeError):
                    self.finish(RESCUE_S)
            raise
