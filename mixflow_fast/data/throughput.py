"""Examples a second, and CPU time of each, of loaders that take turns on one machine.

Turns are short and alternate, so that whatever else the machine does falls on all of them; what is
reported is the median over rounds, and ratios are of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol


class Labelled(Protocol):
    """A batch: its labels tell how many examples it has."""

    @property
    def y(self) -> Sized: ...


class Sized(Protocol):
    def __len__(self) -> int: ...


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contestant:
    """A loader that takes part.

    Attributes:
        batches: endless; it may prepare some ahead.
        before: how many are taken before a turn is timed: more than it prepares ahead, or the turn
            would be given what was prepared in the turns of others.
        cpu_s: seconds of CPU time so far of all that work for it.
        finish: waits until a batch that was given is there, for loaders that end on a GPU.
    """

    batches: Iterator[Labelled]
    before: int
    cpu_s: Callable[[], float] = time.process_time
    finish: Callable[[], object] = _nothing


@dataclass
class Rates:
    """What a loader did, one value a round.

    Attributes:
        per_s: examples a second of wall time.
        cpu_ms: milliseconds of CPU time an example, of all threads and processes.
    """

    per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def ratio(self, base: Rates) -> float:
        """Median over rounds of how many times the rate of `base` it has."""
        return median(a / b for a, b in zip(self.per_s, base.per_s, strict=True))


def race(
    contestants: Mapping[str, Contestant],
    seconds: float,
    rounds: int,
    advance: Callable[[int], object] = lambda turns: None,
) -> dict[str, Rates]:
    """Let loaders take turns.

    Args:
        contestants: by name.
        seconds: how long a turn is timed, and one batch at least.
        rounds: of turns; the order is turned by one in each.
        advance: called with the number of turns that were taken.
    """
    rates = {name: Rates() for name in contestants}
    names = list(contestants)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            per_s, cpu_ms = _turn(contestants[name], seconds)
            rates[name].per_s.append(per_s)
            rates[name].cpu_ms.append(cpu_ms)
            advance(1)
    return rates


def _turn(loader: Contestant, seconds: float) -> tuple[float, float]:
    """(examples a second, CPU milliseconds an example) of one turn."""
    for _ in range(loader.before):
        next(loader.batches)
    loader.finish()
    examples, cpu, start = 0, loader.cpu_s(), time.perf_counter()
    while True:
        examples += len(next(loader.batches).y)
        if time.perf_counter() - start >= seconds:
            break
    loader.finish()
    wall = time.perf_counter() - start
    return examples / wall, (loader.cpu_s() - cpu) * 1e3 / examples
