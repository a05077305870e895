"""Tables of the page on learned sources, for HTML and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixflow_fast.reports.demo_result import (
    ArmResult,
    DemoResult,
    Metric,
    SourceResult,
    Toy,
    cell_text,
    number_text,
    value_at,
)

# What is measured of the distribution that training drew the noise end from; N(0, I) in brackets.
HEALTH = {
    "kl_per_dim": "KL / D (0)",
    "sigma": "sigma (1)",
    "mean_rms": "RMS of mu (0)",
    "aggregate_var": "variance (1)",
    "distance_to_normal": "W2² of a pixel (0)",
    "largest_variance": "largest variance (1)",
    "w2_per_dim": "W2² / D (0)",
}


@dataclass(frozen=True)
class Table:
    """A table as plain text.

    Attributes:
        head: names of the columns.
        rows: of as many cells, the first one a label.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def toy_table(toy: Toy) -> Table:
    """Curvature and distances in two dimensions."""
    steps = toy["steps"]
    return Table(
        ["arm", "curvature", *(f"SW, {s}" for s in steps), "SW, source"],
        [
            [
                arm["label"],
                number_text(arm["curvature"]),
                *(cell_text(value_at(arm["sliced"], s)) for s in steps),
                number_text(arm["aggregate"]),
            ]
            for arm in toy["arms"].values()
        ],
    )


def solver_table(result: DemoResult, metric: Metric) -> Table | None:
    """Distances by other solvers than Euler; None where they were not measured."""
    nfe = result.get("solver_nfe", {})
    sources = _sources(result["arms"])
    if not nfe or not any(metric in source["solvers"] for source in sources.values()):
        return None
    return Table(
        ["arm", *(f"{name} ({calls} NFE)" for name, calls in nfe.items())],
        [
            [label, *(cell_text(value_at(source["solvers"].get(metric, {}), n)) for n in nfe)]
            for label, source in sources.items()
        ],
    )


def curvature_table(result: DemoResult) -> Table | None:
    """How much paths bend, and what that costs an adaptive solver."""
    sources = _sources(result["arms"])
    if not sources:
        return None
    return Table(
        ["arm", "curvature", "standard error of one seed", "evaluations of RK45"],
        [
            [
                label,
                number_text(source["curvature"]),
                f"{source['curvature_se']:.2g}",
                number_text(source["rk45_nfe"]),
            ]
            for label, source in sources.items()
        ],
    )


def health_table(result: DemoResult) -> Table | None:
    """What training drew the noise end from, of the arms that learned it."""
    sources = {k: v for k, v in _sources(result["arms"]).items() if v["health"]}
    if not sources:
        return None
    rows = []
    for label, source in sources.items():
        health = source["health"]
        rows.append([label, *(number_text(health[k]) if k in health else "–" for k in HEALTH)])
    return Table(["arm", *HEALTH.values()], rows)


def _sources(arms: Mapping[str, ArmResult]) -> dict[str, SourceResult]:
    """What was measured of the sources, by the arm's label."""
    return {arm["label"]: arm["source"] for arm in arms.values() if "source" in arm}
