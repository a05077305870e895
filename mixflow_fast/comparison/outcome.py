"""From the numbers of all arms to what the page shows: differences, classes, pictures, hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from mixflow_fast.comparison.plan import Plan, pairs_of, without_remedy
from mixflow_fast.evaluation.metrics import FrechetEstimate
from mixflow_fast.evaluation.paired import (
    ClassStrip,
    Paired,
    class_strip,
    most_different,
    paired,
    primary_metric,
)
from mixflow_fast.evaluation.protocol import Difference, differences
from mixflow_fast.evaluation.reference import Reference
from mixflow_fast.evaluation.sample_sets import SampleSet, read_set
from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.messages import shorten
from mixflow_fast.reports.comparison_result import Cell, Comparison, Pair, Pictures, metric_name
from mixflow_fast.reports.images import save_grid
from mixflow_fast.reports.slow_flow_report import Measured

FIXED, CHOSEN = 16, 8  # pictures that are shown: of ids set in advance, and of largest difference
# What is said of a number that should not decide, by whether it does.
_OF_ASIDE = {
    False: "the number is shown and does not decide",
    True: "it decides here because there is no other",
}
_SMALL = 64  # pixels: pictures up to this side are shown at every number of steps


def put_together(
    plan: Plan,
    folder: Path,
    cells: Mapping[tuple[str, int], Cell],
    paths: Mapping[tuple[str, int], Path],
    allowed: Sequence[Difference],
    slow: Sequence[Measured],
    reference: Reference,
    words: str,
) -> Comparison:
    arms, pairs = plan.arms, pairs_of(list(plan.arms))
    first = next(iter(cells.values())).found
    metrics, flat = list(first.estimates), low_rank(first.estimates)
    primary = primary_metric(metrics, [*plan.aside, *flat])
    between = {
        (pair, steps, metric): _paired(plan, cells, pair, steps, metric)
        for pair in pairs
        for steps in plan.steps
        for metric in metrics
    }
    sets = {place: read_set(path) for place, path in paths.items()}
    judged = _judged(pairs)
    strips: dict[tuple[Pair, int], ClassStrip] = {}
    for pair in judged:
        for steps in plan.steps:
            labels = sets[pair.a, steps].labels
            if labels is not None and between[pair, steps, primary].low is not None:
                a, b = (cells[key, steps].found.estimates[primary] for key in (pair.a, pair.b))
                if (strip := class_strip(a, b, labels)) is not None:
                    strips[pair, steps] = strip
    return Comparison(
        arms={key: arm.record for key, arm in arms.items()},
        pairs=pairs,
        steps=plan.steps,
        n=first.n,
        primary=primary,
        cells=cells,
        differences=between,
        strips=strips,
        pictures=_pictures(plan, folder, sets, cells, judged[0], primary, bool(allowed)),
        slow=slow,
        slow_note=plan.slow_note,
        reference=words,
        sampler=plan.sampler,
        allowed=allowed,
        notes=[*plan.notes, *([_flat_decides(primary, first.n)] if primary in flat else [])],
        warnings=_warnings(plan, cells, [name for name in flat if name != primary], primary),
        hashes=_hashes(plan, reference),
        command=plan.command,
    )


def _judged(pairs: Sequence[Pair]) -> list[Pair]:
    """What came after against the control, or against before where there is none."""
    wanted = "control" if any(pair.b == "control" for pair in pairs) else "before"
    return [pair for pair in pairs if pair.main and pair.b == wanted]


def _paired(
    plan: Plan, cells: Mapping[tuple[str, int], Cell], pair: Pair, steps: int, metric: str
) -> Paired:
    a, b = plan.arms[pair.a], plan.arms[pair.b]
    unlike = differences([without_remedy(a, steps), without_remedy(b, steps)])
    same = a.record.sha256 is not None and a.record.sha256 == b.record.sha256
    return paired(
        metric,
        cells[pair.a, steps].found.estimates[metric],
        cells[pair.b, steps].found.estimates[metric],
        pairs=not unlike,
        identical=same and a.sets[steps].protocol == b.sets[steps].protocol,
    )


def _pictures(
    plan: Plan,
    folder: Path,
    sets: Mapping[tuple[str, int], SampleSet],
    cells: Mapping[tuple[str, int], Cell],
    pair: Pair,
    primary: str,
    unlike: bool,
) -> list[Pictures]:
    """Files of the pictures that the page shows."""
    side = sets["after", plan.steps[0]].pictures.shape[1]
    found = []
    for steps in plan.steps if side <= _SMALL else plan.steps[:1]:
        ids = list(range(min(FIXED, len(sets["after", steps]))))
        files = {
            key: _grid(folder / "pictures" / f"{key}_{steps}.png", sets[key, steps], ids)
            for key in plan.arms
        }
        found.append(Pictures(steps, ids, files))
        a, b = (cells[key, steps].found.estimates[primary] for key in (pair.a, pair.b))
        if unlike or np.array_equal(a.influence, b.influence):
            continue  # no pairs, or no difference to choose by
        ids = most_different(a, b, CHOSEN)
        files = {
            key: _grid(folder / "pictures" / f"{key}_{steps}_chosen.png", sets[key, steps], ids)
            for key in (pair.b, pair.a)
        }
        labels = [plan.arms[key].record.label for key in (pair.a, pair.b)]
        chosen = (
            f"The {len(ids)} samples whose parts in {metric_name(primary)} differ most between "
            f"{labels[0]} and {labels[1]},"
        )
        found.append(Pictures(steps, ids, files, chosen))
    return found


def _grid(path: Path, pictures: SampleSet, ids: Sequence[int]) -> Path:
    rows = torch.from_numpy(pictures.pictures[list(ids)].copy()).movedim(-1, 1)
    save_grid(path, rows, columns=4, scale=max(1, 64 // rows.shape[-1]))
    return path


def low_rank(estimates: Mapping[str, Estimate]) -> list[str]:
    """The Frechet distances of no more samples than dimensions, which should not decide.

    Their covariance has no full rank, so the first-order bias and influences miss most of a
    difference: of two Gaussians in 128 dimensions, with 100 samples of each, a difference of 0.041
    came out as 0.008 on average, and "better" as often as "worse" (100 draws).
    """
    found = []
    for name, each in estimates.items():
        if isinstance(each, FrechetEstimate) and each.n <= each.dim:
            found.append(name)
    return found


def _flat_decides(primary: str, n: int) -> str:
    return (
        f"{metric_name(primary)} decides here, from {n:,} samples in more dimensions than that: "
        "its differences come out far too small and their intervals cannot be relied on. Take more "
        "samples (--num), or features of fewer dimensions."
    )


def _warnings(
    plan: Plan, cells: Mapping[tuple[str, int], Cell], flat: Sequence[str], primary: str
) -> list[str]:
    """Of the numbers, each once; with the arm where not all have it.

    Args:
        flat: metrics that do not decide because there are too few samples.
        primary: the one that does.
    """
    said: dict[str, list[tuple[str, int]]] = {}
    for place, cell in cells.items():
        for text in cell.found.warnings:
            said.setdefault(text, []).append(place)
    found = [
        f"{metric_name(name)}: the images were enlarged for a network that was trained on larger "
        f"ones; {_OF_ASIDE[name == primary]}"
        for name in plan.aside
    ]
    found += [
        f"{metric_name(name)}: too few samples for its dimensions; the number is shown and does "
        "not decide"
        for name in flat
    ]
    for text, places in said.items():
        whose = shorten(f"{plan.arms[key].record.label}, {steps} steps" for key, steps in places)
        found.append(text if len(places) == len(cells) else f"{whose}: {text}")
    return found


def _hashes(plan: Plan, reference: Reference) -> list[tuple[str, str]]:
    """(what, SHA-256) of all that is not an arm's weights."""
    record = plan.arms["after"].sets[plan.steps[0]].protocol.record
    found = [(f"reference {reference.path.name}", reference.sha256)]
    for each in plan.extractors:
        found.append((f"features {each.id.name}", each.id.sha256 or "no weights"))
    for what, section, field in (
        ("decoder", "decoder", "sha256"),
        ("guide", "guidance", "guide_sha256"),
    ):
        value = dict(record.get(section) or {}).get(field)
        if value is not None:
            found.append((what, str(value)))
    return found
