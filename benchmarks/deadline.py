"""A wall-clock budget that is checked before work starts, so that no cell is cut in the middle."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable


class Deadline:
    """Seconds that are left, and what was left out for want of them.

    Args:
        seconds: the budget from now on; None is no limit.
        clock: seconds, monotonic.

    Attributes:
        left_out: names of the cells that did not fit, in order.
    """

    def __init__(
        self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"deadline must be a number of seconds > 0, got {seconds!r}")
        self._clock = clock
        self._start = clock()
        self._seconds = math.inf if seconds is None else seconds
        self.left_out: list[str] = []

    def spent(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def left(self) -> float:
        """Seconds until the deadline, inf without one, negative after it."""
        return self._seconds - self.spent()

    def fits(self, name: str, expected: float) -> bool:
        """Whether `expected` seconds are left; if not, `name` is noted as left out."""
        if expected <= self.left():
            return True
        self.left_out.append(name)
        return False

    def report(self) -> str:
        """One line for each cell left out, or an empty string."""
        if not self.left_out:
            return ""
        lines = [f"left out, {self._seconds:g} s were not enough:"]
        return "\n  ".join([*lines, *self.left_out])


class Expectation:
    """How long the next cell may take: a margin over the longest of the last few; first a guess.

    Args:
        first: the guess, in seconds.
        margin: times the longest.
        last: how many are the last few.
        cap: never expect more. What is left out teaches nothing, so one slow cell (the first of
            its kind compiles) would otherwise keep out all that follow.
    """

    def __init__(
        self, first: float, margin: float = 1.25, last: int = 4, cap: float = math.inf
    ) -> None:
        self._seen: deque[float] = deque(maxlen=last)
        self._first = first
        self._margin = margin
        self._cap = cap

    def seconds(self) -> float:
        return min(self._cap, self._margin * max(self._seen)) if self._seen else self._first

    def saw(self, seconds: float) -> None:
        self._seen.append(seconds)
