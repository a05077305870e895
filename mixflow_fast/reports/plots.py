"""Plots as inline SVG: figures in the page's style, and the plots of a run's report.

The plots of a run are empty text where there is nothing to draw.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

# Readable on white and on black; markers and dashes tell the arms apart without colour.
COLORS = ("#3b82f6", "#ea7317", "#16a34a", "#a855f7", "#e11d48", "#0891b2")
MARKERS = "osD^vP"
DASHES = ("-", "--", "-.", ":")
INK, FAINT = "#010203", "#040506"  # stand-ins that become CSS variables of the page
MAX_CURVE_POINTS = 200
_SIZE = 5.0, 2.9  # inches

Points = Sequence[tuple[float, float]]
Grid = Sequence[Sequence[float | None]]


class LineStyle(TypedDict, total=False):
    """Options of matplotlib's lines."""

    color: str | tuple[float, float, float, float]
    linestyle: str
    linewidth: float


def figure(width: float, height: float) -> tuple[Figure, Axes]:
    """(figure, axes) in the page's style, sizes in inches; ValueError without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'the report\'s plots need matplotlib: pip install "mixflow_fast[eval]"'
        ) from error
    style = {
        "font.size": 10,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    # `Figure` itself, not pyplot: no display is needed and nothing global is left behind.
    with rc_context(style):
        canvas = Figure(figsize=(width, height), layout="constrained")
        axes = canvas.add_subplot()
    # The page's background shows through, whichever mode the reader has.
    canvas.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(True, color=FAINT, alpha=0.25, linewidth=0.6)
    return canvas, axes


def svg(canvas: Figure, salt: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: no prologue, no metadata, page colours."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # Text stays text: the page's font, selectable, small. The salt makes ids repeatable.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    # Without a size of its own the drawing takes the width of its place on the page.
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    # Ids must differ between the plots of a page, or a clip path of one would cut another.
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{salt}-", text)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def line_style(index: int) -> LineStyle:
    """The style of the curve with this number."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
    }


def plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def thin(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points, each the average of equally many neighbours."""
    size = -(-len(points) // MAX_CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def legend(canvas: Figure, columns: int) -> None:
    """The legend below the axes: inside, many names would lie on their curves."""
    canvas.legend(
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )


def logarithmic_values(axes: Axes) -> None:
    """A logarithmic axis of values, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def plot(
    name: str,
    curves: Mapping[str, Points],
    marks: Sequence[int] = (),
    *,
    smooth: bool = False,
    log: bool = False,
    zero: bool = False,
    ramp: bool = False,
) -> str:
    """Curves against steps.

    Args:
        name: what the plot shows; unique on the page.
        curves: label -> (step, value); an empty label stands in no legend.
        marks: steps with a dotted line.
        smooth: a running mean over the points.
        log: logarithmic values, where they span more than a factor of 4.
        zero: the axis starts at 0.
        ramp: colours in order, for curves that have one.
    """
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return ""
    canvas, axes = figure(*_SIZE)
    values = [value for points in curves.values() for _, value in points]
    for place, (label, points) in enumerate(curves.items()):
        style = _ramp(place, len(curves)) if ramp else line_style(place)
        x, y = zip(*thin(points), strict=True)
        marker = "o" if len(points) < 15 else None
        # Below that there is no noise to see through.
        if smooth and len(points) > 30:
            if not ramp:  # several curves and their raw points would hide each other
                axes.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.4)
            x, y = zip(*thin(_running_mean(points)), strict=True)
        axes.plot(x, y, label=plain(label), marker=marker, markersize=3.5, **style)
    for step in marks:
        axes.axvline(step, color=FAINT, linestyle=":", linewidth=1)
    if log and min(values) > 0 and max(values) / min(values) > 4:
        logarithmic_values(axes)
    elif zero:
        # A curve that is zero throughout needs an axis too.
        axes.set_ylim(bottom=min(0.0, min(values)), top=1.08 * max(values) or 1.0)
    else:
        _ignore_outliers(axes, values)
    if len(curves) > 1:
        legend(canvas, min(len(curves), 4))
    axes.set_xlabel("step")
    return svg(canvas, name, f"{name} against steps")


def loss_over_times(
    name: str,
    curves: Mapping[str, tuple[Sequence[float] | None, Sequence[float | None] | None]],
) -> str:
    """Losses against time.

    Args:
        name: unique on the page.
        curves: label -> (times, losses).
    """
    measured: dict[str, list[tuple[float, float]]] = {}
    for label, (times, losses) in curves.items():
        pairs = zip(times or (), losses or (), strict=False)
        if found := [(t, loss) for t, loss in pairs if loss is not None]:
            measured[label] = found
    if not measured:
        return ""
    canvas, axes = figure(*_SIZE)
    for place, (label, points) in enumerate(measured.items()):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", markersize=3.5, label=plain(label), **line_style(place))
    axes.set_xlim(0, 1)
    axes.set_xlabel("t")
    if len(measured) > 1:
        legend(canvas, min(len(measured), 4))
    return svg(canvas, name, "validation loss against time")


def grid_map(
    name: str,
    grid: Grid | None,
    times: Sequence[float] | None,
    gamma: float = 0.0,
    before: Grid | None = None,
) -> str:
    """A heat map over label time t (columns) and input time m (rows), with its numbers.

    Args:
        name: unique on the page.
        grid: rows of values.
        times: centers of rows and columns.
        gamma: slowing range of training: a line at m = (1 - gamma) t.
        before: another grid: the change from it in percent is shown.
    """
    if not grid or not times:
        return ""
    import numpy as np

    cells = np.array(grid, dtype=np.float64)
    if before is not None:
        start = np.array(before, dtype=np.float64)
        if start.shape != cells.shape:
            return ""
        cells = 100 * (cells / start - 1)
    if not np.isfinite(cells).any():
        return ""
    shown = np.ma.masked_invalid(cells)
    canvas, axes = figure(5.0, 4.2)
    axes.grid(False)
    edges = np.linspace(0, 1, len(times) + 1)
    if before is None:
        mesh = axes.pcolormesh(edges, edges, shown, linewidth=0, cmap="viridis")
    else:
        # The same distance in both directions, so that white means no change.
        most = float(np.abs(shown).max()) or 1.0
        mesh = axes.pcolormesh(
            edges, edges, shown, linewidth=0, cmap="RdBu_r", vmin=-most, vmax=most
        )
    _write_values(axes, mesh, cells, times, _percent if before is not None else _short)
    # A set: without slowing the two lines are one.
    for end in {1.0, 1 - gamma}:
        axes.plot([0, 1], [0, end], color="#e8853a", linewidth=1.4, linestyle=":")
    axes.set_aspect("equal")
    axes.set_xlabel("label time t")
    axes.set_ylabel("input time m")
    return svg(canvas, name, "validation loss over label time and input time")


def _write_values(
    axes: Axes,
    mesh: QuadMesh,
    cells: np.ndarray,
    times: Sequence[float],
    text: Callable[[float], str],
) -> None:
    """Each cell's value in it, dark on light colours and light on dark ones."""
    for row, m in enumerate(times):
        for column, t in enumerate(times):
            value = cells[row, column]
            if math.isfinite(value):
                r, g, b, _ = mesh.cmap(mesh.norm(value))
                ink = "#101418" if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "#f4f6f8"
                axes.text(t, m, text(value), ha="center", va="center", fontsize=7, color=ink)


def _percent(value: float) -> str:
    return f"{value:+.0f}" if round(value) else "0"


def _short(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.1g}"


def _ramp(place: int, count: int) -> LineStyle:
    """The style of one of `count` curves that have an order."""
    from matplotlib import colormaps

    # The very ends of the map are hard to see on a page's background.
    share = 0.05 + 0.9 * place / max(1, count - 1)
    return {"color": colormaps["cool"](share), "linewidth": 1.5}


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """Each value with its past, the weights falling by half in a hundredth of the curve."""
    keep = 0.5 ** (1 / max(2.0, len(points) / 100))
    mean = weight = 0.0
    out = []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append((step, mean / weight))  # unbiased from the first point on
    return out


def _ignore_outliers(axes: Axes, values: Sequence[float]) -> None:
    """The first steps of a run must not press the others into a line."""
    ordered = sorted(values)
    high = ordered[int(0.98 * (len(ordered) - 1))]
    low = ordered[0]
    if len(ordered) > 30 and ordered[-1] - low > 2 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))
