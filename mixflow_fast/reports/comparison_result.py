"""What `mixflow-fast compare` found, as the page and the JSON file show it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixflow_fast.evaluation.evaluate import Evaluation
from mixflow_fast.evaluation.paired import HIGHER_IS_BETTER, ClassStrip, Paired
from mixflow_fast.evaluation.protocol import Difference, Protocol
from mixflow_fast.reports.html import number
from mixflow_fast.reports.slow_flow_report import Measured, overshoot_warnings

NAMES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "Precision",
    "recall": "Recall",
    "kid": "KID",
    "fd_dinov2": "FD-DINOv2",
    "fd_effnet_lite0": "FD-EffLite0",
    "fd_effnet_lite0_p128": "FD-EffLite0, 128 dimensions",
    "fd_pooled_pixels": "FD of pooled pixels",
    "fd_random_conv": "FD of random convolutions",
}
COVERS = (
    "Intervals are 95% and cover the drawing of the generated images: another seed of the noise. "
    "They do not cover another training, which may differ by more, nor another reference."
    " Each verdict is at 95% by itself: of twenty between equal networks one is to be expected."
)
NO_CONTROL = "no control: this difference includes plain further training"


def metric_name(metric: str) -> str:
    """What people call a metric."""
    return NAMES.get(metric, metric)


def direction(metric: str) -> str:
    """Which way is better."""
    return "higher is better" if metric in HIGHER_IS_BETTER else "lower is better"


@dataclass(frozen=True, kw_only=True)
class ArmRecord:
    """One of what is compared.

    Attributes:
        key: before, control, after, after_2, ..., or one of them with _remedy.
        label: on the page.
        path: as it was given.
        sha256: of its weights, where it is known.
        average: which of a checkpoint's weights.
        config: what it was trained with, by dotted names; None where nothing says it.
    """

    key: str
    label: str
    path: str
    sha256: str | None
    average: str | None
    config: Mapping[str, object] | None

    def to_record(self) -> dict[str, object]:
        """Plain values for a JSON file; of the configuration the page shows what differs."""
        return {
            "key": self.key,
            "label": self.label,
            "path": self.path,
            "weights_sha256": self.sha256,
            "average": self.average,
        }


@dataclass(frozen=True)
class Pair:
    """Two arms that are compared.

    Attributes:
        a, b: their keys; verdicts are about a.
        main: stands in the verdict lines.
    """

    a: str
    b: str
    main: bool


@dataclass(frozen=True)
class Cell:
    """An arm at one number of steps.

    Attributes:
        nfe: network evaluations of a sample, guidance's second row not counted.
        protocol: of the numbers.
        found: the numbers.
    """

    nfe: int
    protocol: Protocol
    found: Evaluation

    def to_record(self) -> dict[str, object]:
        """Plain values for a JSON file."""
        return {
            "nfe": self.nfe,
            "n": self.found.n,
            "protocol": self.protocol.sha256,
            "metrics": {name: each.to_record() for name, each in self.found.estimates.items()},
        }


@dataclass(frozen=True)
class Pictures:
    """Pictures of the same ids, a file an arm.

    Attributes:
        steps: of the sampler.
        ids: of the samples, in rows.
        files: by the arm's key.
        chosen: None for ids that were fixed in advance; else how they were chosen.
    """

    steps: int
    ids: Sequence[int]
    files: Mapping[str, Path]
    chosen: str | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All that the page shows.

    Attributes:
        arms: by key, in the order of the page.
        pairs: which are compared.
        steps: numbers of intervals.
        n: samples of each cell.
        primary: the metric that decides.
        cells: by (key, steps).
        differences: by (pair, steps, metric).
        strips: of main pairs by (pair, steps), where classes are large enough.
        pictures: in the order of the page.
        slow: slow flow of the networks, the one before first; empty where it was left out.
        slow_note: why it was left out.
        reference: what it is, in words.
        sampler: what sampled, in lines.
        allowed: fields in which the protocols differ, by consent.
        notes: what a reader has to know first.
        warnings: what makes numbers doubtful.
        hashes: (what, SHA-256) beside those of the arms.
        command: what makes the page again.
    """

    arms: Mapping[str, ArmRecord]
    pairs: Sequence[Pair]
    steps: Sequence[int]
    n: int
    primary: str
    cells: Mapping[tuple[str, int], Cell]
    differences: Mapping[tuple[Pair, int, str], Paired]
    strips: Mapping[tuple[Pair, int], ClassStrip]
    pictures: Sequence[Pictures]
    slow: Sequence[Measured]
    slow_note: str
    reference: str
    sampler: Sequence[str]
    allowed: Sequence[Difference]
    notes: Sequence[str]
    warnings: Sequence[str]
    hashes: Sequence[tuple[str, str]]
    command: str

    @property
    def metrics(self) -> list[str]:
        """Names of the numbers, the deciding one first."""
        first = next(iter(self.cells.values())).found.estimates
        return sorted(first, key=lambda name: name != self.primary)


def verdict_words(comparison: Comparison, pair: Pair, steps: int) -> str:
    """A sentence on the deciding number, for the terminal."""
    found = comparison.differences[pair, steps, comparison.primary]
    arms, cells = comparison.arms, comparison.cells
    a, b = cells[pair.a, steps], cells[pair.b, steps]
    values = (
        f"{number(a.found.estimates[comparison.primary].value)} against "
        f"{number(b.found.estimates[comparison.primary].value)}"
    )
    nfe = f"{a.nfe} NFE" if a.nfe == b.nfe else f"{a.nfe} and {b.nfe} NFE"
    return (
        f"{steps} steps ({nfe}): {arms[pair.a].label} against {arms[pair.b].label}: "
        f"{found.verdict}; {metric_name(comparison.primary)} {values}, "
        f"difference {interval_words(found)}, n = {comparison.n:,}"
        f"{disagreement(comparison, pair, steps)}"
    )


def disagreement(comparison: Comparison, pair: Pair, steps: int) -> str:
    """Which of the other numbers say the opposite of the deciding one, or nothing."""
    own = comparison.differences[pair, steps, comparison.primary].verdict
    opposite = {"better": "worse", "worse": "better"}.get(own)
    found = [
        metric_name(name)
        for name in comparison.metrics
        if comparison.differences[pair, steps, name].verdict == opposite
    ]
    return f"; but {opposite} by {', '.join(found)}" if found else ""


def interval_words(found: Paired) -> str:
    """A difference and its interval."""
    if found.low is None or found.high is None:
        return f"{signed(found.value)} (no interval: the sets are no pairs)"
    return f"{signed(found.corrected)} (95% {signed(found.low)} to {signed(found.high)})"


def signed(value: float) -> str:
    """Three significant digits and a sign."""
    return "0" if value == 0 else f"{value:+.3g}"


def config_differences(arms: Mapping[str, ArmRecord]) -> list[tuple[str, list[object]]]:
    """(setting, its value in each arm that has a configuration) where they differ; `out` aside."""
    configs = [arm.config for arm in own_configs(arms).values() if arm.config is not None]
    names = sorted({name for config in configs for name in config} - {"out"})
    rows = [(name, [config.get(name) for config in configs]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]


def own_configs(arms: Mapping[str, ArmRecord]) -> dict[str, ArmRecord]:
    """The arms that were trained in a way of their own and say how."""
    return {
        key: arm
        for key, arm in arms.items()
        if arm.config is not None and not key.endswith("_remedy")
    }


def record(comparison: Comparison) -> dict[str, object]:
    """Every number of the page, as the content of a JSON file."""
    c = comparison
    own = own_configs(c.arms)
    rows = [
        {"steps": steps, "arm": key, **c.cells[key, steps].to_record()}
        for steps in c.steps
        for key in c.arms
    ]
    verdicts = [
        {"steps": steps, "a": pair.a, "b": pair.b, "main": pair.main}
        | {"primary": metric == c.primary, **c.differences[pair, steps, metric].to_record()}
        for steps in c.steps
        for pair in c.pairs
        for metric in c.metrics
    ]
    slow = [
        {
            "name": each.name,
            "slow_flow": each.slow.to_record(),
            "losses": None if each.losses is None else each.losses.to_record(),
            "warnings": overshoot_warnings(each),
        }
        for each in c.slow
    ]
    protocols = {cell.protocol.sha256: cell.protocol.record for cell in c.cells.values()}
    return {
        "format": "mixflow-comparison/1",
        "n": c.n,
        "steps": list(c.steps),
        "primary": c.primary,
        "arms": [arm.to_record() for arm in c.arms.values()],
        "control": "control" in c.arms,
        "verdicts": verdicts,
        "numbers": rows,
        "classes": [
            {"steps": steps, "a": pair.a, "b": pair.b, "metric": c.primary, **strip.to_record()}
            for (pair, steps), strip in c.strips.items()
        ],
        "pictures": [
            {"steps": p.steps, "ids": list(p.ids), "arms": list(p.files), "chosen": p.chosen}
            for p in c.pictures
        ],
        "slow_flow": slow,
        "slow_flow_left_out": c.slow_note or None,
        "configuration": {
            "arms": list(own),
            "different": dict(config_differences(c.arms)),
        },
        "reference": c.reference,
        "sampler": list(c.sampler),
        "allowed_differences": {d.field: list(d.values) for d in c.allowed},
        "notes": list(c.notes),
        "warnings": list(c.warnings),
        "hashes": dict(c.hashes),
        "protocols": protocols,
        "intervals": COVERS,
        "command": c.command,
    }
