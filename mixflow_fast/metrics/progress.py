"""How far a long piece of work is: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from mixflow_fast.messages import duration

if TYPE_CHECKING:
    from tqdm import tqdm

# Between two plain lines, where nothing else is said.
EVERY_S = 20.0
# The time that is left follows the pace of about the last minute.
_PACE_MARKS, _MARK_EVERY_S = 60, 1.0


def _has_screen(stream: TextIO) -> bool:
    """Whether a bar can be seen: on a terminal of no size, as some launchers make, it cannot."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return True


class Progress:
    """The progress of one piece of work on stderr. Use it as a context manager, or call `close`.

    On a terminal it is a bar that goes away at the end. Elsewhere a line is printed every EVERY_S
    seconds, whether anything was counted or not: a silent process looks like one that hangs.

    Args:
        total: how many there are.
        label: what stands before the bar or line.
        unit: what is counted, in the plural.
        start: how many are done already.
        even: each takes about as long, so that the time that is left can be told.
        quiet: print nothing.
    """

    def __init__(
        self,
        total: int,
        label: str,
        unit: str,
        *,
        start: int = 0,
        even: bool = True,
        quiet: bool = False,
    ) -> None:
        self._total, self._label, self._unit, self._even = total, label, unit, even
        self._done, self._words = start, ""
        self._marks = deque([(time.monotonic(), start)], maxlen=_PACE_MARKS)
        self._quiet, self._stream = quiet, sys.stderr
        self._bar: tqdm | None = None
        self._closed, self._spoke = threading.Event(), threading.Event()
        if quiet:
            return
        if _has_screen(self._stream):
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=start,
                desc=self.line(),
                bar_format="{desc} {percentage:3.0f}%|{bar}|",
                file=self._stream,
                dynamic_ncols=True,
                leave=False,
            )
        else:
            threading.Thread(target=self._now_and_then, daemon=True).start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def line(self) -> str:
        """Such as "run: 12,800 of 1,000,000 images  loss 0.123  19 min left"."""
        parts = [f"{self._label}: {self._done:,} of {self._total:,} {self._unit}", self._words]
        (since, before), now = self._marks[0], time.monotonic()
        left = self._total - self._done
        if self._even and left > 0 and self._done > before and now > since:
            parts.append(f"{duration(left * (now - since) / (self._done - before))} left")
        return "  ".join(part for part in parts if part)

    def advance(self, count: int = 1) -> None:
        """So many more are done, or queued. Reads nothing from a device."""
        self._done += count
        now = time.monotonic()
        if now - self._marks[-1][0] >= _MARK_EVERY_S:
            self._marks.append((now, self._done))
        if self._bar is not None:
            self._bar.set_description_str(self.line(), refresh=False)
            self._bar.update(count)

    def show(self, words: str) -> None:
        """Have something stand behind the count from now on."""
        self._words = words
        if self._bar is not None:
            self._bar.set_description_str(self.line())

    def log(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
            self._spoke.set()

    def close(self) -> None:
        """Nothing more is printed."""
        self._closed.set()
        self._spoke.set()
        if self._bar is not None:
            self._bar.close()

    def _now_and_then(self) -> None:
        """A line where none was printed for a while."""
        with contextlib.suppress(OSError, ValueError):  # nobody reads it; the stream is closed
            while not self._closed.is_set():
                if not self._spoke.wait(EVERY_S):
                    print(self.line(), file=self._stream, flush=True)
                self._spoke.clear()
