"""The demo's evidence: one self-contained HTML page, a Markdown table, and the raw JSON.

The page loads nothing: style, plots (inline SVG) and pictures (base64 PNG) are inside it.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixflow_fast.images import write_bytes

METRICS = {
    "frechet": "Fréchet distance, averaged pixels",
    "frechet_random_conv": "Fréchet distance, random convolutional features",
}
# Readable on white and on black; markers and dashes tell the arms apart without colour.
_COLORS = ("#3b82f6", "#ea7317", "#16a34a", "#a855f7", "#e11d48", "#0891b2")
_MARKERS = "osD^vP"
_DASHES = ("-", "--", "-.", ":")
_INK, _FAINT = "#010203", "#040506"  # stand-ins that become CSS variables of the page
_MAX_CURVE_POINTS = 200

_ABOUT = (
    "A small flow-matching transformer was trained on 16×16 crops of photographs in each of the "
    "ways below, with all else equal. Each one then generated crops with few and with many "
    "sampling steps."
)
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--faint:#69727d;--line:#d8dde3;--soft:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e9ec;--faint:#949da6;--line:#343a41;
--soft:#1d2125}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem 1.1rem 4rem;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:1rem 0 .3rem}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
.meta,figcaption,.note{color:var(--faint);font-size:.9rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.95rem;min-width:60%}
th,td{padding:.4rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;
min-width:7.5rem}
thead th{color:var(--faint);font-weight:600}
tr.floor td{color:var(--faint);font-style:italic}
figure{margin:0}
.plots,.grids{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.grids{grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr))}
.grids img{width:100%;image-rendering:pixelated;border:1px solid var(--line);border-radius:4px}
.grids figcaption{color:var(--ink);margin-bottom:.3rem}
svg{width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
pre{background:var(--soft);padding:.8rem;border-radius:6px;overflow-x:auto;font-size:.85rem}
details{margin-top:2rem}summary{cursor:pointer;font-weight:600;font-size:1.2rem}
"""


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all.

    Raises:
        ValueError: something that JSON cannot hold, NaN and infinity included.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{Path(path).name}: not representable in JSON ({error}); "
            "give plain dicts, lists, strings, finite numbers and None"
        ) from error
    write_bytes(path, (text + "\n").encode())


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


def _number(value: float) -> str:
    """Four significant digits, without an exponent between 0.0001 and 100,000."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _cell(value: tuple[float, float | None] | None) -> str:
    """A table cell; a spread has two significant digits, and its mean as many decimals."""
    if value is None:
        return "–"
    mean, std = value
    if std is None:
        return _number(mean)
    if not (math.isfinite(mean) and math.isfinite(std) and 1e-6 < std < 100):
        return f"{_number(mean)} ± {_number(std)}"
    decimals = max(0, 1 - math.floor(math.log10(std)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _best(result: dict[str, Any], metric: str, steps: int) -> set[str]:
    """The arms whose printed mean is the lowest finite one of a column."""
    means = {}
    for name, arm in result["arms"].items():
        value = _value(arm, metric, steps)
        if value is not None and math.isfinite(value[0]):
            means[name] = float(_number(value[0]))
    return {name for name, mean in means.items() if mean == min(means.values())}


def _seed_words(result: dict[str, Any]) -> str:
    count = len(result["seeds"])
    if count == 1:
        return "one seed: the spread between seeds is not known"
    return (
        f"mean ± standard deviation over {count} seeds; "
        "a gap smaller than the spread is no evidence"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


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
            floor_cells = " | ".join([_number(floor)] * len(result["steps"]))
            lines.append(f"| real crops against held-out crops (floor) | {floor_cells} |")
        lines.append("")
    environment = ", ".join(f"{k} {v}" for k, v in result["environment"].items())
    lines.append(f"* {_seed_words(result)}; seeds {', '.join(map(str, result['seeds']))}.")
    lines.append(f"* Whole run: {_duration(result['seconds'])}. {escape(environment)}.")
    lines += [f"* {escape(note)}" for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _figure(width: float, height: float) -> tuple[Any, Any]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'the report\'s plots need matplotlib: pip install "mixflow_fast[eval]"'
        ) from error
    style = {
        "font.size": 10,
        "axes.edgecolor": _FAINT,
        "axes.labelcolor": _INK,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
        "text.color": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(True, color=_FAINT, alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Any, salt: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: no prologue, no metadata, page colours."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The text stays text: the page's font, selectable, small.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{salt}-", text)
    text = text.replace(_INK, "var(--ink)").replace(_FAINT, "var(--faint)")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def _style(index: int) -> dict[str, Any]:
    return {
        "color": _COLORS[index % len(_COLORS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "linewidth": 1.8,
    }


def _plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def _legend_height(result: dict[str, Any], columns: int) -> float:
    return 0.2 * -(-(len(result["arms"]) + 1) // columns)


def _legend(figure: Any, axes: Any, columns: int) -> None:
    """Below the axes: inside, many arms' names would lie on their curves."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            labelcolor=_INK,
        )


def _distance_plot(result: dict[str, Any], metric: str) -> str:
    figure, axes = _figure(5.2, 3.4 + _legend_height(result, 2))
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
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            label=_plain(arm["label"]),
            **_style(index),
        )
    floor = result["floor"].get(metric)
    if floor is not None:
        axes.axhline(floor, color=_FAINT, linestyle=":", linewidth=1.4, label="real (floor)")
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
    _legend(figure, axes, 2)
    return _svg(figure, metric.replace("_", "-"), f"{METRICS[metric]} against sampling steps")


def _thin(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """At most _MAX_CURVE_POINTS points, each the average of equally many neighbours."""
    size = -(-len(points) // _MAX_CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _loss_plot(result: dict[str, Any]) -> str:
    figure, axes = _figure(9.0, 3.0 + _legend_height(result, 3))
    for index, (name, arm) in enumerate(result["arms"].items()):
        points = _thin(result["losses"].get(name) or [])
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, label=_plain(arm["label"]), **_style(index))
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss")
    _legend(figure, axes, 3)
    return _svg(figure, "loss", "Training loss against images seen")


def _picture(path: str | os.PathLike[str] | None, caption: str) -> str:
    text = html.escape(caption)
    if path is None:
        return f'<figure><figcaption>{text}</figcaption><p class="note">no picture</p></figure>'
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"picture {caption!r}: cannot read {path} ({error.strerror})") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"picture {caption!r}: {path} is not a PNG file")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'


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
        cells = [f"<td>{_number(floor)}</td>"] * len(result["steps"])
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
        facts.append(f"time law {times}")
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
    grids = [_picture(result.get("real_grid"), "Real crops")] + [
        _picture(arm.get("images"), arm["label"]) for arm in result["arms"].values()
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
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p class="meta">Seeds {html.escape(seeds)} · {_duration(result["seconds"])} in all</p>
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
