"""Graceful shutdown on SIGINT, SIGTERM and SIGUSR1, at the same step on every rank.

The first signal (Slurm sends SIGUSR1 before its time limit, if asked) ends the run after the step
with a checkpoint. A second one ends the process at once, whatever it waits for, with 128 + the
number of the signal as exit code (130, 143, 138); the last checkpoint stays the one to resume from.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Slurm and some launchers send one request to the ranks and to the launcher, which forwards it:
# a signal this soon after the first is the same request.
SAME_REQUEST_S = 2.0


class StopSignal:
    """Signals as requests to stop, and one answer for all ranks at the same step.

    Args:
        ranks: number of processes. Several vote on the host, over gloo.
        timeout: how long a vote waits for a rank before it fails; None: 30 minutes.
    """

    def __init__(self, ranks: int, timeout: timedelta | None = None) -> None:
        self._signal: int | None = None
        self._same_request_s = SAME_REQUEST_S if ranks > 1 else 0.0
        self._votes = dist.new_group(backend="gloo", timeout=timeout) if ranks > 1 else None
        self._vote: tuple[dist.Work, Tensor] | None = None

    @property
    def signal(self) -> int | None:
        """The signal that this process got, or None."""
        return self._signal

    def requested(self) -> bool:
        """Whether to stop after this step. Every rank must call it once a step; no device sync."""
        requested = self._signal is not None
        if self._votes is None:
            return requested
        # Each step reads the vote of the step before, so that no step waits for the other ranks.
        before, value = self._vote, torch.tensor(float(requested))
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._votes, async_op=True)
        self._vote = work, value
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Installs the signal handlers, and puts the former ones back at the end."""
        if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
            yield
            return

        def handle(number: int, _frame: object) -> None:
            self._signal = self._signal or number

        # Python's handlers run between two bytecodes of the main thread, which may be far apart (a
        # write, a rank that does not answer). The pipe is written when the signal comes, so the
        # thread can end the process at the second one.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        thread = threading.Thread(target=self._end_at_the_second, args=(reader,), daemon=True)
        thread.start()
        old = {number: signal.signal(number, handle) for number in SIGNALS}
        old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_writer)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.write(writer, b"\0")
            thread.join()
            os.close(reader)
            os.close(writer)

    def _end_at_the_second(self, reader: int) -> None:
        first = None
        while number := os.read(reader, 1)[0]:
            now = time.monotonic()
            if number not in SIGNALS:
                continue
            if first is None:
                first = now
            elif now - first >= self._same_request_s:
                name = signal.Signals(number).name
                text = f"mixflow-fast: second signal ({name}): stopped at once, without saving\n"
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())
                os._exit(128 + number)
