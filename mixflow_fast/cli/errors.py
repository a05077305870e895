"""How a command ends: exceptions as one clear line on stderr and an exit code.

With MIXFLOW_DEBUG set, exceptions come as they are. A reader of the output that went away
(`| head -1`) ends the command without a word.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn, TextIO

from mixflow_fast.cli import interrupts

FAILED, REFUSED = 1, 2
# As shells report a process that SIGPIPE ended.
READER_GONE = 141
_FORMAT_WARNING = warnings.formatwarning


def exit_code(command: Callable[[], int]) -> int:
    """Run a command; what users can get wrong becomes a line, anything else a traceback."""
    return quiet_without_reader(lambda: _with_errors_as_lines(command))


def quiet_without_reader(command: Callable[[], int]) -> int:
    """Run a command; the exit code is READER_GONE where nobody reads its output any more."""
    _open_closed_streams()
    try:
        try:
            return command()
        finally:  # a reader that is gone is met here and not when the interpreter ends
            sys.stdout.flush()
    except BrokenPipeError:
        if not (gone := _streams_without_reader()):
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in gone:  # what is still in its buffer goes nowhere, too
            os.dup2(nowhere, stream.fileno())
        return READER_GONE


def _open_closed_streams() -> None:
    """Let stdout and stderr go nowhere where the caller closed them (`>&-`, some daemons).

    Else Python has None in their place, and the next file that is opened gets their number, and
    with it what libraries print.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _with_errors_as_lines(command: Callable[[], int]) -> int:
    try:
        return command()
    # ImportError: an extra that is not installed, whose message says how to get it.
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _streams_without_reader():
            raise
        return report(error, REFUSED)
    # Its text is what can be done next: most commands have nothing to go on from.
    except KeyboardInterrupt as interrupt:
        return interrupts.say(str(interrupt))


def warning_line(
    message: Warning | str, category: type[Warning], file: str, number: int, line: str | None = None
) -> str:
    """A warning as people read it, in place of `warnings.formatwarning`: without a line of code."""
    if category is not UserWarning or os.environ.get("MIXFLOW_DEBUG"):
        return _FORMAT_WARNING(message, category, file, number, line)
    return f"mixflow-fast: warning: {message}\n"


def report(error: Exception, code: int) -> int:
    """Print an error's line, which of several ranks one does, and return the exit code."""
    if os.environ.get("MIXFLOW_DEBUG"):
        raise error
    if _speaks(str(error)):
        print(f"mixflow-fast: error: {error}", file=sys.stderr)
    return code


def _speaks(text: str) -> bool:
    """Whether this process is to print an error."""
    if os.environ.get("WORLD_SIZE", "1") == "1":  # no launcher, and torch may not be loaded
        return True
    from mixflow_fast.distributed.one_voice import is_first_to_say

    try:
        return is_first_to_say(text)
    except ValueError:  # the launcher's variables themselves are wrong
        return True


def end_with_all_ranks(command: Callable[[], int]) -> int:
    """Run a command of several ranks; where it fails on GPUs, the process ends at once.

    The interpreter's end would wait for kernels that wait for the other ranks, and they for this.
    """
    from mixflow_fast.distributed.process_group import with_others_on_gpus

    try:
        code = _with_errors_as_lines(command)
    except BaseException:
        if not with_others_on_gpus():
            raise
        traceback.print_exc()
        code = FAILED
    if code and with_others_on_gpus():
        leave_at_once(code)
    return code


def leave_at_once(code: int) -> NoReturn:
    """End without the clean-up, which would wait for ranks that never answer."""
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _streams_without_reader() -> list[TextIO]:
    """Which of stdout and stderr are pipes that nobody reads any more."""
    return [stream for stream in (sys.stdout, sys.stderr) if _has_no_reader(stream)]


def _has_no_reader(stream: TextIO) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    except (OSError, ValueError):  # no file behind it
        return False
