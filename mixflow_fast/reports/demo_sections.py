"""The sections of a demo's page that its methods share: pictures, distances, losses, conditions."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable

from mixflow_fast.reports.demo_plots import distance_plot, loss_plot
from mixflow_fast.reports.demo_result import (
    METRICS,
    DemoResult,
    Metric,
    best_arms,
    cell_text,
    cell_value,
    describe_seeds,
    value_at,
)
from mixflow_fast.reports.demo_verdicts import verdicts
from mixflow_fast.reports.html import number, picture

DEMO_STYLE = """
.strips figure{margin:.5rem 0}
.strips img{width:100%;max-width:820px;image-rendering:pixelated;border-radius:4px}
.strips figcaption{color:var(--ink);margin-bottom:.15rem}
.grids.large{grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.plainly{margin-top:.8rem}.plainly table{font-size:.85rem}
pre.command{white-space:pre-wrap}
details details>summary,details.small>summary{font-size:1rem}
"""


def pictures_section(result: DemoResult) -> str:
    """A row of large pictures of every arm; the many small ones are folded away."""
    caption = result.get("images_caption", "Not selected.")
    real = result.get("real")
    steps_shown = sorted(
        {s for arm in result["arms"].values() for s in arm.get("pictures", {})}, key=int
    )
    rows, grids = [], []
    for steps in steps_shown:
        strips, small = "", ""
        for arm in result["arms"].values():
            found = arm.get("pictures", {}).get(steps)
            strips += picture(found and found["strip"], arm["label"])
            small += picture(found and found["grid"], f"{arm['label']}, {steps} steps")
        strips += picture(real["strip"], "Real crops (no pairs)") if real else ""
        rows.append(f'<h3>{steps} sampling steps</h3><div class="strips">{strips}</div>')
        grids.append(f'<div class="grids large">{small}</div>')
    if not rows:
        return ""
    grids.append(
        f'<div class="grids large">{picture(real["grid"], "Real crops")}</div>' if real else ""
    )
    return f"""<h2>Samples, and real crops</h2>
<p class="note">{html.escape(caption)}</p>
{"".join(rows)}
<details class="small"><summary>More samples</summary>{"".join(grids)}</details>"""


def distances_section(result: DemoResult, more: str = "") -> str:
    tables = "".join(
        f"<h3>{html.escape(METRICS[metric])}</h3>{_table(result, metric)}{_plainly(result, metric)}"
        for metric in result["metrics"]
    )
    plots = "".join(
        f"<figure><figcaption>{html.escape(METRICS[metric])}</figcaption>"
        f"{distance_plot(result, metric)}</figure>"
        for metric in result["metrics"]
    )
    return f"""<h2>Distance to real crops</h2>
<p class="note">Best of each column in bold; {html.escape(describe_seeds(result))}.{more}</p>
{tables}
<h2>Distance against sampling steps</h2>
<div class="plots">{plots}</div>"""


def _plainly(result: DemoResult, metric: Metric) -> str:
    """Who is lower than whom; of several seeds, how many agree."""
    rows = "".join(table_row(v.text, v.cells) for v in verdicts(result, metric))
    return (
        f'<div class="plainly">{steps_table(result, rows, "one arm, against another")}</div>'
        if rows
        else ""
    )


def corrected_section(result: DemoResult) -> str:
    """Distances without their bias, with standard errors; folded."""
    if not all("corrected" in arm for arm in result["arms"].values()):
        return ""
    tables = ""
    for metric in result["metrics"]:
        rows = [
            (
                arm["label"],
                [cell_text(value_at(arm["corrected"][metric], s)) for s in result["steps"]],
            )
            for arm in result["arms"].values()
        ]
        cells = "".join(table_row(label, map(html.escape, texts)) for label, texts in rows)
        tables += f"<h3>{html.escape(METRICS[metric])}</h3>{steps_table(result, cells)}"
    return f"""<details class="small"><summary>Bias and standard errors</summary>
<p class="note">The distance without the bias that so few samples give it, ± the standard error that
drawing them leaves in one seed's number. Arms share their noise, so differences are surer than
these errors suggest; how much trainings differ is not in them.</p>
{tables}</details>"""


def losses_section(result: DemoResult, differing: str = "draw their times differently") -> str:
    """Training losses, with what the tasks of the arms differ in."""
    return f"""<h2>Training loss</h2>
<p class="note">Arms that {html.escape(differing)} solve different tasks: compare a curve with
itself, not with the others.</p>
{loss_plot(result)}"""


def conditions_section(result: DemoResult) -> str:
    """Notes, environment, the configuration, and the commands."""
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in result["notes"])
    environment = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in result["environment"].items()
    )
    command, compare = result.get("command"), result.get("compare")
    config = json.dumps(result["config"], indent=2, ensure_ascii=False, default=str)
    return f"""{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<h2>Environment</h2>
<div class="wide"><table><tbody>{environment}</tbody></table></div>
<details class="small"><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>
{f'<p>Run again with</p><pre class="command">{html.escape(command)}</pre>' if command else ""}
{_compare(compare) if compare else ""}"""


def _compare(command: str) -> str:
    return f"""<p>Compare these models in detail, with intervals, pairs and slow flow:</p>
<pre class="command">{html.escape(command)}</pre>"""


def _table(result: DemoResult, metric: Metric) -> str:
    rows = []
    for name, arm in result["arms"].items():
        cells = []
        for steps in result["steps"]:
            text = html.escape(cell_text(cell_value(arm, metric, steps)))
            best = name in best_arms(result, metric, steps)
            cells.append(f"<b>{text}</b>" if best else text)
        rows.append(table_row(arm["label"], cells))
    for name, values in result.get("references", {}).items():
        cells = [number(values[metric])] * len(result["steps"])
        rows.append(table_row(name, cells, ' class="floor"'))
    floor = result["floor"].get(metric)
    if floor is not None:
        cells = [number(floor)] * len(result["steps"])
        rows.append(table_row("real crops (floor)", cells, ' class="floor"'))
    return steps_table(result, "".join(rows))


def table_row(label: str, cells: Iterable[str], attribute: str = "") -> str:
    """A table's row; the cells are HTML already."""
    texts = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{attribute}><td>{html.escape(label)}</td>{texts}</tr>"


def steps_table(result: DemoResult, rows: str, first: str = "arm") -> str:
    head = "".join(f'<th scope="col">{s} steps</th>' for s in result["steps"])
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">{first}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
