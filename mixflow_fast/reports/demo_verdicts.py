"""What a demo's numbers say, in sentences that are made of them: who is lower, who is not."""

from __future__ import annotations

from collections.abc import Sequence

from mixflow_fast.reports.demo_result import METRICS, DemoResult, Metric, values_of

# (arm, the one that it is held against).
_PAIRS = (
    ("mixflow", "control"),
    ("control_remedy", "control"),
    ("mixflow", "control_remedy"),
    ("mixflow_remedy", "mixflow"),
    ("mixflow_remedy", "control_remedy"),
)


def verdicts(result: DemoResult, metric: Metric) -> list[str]:
    """One sentence for each pair of arms that is there: where the first is lower, and where not.

    Means decide; the count is of the seeds that agree with them. Where an arm has no remedy at some
    number of steps, it is not held against the arm whose samples it repeats there.
    """
    sentences = []
    for first, second in _PAIRS:
        if {first, second} <= result["arms"].keys():
            sentence = _verdict(result, metric, first, second)
            if sentence:
                sentences.append(sentence)
    return sentences


def _verdict(result: DemoResult, metric: Metric, first: str, second: str) -> str:
    one, other = result["arms"][first], result["arms"][second]
    lower: list[str] = []
    higher: list[str] = []
    for steps in result["steps"]:
        mine, theirs = values_of(one, metric, steps), values_of(other, metric, steps)
        if not mine or len(mine) != len(theirs) or mine == theirs:
            continue
        below = sum(mine) < sum(theirs)
        agree = sum((a < b) == below for a, b in zip(mine, theirs, strict=True))
        of = f" (in {agree} of {len(mine)} seeds)" if len(mine) > 1 else ""
        (lower if below else higher).append(f"{steps}{of}")
    if not lower and not higher:
        return ""
    parts = [
        f"{word} with {_listed(places)} steps"
        for word, places in (("lower", lower), ("higher", higher))
        if places
    ]
    return f"{one['label']} is {', '.join(parts)} than {other['label']}."


def _listed(items: Sequence[str]) -> str:
    if len(items) == 1:
        return items[0]
    return f"{', '.join(items[:-1])} and {items[-1]}"


def short_name(metric: Metric) -> str:
    """The metric's name without what is common to all."""
    return METRICS[metric].removeprefix("Fréchet distance, ").partition(",")[0]
