"""The demo's evidence: one self-contained HTML page, a Markdown table, and the raw JSON.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import html
import json
import math
import os
from typing import Any

from mixflow_fast.files import write_bytes
from mixflow_fast.reports.html import (
    FAINT,
    INK,
    MARKERS,
    STYLE,
    duration,
    figure,
    line_style,
    number,
    picture,
    plain,
    svg,
    thin,
)

METRICS = {
    "frechet": "Fréchet distance, averaged pixels",
    "frechet_random_conv": "Fréchet distance, random convolutional features",
}
_ABOUT = (
    "A small flow-matching transformer was trained on 16×16 crops of photographs in each of the "
    "ways below, with all else equal. Each one then generated crops with few and with many "
    "sampling steps."
)


def _check(result: dict[str, Any]) -> None:
    needed = ("title", "seeds", "seconds", "steps", "arms", "floor", "losses", "config")
    missing = [key for key in (*needed, "environment", "notes") if key not in result]
    if missing:
        raise ValueError(f"result lacks {', '.join(missing)}")
    if not result["arms"] or not result["steps"] or not result["seeds"]:
        raise ValueError("result needs at least one arm, one entry of steps and one seed")
    for name, arm in result["arms"].items():
        for key in ("label", *METRICS):
            if key not in arm:
                raise ValueError(f"result['arms'][{name!r}] lacks {key!r}")


def _value(arm: dict[str, Any], metric: str, steps: int) -> tuple[float, float | None] | None:
    """(mean, standard deviation or None) of one cell; None where it was not measured."""
    table = arm[metric]
    cell = table.get(str(steps), table.get(steps))
    if cell is None:
        return None
    if isinstance(cell, dict):
        return float(cell["mean"]), float(cell["std"])
    return float(cell), None


def _cell(value: tuple[float, float | None] | None) -> str:
    """A table cell; a spread has two significant digits, and its mean as many decimals."""
    if value is None:
        return "–"
    mean, std = value
    if std is None:
        return number(mean)
    if not (math.isfinite(mean) and math.isfinite(std) and 1e-6 < std < 100):
        return f"{number(mean)} ± {number(std)}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _best(result: dict[str, Any], metric: str, steps: int) -> set[str]:
    """The arms whose printed mean is the lowest finite one of a column."""
    means = {}
    for name, arm in result["arms"].items():
        value = _value(arm, metric, steps)
        if value is not None and math.isfinite(value[0]):
            means[name] = float(number(value[0]))
    return {name for name, mean in means.items() if mean == min(means.values())}


def _seed_words(result: dict[str, Any]) -> str:
    count = len(result["seeds"])
    if count == 1:
        return "one seed: the spread between seeds is not known"
    return (
        f"mean ± standard deviation over {count} seeds; "
        "a gap smaller than the spread is no evidence"
    )


def evidence_markdown(result: dict[str, Any]) -> str:
    """The tables of the report as GitHub Markdown, with the conditions below.

    Args and errors as `render_demo_report`.
    """
    _check(result)

    def escape(text: Any) -> str:
        return html.escape(str(text), quote=False).replace("|", "\\|").replace("\n", " ")

    lines = [f"## {escape(result['title'])}", ""]
    for metric, name in METRICS.items():
        lines += [f"{name} (lower is better)", ""]
        lines.append(f"| arm | {' | '.join(f'{s} steps' for s in result['steps'])} |")
        lines.append("|---|" + "---:|" * len(result["steps"]))
        for key, arm in result["arms"].items():
            cells = []
            for steps in result["steps"]:
                text = _cell(_value(arm, metric, steps))
                cells.append(f"**{text}**" if key in _best(result, metric, steps) else text)
            lines.append(f"| {escape(arm['label'])} | {' | '.join(cells)} |")
        floor = result["floor"].get(metric)
        if floor is not None:
            floor_cells = " | ".join([number(floor)] * len(result["steps"]))
            lines.append(f"| real crops against held-out crops (floor) | {floor_cells} |")
        lines.append("")
    environment = ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    lines.append(f"* {_seed_words(result)}; seeds {', '.join(map(str, result['seeds']))}.")
    lines.append(f"* Whole run: {duration(result['seconds'])}. {escape(environment)}.")
    lines += [f"* {escape(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _legend_height(result: dict[str, Any], columns: int) -> float:
    return 0.2 * -(-(len(result["arms"]) + 1) // columns)


def _legend(canvas: Any, axes: Any, columns: int) -> None:
    """Below the axes: inside, many arms' names would lie on their curves."""
    if axes.get_legend_handles_labels()[0]:
        canvas.legend(
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )


def _distance_plot(result: dict[str, Any], metric: str) -> str:
    canvas, axes = figure(5.2, 3.4 + _legend_height(result, 2))
    positive, values = True, []
    for index, arm in enumerate(result["arms"].values()):
        cells = [(s, _value(arm, metric, s)) for s in result["steps"]]
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
    axes.minorticks_off()
    if values and positive and min(values) > 0 and max(values) / min(values) > 4:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("sampling steps (logarithmic)")
    axes.set_ylabel("distance, lower is better")
    _legend(canvas, axes, 2)
    return svg(canvas, metric.replace("_", "-"), f"{METRICS[metric]} against sampling steps")


def _loss_plot(result: dict[str, Any]) -> str:
    canvas, axes = figure(9.0, 3.0 + _legend_height(result, 3))
    for index, (name, arm) in enumerate(result["arms"].items()):
        points = thin(result["losses"].get(name) or [])
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=plain(arm["label"]), **line_style(index))
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss")
    _legend(canvas, axes, 3)
    return svg(canvas, "loss", "Training loss against images seen")


def _table(result: dict[str, Any], metric: str) -> str:
    head = "".join(f'<th scope="col">{s} steps</th>' for s in result["steps"])
    rows = []
    for name, arm in result["arms"].items():
        cells = []
        for steps in result["steps"]:
            text = html.escape(_cell(_value(arm, metric, steps)))
            best = name in _best(result, metric, steps)
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


def _arm_words(arm: dict[str, Any]) -> str:
    gamma, times = arm.get("gamma"), arm.get("timesteps")
    facts = [] if times or gamma else ["where every other arm starts"]
    if arm.get("interval") == "full":
        facts.append("the input's time is anywhere in [0, 1], whatever its label")
    if times is not None:
        facts.append(f"time distribution {times}")
    if gamma is not None:
        facts.append("no slowing (γ = 0)" if gamma == 0 else f"slowing γ = {gamma:g}")
    return f"<li><b>{html.escape(arm['label'])}</b>: {html.escape('; '.join(facts) or '–')}</li>"


def render_demo_report(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report of a demo run as one HTML file that loads nothing, whole or not at all.

    Args:
        result: "title": str; "seeds": [int]; "seconds": float; "steps": [int] of the sampler;
            "arms": {name: {"label": str, "gamma": float | None, "timesteps": str | None,
            "frechet" and "frechet_random_conv": {"5": value | {"mean", "std"}}, "images": path of
            a PNG | None}}; "floor": {metric: value}, the distance of two sets of real crops;
            "losses": {name: [[images_seen, loss]]}; "real_grid": path of a PNG | None;
            "config": dict; "environment": dict; "notes": [str]. Optional: "command": str;
            "images_caption": str, how the pictures were sampled; "about": str, what was trained.
        path: the HTML file; folders are made.

    Raises:
        ValueError: a missing key, a picture that cannot be read, matplotlib not installed.
    """
    _check(result)
    seeds = ", ".join(map(str, result["seeds"]))
    words = "".join(_arm_words(arm) for arm in result["arms"].values())
    grids = [picture(result.get("real_grid"), "Real crops")] + [
        picture(arm.get("images"), arm["label"]) for arm in result["arms"].values()
    ]
    tables = "".join(
        f"<h3>{html.escape(name)}</h3>{_table(result, metric)}" for metric, name in METRICS.items()
    )
    plots = "".join(
        f"<figure><figcaption>{html.escape(name)}</figcaption>{_distance_plot(result, metric)}"
        "</figure>"
        for metric, name in METRICS.items()
    )
    notes = "".join(f"<li>{html.escape(str(note))}</li>" for note in result["notes"])
    environment = "".join(
        f"<tr><td>{html.escape(str(key))}</td><td>{html.escape(str(value))}</td></tr>"
        for key, value in result["environment"].items()
    )
    command = result.get("command")
    config = json.dumps(result["config"], indent=2, ensure_ascii=False, default=str)
    caption = result.get("images_caption", "Not selected.")
    title = html.escape(result["title"])
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body>
<h1>{title}</h1>
<p class="meta">Seeds {html.escape(seeds)} · {duration(result["seconds"])} in all</p>
<h2>What this is</h2>
<p>{html.escape(result.get("about", _ABOUT))}</p>
<ul>{words}</ul>
<p>A sampler feeds the network its own output, which lies a little behind the time it is told; plain
training never shows it such inputs. MixFlow's slowing does: the network sees a noisier input than
its time label says. Whether it helps is what the numbers below show.</p>
<p>The distance compares generated crops with held-out real ones: <b>lower is better</b>, and real
crops themselves reach the floor. This is a small model on small crops, <b>not ImageNet</b>: the
numbers compare with each other only, never with a published FID.</p>
<h2>Distance to real crops</h2>
<p class="note">Best of each column in bold; {html.escape(_seed_words(result))}.</p>
{tables}
<h2>Distance against sampling steps</h2>
<div class="plots">{plots}</div>
<h2>Samples beside real crops</h2>
<p class="note">{html.escape(caption)}</p>
<div class="grids">{"".join(grids)}</div>
<h2>Training loss</h2>
<p class="note">Arms that draw their times differently solve different tasks: compare a curve with
itself, not with the others.</p>
{_loss_plot(result)}
{f"<h2>Notes</h2><ul>{notes}</ul>" if notes else ""}
<h2>Environment</h2>
<div class="wide"><table><tbody>{environment}</tbody></table></div>
{f"<p>Run again with</p><pre>{html.escape(command)}</pre>" if command else ""}
<details><summary>Configuration</summary><pre>{html.escape(config)}</pre></details>
</body></html>
"""
    write_bytes(path, page.encode())
