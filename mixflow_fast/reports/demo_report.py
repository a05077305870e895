"""The demo's evidence: one self-contained HTML page.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Mapping

from mixflow_fast.files import write_text
from mixflow_fast.messages import duration
from mixflow_fast.reports.demo_plots import distance_plot, loss_plot
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
    folded_arms,
    main_arms,
    value_at,
)
from mixflow_fast.reports.demo_verdicts import short_name, verdicts
from mixflow_fast.reports.html import number, page, picture

_STYLE = """
.strips figure{margin:.5rem 0}
.strips img{width:100%;max-width:820px;image-rendering:pixelated;border-radius:4px}
.strips figcaption{color:var(--ink);margin-bottom:.15rem}
.grids.large{grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr))}
.plainly{margin-top:.8rem}.plainly table{font-size:.85rem}
pre.command{white-space:pre-wrap}
details details>summary,details.small>summary{font-size:1rem}
"""
_ABOUT = (
    "A small flow-matching transformer was trained on 16×16 crops of photographs in each of the "
    "ways below, with all else equal. Each one then generated crops with few and with many "
    "sampling steps."
)


def render_demo_report(result: DemoResult, path: str | os.PathLike[str]) -> None:
    """Write the report of a demo run as one HTML file that loads nothing, whole or not at all.

    Args:
        result: what the demo found.
        path: the HTML file; folders are made.

    Raises:
        ValueError: a missing key, a picture that cannot be read, matplotlib not installed.
    """
    check_result(result)
    shown, more = _of_arms(result, main_arms(result)), folded_arms(result)
    sections = [
        _introduction(shown),
        _pictures(shown),
        _distances(shown, _lower_below(result, shown)),
        _corrected(shown),
        _losses(shown),
        _ablations(result, _of_arms(result, more)) if more else "",
        _conditions(result),
    ]
    write_text(path, page(result["title"], "\n".join(sections), _STYLE))


def _of_arms(result: DemoResult, arms: Mapping[str, ArmResult]) -> DemoResult:
    """The same result, of some of the arms."""
    return {**result, "arms": arms}


def _introduction(result: DemoResult) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    arms = "".join(_describe_arm(arm, result) for arm in result["arms"].values())
    return f"""<p class="meta">Seeds {html.escape(seeds)} · {duration(result["seconds"])} in all</p>
<h2>What this is</h2>
<p>{html.escape(result.get("about", _ABOUT))}</p>
<ul>{arms}</ul>
<p>A sampler feeds the network its own output, which lies a little behind the time it is told; plain
training never shows it such inputs. MixFlow's slowing does: the network sees a noisier input than
its time label says. Whether it helps is what the numbers below show. A remedy corrects the sampler
instead and trains nothing: it is the rival to hold MixFlow against.</p>
<p>The distance compares generated crops with held-out real ones: <b>lower is better</b>, and real
crops themselves reach the floor. This is a small model on small crops, <b>not ImageNet</b>: the
numbers compare with each other only, never with a published FID.</p>"""


def _pictures(result: DemoResult) -> str:
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


def _lower_below(result: DemoResult, shown: DemoResult) -> str:
    """A sentence on the columns in which an arm that is folded below is the best."""
    columns = [
        f"{steps} steps ({short_name(metric)})"
        for metric in result["metrics"]
        for steps in result["steps"]
        if not best_arms(result, metric, steps) & shown["arms"].keys()
    ]
    return f" An arm that is folded below is lower at {', '.join(columns)}." if columns else ""


def _distances(result: DemoResult, more: str = "") -> str:
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
    rows = "".join(_row(v.text, v.cells) for v in verdicts(result, metric))
    return (
        f'<div class="plainly">{_wide(result, rows, "one arm, against another")}</div>'
        if rows
        else ""
    )


def _corrected(result: DemoResult) -> str:
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
        cells = "".join(_row(label, map(html.escape, texts)) for label, texts in rows)
        tables += f"<h3>{html.escape(METRICS[metric])}</h3>{_wide(result, cells)}"
    return f"""<details class="small"><summary>Bias and standard errors</summary>
<p class="note">The distance without the bias that so few samples give it, ± the standard error that
drawing them leaves in one seed's number. Arms share their noise, so differences are surer than
these errors suggest; how much trainings differ is not in them.</p>
{tables}</details>"""


def _ablations(result: DemoResult, more: DemoResult) -> str:
    """All arms, with pictures of those that are not above; folded until someone asks."""
    arms = "".join(_describe_arm(arm, result) for arm in more["arms"].values())
    grids = "".join(
        picture(found["grid"], f"{arm['label']}, {steps} steps")
        for arm in more["arms"].values()
        for steps, found in list(arm.get("pictures", {}).items())[:1]
    )
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
{loss_plot(result)}"""


def _conditions(result: DemoResult) -> str:
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
        rows.append(_row(arm["label"], cells))
    floor = result["floor"].get(metric)
    if floor is not None:
        cells = [number(floor)] * len(result["steps"])
        rows.append(_row("real crops (floor)", cells, ' class="floor"'))
    return _wide(result, "".join(rows))


def _row(label: str, cells: Iterable[str], attribute: str = "") -> str:
    """A table's row; the cells are HTML already."""
    texts = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr{attribute}><td>{html.escape(label)}</td>{texts}</tr>"


def _wide(result: DemoResult, rows: str, first: str = "arm") -> str:
    head = "".join(f'<th scope="col">{s} steps</th>' for s in result["steps"])
    return (
        f'<div class="wide"><table><thead><tr><th scope="col">{first}</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _describe_arm(arm: ArmResult, result: DemoResult) -> str:
    gamma, times, source = arm.get("gamma"), arm.get("timesteps"), arm.get("weights_of")
    facts = [] if times or gamma or source else ["where every other arm starts"]
    if source:
        facts.append(f"the weights of “{result['arms'][source]['label']}”, nothing trained")
        remedies = arm.get("remedies", {}).items()
        facts += [f"{text} with {steps} steps" for steps, text in remedies]
    if arm.get("interval") == "full":
        facts.append("the input's time is anywhere in [0, 1], whatever its label")
    if times is not None:
        facts.append(f"time distribution {times}")
    if gamma is not None:
        facts.append("no slowing (γ = 0)" if gamma == 0 else f"slowing γ = {gamma:g}")
    return f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(facts) or '–')}</li>"
