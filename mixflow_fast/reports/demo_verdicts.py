"""Which arm is lower than which at each number of steps: where MixFlow wins, where it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixflow_fast.reports.demo_result import METRICS, DemoResult, Metric, values_of

# (arm, the one that it is held against).
_PAIRS = (
    ("mixflow", "control"),
    ("control_remedy", "control"),
    ("mixflow", "control_remedy"),
    ("mixflow_remedy", "mixflow"),
    ("mixflow_remedy", "control_remedy"),
    ("mix", "rf"),
    ("fc", "rf"),
    ("fc_tuned", "rf"),
    ("mix", "fc"),
    ("mix", "fc_tuned"),
    ("mix_own", "mix"),
    ("mix_own", "rf"),
    ("mix_own", "fc_own"),
    ("mix_own", "fc_tuned_own"),
    ("mix_slowed", "mix_plain"),
    ("mix_plain", "rf_plain"),
    ("mix_slowed", "rf_slowed"),
    ("mix_slowed_own", "mix_plain_own"),
    ("mix_slowed_own", "rf_slowed"),
    ("rf_slowed", "rf_plain"),
)


@dataclass(frozen=True)
class Verdict:
    """One arm held against another.

    Attributes:
        text: of whom.
        cells: by number of steps, "lower" or "higher" by the means, and how many seeds agree.
    """

    text: str
    cells: Sequence[str]


def verdicts(result: DemoResult, metric: Metric) -> list[Verdict]:
    """Every pair of the main arms that is there.

    Where an arm has no remedy at some number of steps, it is not held against the arm whose samples
    it repeats there.
    """
    found = []
    for first, second in _PAIRS:
        if {first, second} <= result["arms"].keys():
            one, other = result["arms"][first], result["arms"][second]
            cells = [
                _cell(values_of(one, metric, steps), values_of(other, metric, steps))
                for steps in result["steps"]
            ]
            found.append(Verdict(f"{one['label']}, against {other['label']}", cells))
    return found


def _cell(mine: Sequence[float], theirs: Sequence[float]) -> str:
    if not mine or len(mine) != len(theirs) or mine == theirs:
        return "–"
    below = sum(mine) < sum(theirs)
    agree = sum((a < b) == below for a, b in zip(mine, theirs, strict=True))
    of = f", {agree} of {len(mine)}" if len(mine) > 1 else ""
    return f"{'lower' if below else 'higher'}{of}"


def short_name(metric: Metric) -> str:
    """The metric's name without what is common to all."""
    return METRICS[metric].removeprefix("Fréchet distance, ").partition(",")[0]
