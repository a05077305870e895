"""The demo's tables as GitHub Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from mixflow_fast.messages import duration
from mixflow_fast.reports.demo_result import (
    METRICS,
    ArmResult,
    DemoResult,
    Metric,
    best_arms,
    cell_text,
    cell_value,
    check_result,
    describe_seeds,
    value_at,
)
from mixflow_fast.reports.demo_verdicts import verdicts
from mixflow_fast.reports.html import number
from mixflow_fast.reports.mixed_tables import (
    curvature_table,
    health_table,
    solver_table,
    toy_table,
)


def evidence_markdown(result: DemoResult) -> str:
    """The tables of the report, what they say, and the conditions below.

    Args and errors as `render_demo_report`.
    """
    check_result(result)
    lines = [f"## {_escape(result['title'])}", ""]
    for metric in result["metrics"]:
        lines += [f"{METRICS[metric]} (lower is better)", "", *_table(result, metric), ""]
        found = verdicts(result, metric)
        if found:
            lines += _head(result, "one arm, against another")
            lines += [f"| {_escape(v.text)} | {' | '.join(v.cells)} |" for v in found]
            lines.append("")
    lines += [*_remedies(result), *_sources(result), *_corrected(result)]
    environment = ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    lines.append(f"* {describe_seeds(result)}; seeds {', '.join(map(str, result['seeds']))}.")
    lines.append(f"* Whole run: {duration(result['seconds'])}. {_escape(environment)}.")
    lines += [f"* {_escape(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _escape(text: object) -> str:
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")


def _head(result: DemoResult, first: str = "arm") -> list[str]:
    steps = " | ".join(f"{s} steps" for s in result["steps"])
    return [f"| {first} | {steps} |", "|---|" + "---:|" * len(result["steps"])]


def _table(result: DemoResult, metric: Metric) -> list[str]:
    lines = _head(result)
    for key, arm in result["arms"].items():
        cells = []
        for steps in result["steps"]:
            text = cell_text(cell_value(arm, metric, steps))
            cells.append(f"**{text}**" if key in best_arms(result, metric, steps) else text)
        lines.append(f"| {_escape(arm['label'])} | {' | '.join(cells)} |")
    for name, values in result.get("references", {}).items():
        reference = " | ".join([number(values[metric])] * len(result["steps"]))
        lines.append(f"| {_escape(name)} | {reference} |")
    floor = result["floor"].get(metric)
    if floor is not None:
        floor_cells = " | ".join([number(floor)] * len(result["steps"]))
        lines.append(f"| real crops against held-out crops (floor) | {floor_cells} |")
    return lines


def _remedies(result: DemoResult) -> list[str]:
    lines = []
    for arm in result["arms"].values():
        if arm.get("remedies"):
            cells = [_escape(arm["remedies"].get(str(s), "none")) for s in result["steps"]]
            lines.append(f"| {_escape(arm['label'])} | {' | '.join(cells)} |")
    return ["What the remedies are", "", *_head(result), *lines, ""] if lines else []


def _sources(result: DemoResult) -> list[str]:
    """What is measured where the noise end may be learned."""
    toy = result.get("toy")
    tables = {METRICS[metric]: solver_table(result, metric) for metric in result["metrics"]}
    tables |= {
        "How much the paths bend": curvature_table(result),
        "What training drew the noise end from; the last four of all noise ends together (N(0, I) "
        "has the value in brackets)": health_table(result),
        "In two dimensions: eight Gaussians; sliced 2-Wasserstein distance of samples by N Euler "
        "steps, and of the noise ends of training to N(0, I)": toy_table(toy) if toy else None,
    }
    lines = []
    for title, table in tables.items():
        if table is not None:
            rule = "|---|" + "---:|" * (len(table.head) - 1)
            lines += [title, "", *map(_line, [table.head]), rule, *map(_line, table.rows), ""]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escape, cells))} |"


def _corrected(result: DemoResult) -> list[str]:
    metrics = [m for m in result["metrics"] if all("corrected" in a for a in _arms(result))]
    lines = []
    for metric in metrics:
        lines += [
            f"{METRICS[metric]}, without the bias of so few samples ± the standard error of one "
            "seed's drawing of samples",
            "",
            *_head(result),
        ]
        for arm in _arms(result):
            cells = [cell_text(value_at(arm["corrected"][metric], s)) for s in result["steps"]]
            lines.append(f"| {_escape(arm['label'])} | {' | '.join(cells)} |")
        lines.append("")
    if not lines:
        return []
    return ["<details><summary>Bias and standard errors</summary>", "", *lines, "</details>", ""]


def _arms(result: DemoResult) -> list[ArmResult]:
    return list(result["arms"].values())
