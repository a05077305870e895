"""The demo's evidence: one self-contained HTML page, and its tables as Markdown.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixflow_fast.files import write_text
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
)
from mixflow_fast.reports.html import number, page, picture
from mixflow_fast.reports.plots import (
    FAINT,
    MARKERS,
    figure,
    legend,
    line_style,
    logarithmic_values,
    plain,
    svg,
    thin,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Base, control and MixFlow; what a sweep adds stands folded below.
MAIN_ARMS = 3
_STYLE = """
.grids.large{grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
"""
_ABOUT = (
    "A small flow-matching transformer was trained on 16×16 crops of photographs in each of the "
    "ways below, with all else equal. Each one then generated crops with few and with many "
    "sampling steps."
)


def evidence_markdown(result: DemoResult) -> str:
    """The tables of the report as GitHub Markdown, with the conditions below.

    Args and errors as `render_demo_report`.
    """
    check_result(result)

    def escape(text: object) -> str:
        return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [f"## {escape(result['title'])}", ""]
    for metric, name in METRICS.items():
        lines += [f"{name} (lower is better)", ""]
        lines.append(f"| arm | {' | '.join(f'{s} steps' for s in result['steps'])} |")
        lines.append("|---|" + "---:|" * len(result["steps"]))
        for key, arm in result["arms"].items():
            cells = []
            for steps in result["steps"]:
                text = cell_text(cell_value(arm, metric, steps))
                cells.append(f"**{text}**" if key in best_arms(result, metric, steps) else text)
            lines.append(f"| {escape(arm['label'])} | {' | '.join(cells)} |")
        floor = result["floor"].get(metric)
        if floor is not None:
            floor_cells = " | ".join([number(floor)] * len(result["steps"]))
            lines.append(f"| real crops against held-out crops (floor) | {floor_cells} |")
        lines.append("")
    environment = ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    lines.append(f"* {describe_seeds(result)}; seeds {', '.join(map(str, result['seeds']))}.")
    lines.append(f"* Whole run: {duration(result['seconds'])}. {escape(environment)}.")
    lines += [f"* {escape(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def render_demo_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Write the report of a demo run as one HTML file that loads nothing, whole or not at all.

    Args:
        result: what the demo found.
        path: the HTML file; folders are made.

    Raises:
        ValueError: a missing key, a picture that cannot be read, matplotlib not installed.
    """
    check_result(result)
    arms = list(result["arms"])
    shown, more = _of_arms(result, arms[:MAIN_ARMS]), _of_arms(result, arms[MAIN_ARMS:])
    sections = [
        _introduction(shown),
        _samples(shown),
        _distances(shown, _lower_below(result, shown)),
        _losses(shown),
        _ablations(result, more) if more["arms"] else "",
        _conditions(result),
    ]
    write_text(path, page(result["title"], "\n".join(sections), _STYLE))


def _of_arms(result: DemoResult, names: Sequence[str]) -> DemoResult:
    """The same result, of some of the arms."""
    return {**result, "arms": {name: result["arms"][name] for name in names}}


def _introduction(result: DemoResult) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    arms = "".join(_describe_arm(arm) for arm in result["arms"].values())
    return f"""<p class="meta">Seeds {html.escape(seeds)} · {duration(result["seconds"])} in all</p>
<h2>What this is</h2>
<p>{html.escape(result.get("about", _ABOUT))}</p>
<ul>{arms}</ul>
<p>A sampler feeds the network its own output, which lies a little behind the time it is told; plain
training never shows it such inputs. MixFlow's slowing does: the network sees a noisier input than
its time label says. Whether it helps is what the numbers below show.</p>
<p>The distance compares generated crops with held-out real ones: <b>lower is better</b>, and real
crops themselves reach the floor. This is a small model on small crops, <b>not ImageNet</b>: the
numbers compare with each other only, never with a published FID.</p>"""


def _lower_below(result: DemoResult, shown: DemoResult) -> str:
    """A sentence on the columns in which an arm that is folded below is the best."""
    columns = [
        f"{steps} steps ({METRICS[metric].partition(', ')[2]})"
        for metric in METRICS
        for steps in result["steps"]
        if not best_arms(result, metric, steps) & shown["arms"].keys()
    ]
    return f" An arm that is folded below is lower at {', '.join(columns)}." if columns else ""


def _distances(result: DemoResult, more: str = "") -> str:
    tables = "".join(
        f"<h3>{html.escape(name)}</h3>{_table(result, metric)}" for metric, name in METRICS.items()
    )
    plots = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>{_distance_plot(result, metric)}"
        "</figure>"
        for metric, name in METRICS.items()
    )
    return f"""<h2>Distance to real crops</h2>
<p class="note">Best of each column in bold; {html.escape(describe_seeds(result))}.{more}</p>
{tables}
<h2>Distance against sampling steps</h2>
<div class="plots">{plots}</div>"""


def _samples(result: DemoResult) -> str:
    grids = [picture(arm.get("images"), arm["label"]) for arm in result["arms"].values()]
    grids.append(picture(result.get("real_grid"), "Real crops"))
    caption = result.get("images_caption", "Not selected.")
    return f"""<h2>Samples, and real crops</h2>
<p class="note">{html.escape(caption)}</p>
<div class="grids large">{"".join(grids)}</div>"""


def _ablations(result: DemoResult, more: DemoResult) -> str:
    """All arms, with pictures of those that are not above; folded until someone asks."""
    arms = "".join(_describe_arm(arm) for arm in more["arms"].values())
    grids = "".join(picture(arm.get("images"), arm["label"]) for arm in more["arms"].values())
    return f"""<details><summary>{len(more["arms"])} more ways: gammas and ablations</summary>
<ul>{arms}</ul>
{_distances(result)}
<h2>Their samples</h2>
<div class="grids">{grids}</div>
</details>"""


def _losses(result: DemoResult) -> str:
    return f"""<h2>Training loss</h2>
<p class="note">Arms that draw their times differently solve different tasks: compare a curve with
itself, not with the others.</p>
{_loss_plot(result)}"""


def _conditions(result: DemoResult) -> str:
    """Notes, environment, the command, the configuration."""
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in result["notes"])
    environment = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in result["environment"].items()
    )
    command = result.get("command")
    config = json.dumps(result["config"], indent=2, ensure_ascii=False, default=str)
    return f"""{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<h2>Environment</h2>
<div class="wide"><table><tbody>{environment}</tbody></table></div>
{f"<p>Run again with</p><pre>{html.escape(command)}</pre>" if command else ""}
<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>"""


def _table(result: DemoResult, metric: Metric) -> str:
    head = "".join(f'<th scope="col">{s} steps</th>' for s in result["steps"])
    rows = []
    for name, arm in result["arms"].items():
        cells = []
        for steps in result["steps"]:
            text = html.escape(cell_text(cell_value(arm, metric, steps)))
            best = name in best_arms(result, metric, steps)
            cells.append(f"<td>{f'<b>{text}</b>' if best else text}</td>")
        rows.append(f"<tr><td>{html.escape(arm['label'])}</td>{''.join(cells)}</tr>")
    floor = result["floor"].get(metric)
    if floor is not None:
        cells = [f"<td>{number(floor)}</td>"] * len(result["steps"])
        rows.append(f'<tr class="floor"><td>real crops (floor)</td>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">arm</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _describe_arm(arm: ArmResult) -> str:
    gamma, times = arm.get("gamma"), arm.get("timesteps")
    facts = [] if times or gamma else ["where every other arm starts"]
    if arm.get("interval") == "full":
        facts.append("the input's time is anywhere in [0, 1], whatever its label")
    if times is not None:
        facts.append(f"time distribution {times}")
    if gamma is not None:
        facts.append("no slowing (γ = 0)" if gamma == 0 else f"slowing γ = {gamma:g}")
    return f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(facts) or '–')}</li>"


def _legend_height(result: DemoResult, columns: int) -> float:
    return 0.2 * -(-(len(result["arms"]) + 1) // columns)


def _legend(canvas: Figure, axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        legend(canvas, columns)


def _distance_plot(result: DemoResult, metric: Metric) -> str:
    canvas, axes = figure(5.2, 3.4 + _legend_height(result, 2))
    positive = True
    values: list[float] = []
    for index, arm in enumerate(result["arms"].values()):
        cells = [(s, cell_value(arm, metric, s)) for s in result["steps"]]
        points = [(s, *v) for s, v in cells if v is not None and math.isfinite(v[0])]
        if not points:
            continue
        x, mean, std = zip(*points, strict=True)
        spread = [s or 0.0 for s in std]
        values += mean
        positive &= all(m - s > 0 for m, s in zip(mean, spread, strict=True))
        axes.errorbar(
            x,
            mean,
            yerr=spread if any(spread) else None,
            capsize=3,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            label=plain(arm["label"]),
            **line_style(index),
        )
    floor = result["floor"].get(metric)
    if floor is not None:
        axes.axhline(floor, color=FAINT, linestyle=":", linewidth=1.4, label="real (floor)")
        values.append(floor)
    axes.set_xscale("log")
    axes.set_xticks(result["steps"], [str(s) for s in result["steps"]])
    # The steps that were measured are the only ticks.
    axes.minorticks_off()
    if values and positive and min(values) > 0 and max(values) / min(values) > 4:
        logarithmic_values(axes)
    axes.set_xlabel("sampling steps (logarithmic)")
    axes.set_ylabel("distance, lower is better")
    _legend(canvas, axes, 2)
    salt = f"{metric.replace('_', '-')}-{len(result['arms'])}"  # a page may plot a metric twice
    return svg(canvas, salt, f"{METRICS[metric]} against sampling steps")


def _loss_plot(result: DemoResult) -> str:
    canvas, axes = figure(9.0, 3.0 + _legend_height(result, 3))
    for index, (name, arm) in enumerate(result["arms"].items()):
        points = thin(result["losses"].get(name) or [])
        if points:
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else None  # a line of one point is not seen
            axes.plot(x, y, label=plain(arm["label"]), marker=marker, **line_style(index))
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss")
    _legend(canvas, axes, 3)
    return svg(canvas, "loss", "Training loss against images seen")
