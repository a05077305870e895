"""The rank that the others wait for: every step is as slow as its slowest rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# How much slower than the others' median a rank must be, and what part of all time that must be.
SLOWER, SHARE = 1.2, 0.02


@dataclass(frozen=True)
class RankTime:
    """What one rank spent on itself in a window, without its waiting for other ranks.

    Attributes:
        host: name of its machine.
        waiting_s: seconds that its loop waited for data.
        working_s: seconds of its forward passes, on its device: they are the part of a step in
            which no rank waits for another (with ZeRO 3 they do, to gather weights).
        stalled_s: seconds that its device waited for copies of data.
    """

    host: str
    waiting_s: float
    working_s: float
    stalled_s: float = 0.0

    @property
    def data_s(self) -> float:
        """Seconds without data, on the host and on the device."""
        return self.waiting_s + self.stalled_s

    @property
    def own_s(self) -> float:
        """Seconds of all."""
        return self.data_s + self.working_s


@dataclass(frozen=True)
class Straggler:
    """A rank that is slower than the others.

    Attributes:
        rank: its number.
        ratio: its own seconds by the median of the others'.
        time: its seconds.
    """

    rank: int
    ratio: float
    time: RankTime

    def describe(self) -> str:
        """A sentence for people."""
        return (
            f"rank {self.rank} on {self.time.host} is slower than the others, which wait for it: "
            f"{self.ratio:.1f} x their median in its own part of a step ({self.time.data_s:.1f} "
            f"s waiting for data, {self.time.working_s:.1f} s in forward passes since the last row)"
        )


def find_straggler(times: Sequence[RankTime], window_s: float) -> Straggler | None:
    """The slowest rank, where it is far from the others.

    Args:
        times: of all ranks, in their order.
        window_s: seconds in which they were spent.
    """
    if len(times) < 2:
        return None
    rank = max(range(len(times)), key=lambda number: times[number].own_s)
    others = median(time.own_s for number, time in enumerate(times) if number != rank)
    own = times[rank].own_s
    if own <= SLOWER * others or own - others <= SHARE * window_s:
        return None
    return Straggler(rank, own / max(others, 1e-9), times[rank])


class StragglerWatch:
    """Says of each rank once that it is slow, when it was in two windows one after the other."""

    def __init__(self) -> None:
        self._before: int | None = None
        self._said: set[int] = set()

    def sentence(self, found: Straggler | None) -> str | None:
        """The sentence to say after a window, if there is one."""
        rank = None if found is None else found.rank
        again, self._before = rank == self._before, rank
        if found is None or not again or found.rank in self._said:
            return None
        self._said.add(found.rank)
        return found.describe()
