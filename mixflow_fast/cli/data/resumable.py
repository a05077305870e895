"""Long work that goes on where it has ended: what a stop says, and its exit code."""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # Slurm may send the second before its time limit


class _Stopped(BaseException):
    """A signal that asks the process to end, with its number."""


def resumable(work: Callable[[], int], out: Path, speaks: bool = True) -> int:
    """Run work on a set in shards; a stop loses the open shards and says how to go on.

    Args:
        work: returns the exit code.
        out: folder of the set.
        speaks: whether this process, of several, says that it was stopped.

    Returns:
        the exit code of `work`; 128 + its number after SIGTERM or SIGUSR1.

    Raises:
        KeyboardInterrupt: with what can be done next as its text.
        OSError: with the same after a full disk.
    """
    try:
        with _signals_raised():
            return work()
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(_next_step(out)) from interrupt
    except _Stopped as stopped:
        number = stopped.args[0]
        if speaks:
            name = signal.Signals(number).name
            print(f"mixflow-fast: stopped by {name}; {_next_step(out)}", file=sys.stderr)
        return 128 + number
    except OSError as error:
        if error.errno not in _FULL:
            raise
        words = f"{error.strerror}; once there is room, {_next_step(out)}"
        raise OSError(error.errno, words, error.filename) from error


def _next_step(out: Path) -> str:
    from mixflow_fast.data.set_files import how_far

    progress = how_far(out)
    far = f", {progress[0]} of {progress[1]} shards are done" if progress else ""
    return f"the same command goes on from here{far}"


@contextlib.contextmanager
def _signals_raised() -> Iterator[None]:
    """Signals that ask for the end are exceptions in the main thread inside."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:  # a second one ends the process as it would without this
            signal.signal(other, before[other])
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
