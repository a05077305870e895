"""Ctrl-C from the first moment of the process to its last: one line and exit code 130.

Python's own KeyboardInterrupt is not enough for that. Libraries swallow it while they are imported,
it becomes "Exception ignored in ..." inside of a destructor, and it does not come at all while the
main thread is in C code that does not return, such as a wait for other ranks. Training has signals
of its own (`distributed.stop_signal`), which take the place of these while it runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
_LINE = "mixflow-fast: interrupted"
# How long C code may keep the main thread from its KeyboardInterrupt before the process is ended.
PATIENCE_S = 2.0
# Whether a KeyboardInterrupt is on its way up, and whether the line was printed.
_raised = _said = False
# Main thread and watcher may leave at the same time, and a handler in the middle of either.
_leaving = threading.RLock()


def take_over() -> None:
    """Handle SIGINT for the rest of the process, unless its caller has it handled or ignored.

    The first signal raises KeyboardInterrupt where that will be seen, a second one ends the process
    at once, and so does the first one where Python would lose it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    # The pipe is written when the signal comes, even while the main thread is in C code.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    sys.unraisablehook = _unraisable
    signal.signal(signal.SIGINT, _handle)


def say(more: str = "") -> int:
    """Print the line of an interrupted command and return its exit code.

    Args:
        more: what the user can do next, where there is something.
    """
    global _raised, _said
    _raised = _said = True
    if _speaks():
        print(f"{_LINE}; {more}" if more else _LINE, file=sys.stderr, flush=True)
    return INTERRUPTED


def _speaks() -> bool:
    """Of several ranks, which all get the signal, the first prints."""
    return os.environ.get("RANK", "0") == "0"


def _handle(number: int, frame: FrameType | None) -> None:
    global _raised
    if _raised or _is_importing(frame):
        _leave()
    _raised = True
    raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the main thread is inside of an import, where libraries catch what they please."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _unraisable(unraisable: sys.UnraisableHookArgs) -> None:
    """A KeyboardInterrupt in a destructor or at the exit: it was to end the process."""
    if unraisable.exc_type is KeyboardInterrupt:
        _leave()
    sys.__unraisablehook__(unraisable)


def _watch(reader: int) -> None:
    """Ends the process at the second signal, or where the first one does not get through."""
    _came(reader, None)
    if not _came(reader, PATIENCE_S) and _raised:
        _came(reader, None)
    _leave()


def _came(reader: int, wait_s: float | None) -> bool:
    """Whether SIGINT came in time; other signals write their numbers into the pipe, too."""
    while select.select([reader], [], [], wait_s)[0]:
        if os.read(reader, 1)[0] == signal.SIGINT:
            return True
    return False


def _leave() -> NoReturn:
    """End at once, with the line if it was not printed."""
    global _said
    with _leaving:
        if not _said and _speaks():
            with contextlib.suppress(OSError):
                # Not by `print`: the main thread may be in the middle of one.
                os.write(2, f"{_LINE}\n".encode())
        _said = True
        os._exit(INTERRUPTED)
