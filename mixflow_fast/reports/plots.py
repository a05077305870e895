"""The plots of a run's report, as inline SVG; empty text where there is nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mixflow_fast.reports.html import FAINT, INK, figure, line_style, plain, svg, thin

_SIZE = 5.0, 2.9
Points = Sequence[tuple[float, float]]


def plot(
    name: str,
    curves: dict[str, Points],
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
        dots = {"marker": "o", "markersize": 3.5} if len(points) < 15 else {}
        if smooth and len(points) > 30:
            if not ramp:
                axes.plot(x, y, color=style["color"], linewidth=0.8, alpha=0.4)
            x, y = zip(*thin(_running_mean(points)), strict=True)
        axes.plot(x, y, label=plain(label), **style, **dots)
    for step in marks:
        axes.axvline(step, color=FAINT, linestyle=":", linewidth=1)
    if log and min(values) > 0 and max(values) / min(values) > 4:
        _logarithmic(axes)
    elif zero:
        axes.set_ylim(bottom=min(0.0, min(values)), top=1.08 * max(values) or 1.0)
    else:
        _ignore_outliers(axes, values)
    if len(curves) > 1:
        _legend(canvas, len(curves))
    axes.set_xlabel("step")
    return svg(canvas, name, f"{name} against steps")


def loss_over_times(name: str, curves: dict[str, tuple[Any, Any]]) -> str:
    """Losses against time: label -> (times, losses)."""
    curves = {
        label: pairs
        for label, (times, losses) in curves.items()
        if times and losses
        for pairs in [[p for p in zip(times, losses, strict=False) if p[1] is not None]]
        if pairs
    }
    if not curves:
        return ""
    canvas, axes = figure(*_SIZE)
    for place, (label, pairs) in enumerate(curves.items()):
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, marker="o", markersize=3.5, label=plain(label), **line_style(place))
    axes.set_xlim(0, 1)
    axes.set_xlabel("t")
    if len(curves) > 1:
        _legend(canvas, len(curves))
    return svg(canvas, name, "validation loss against time")


def grid_map(name: str, grid: Any, times: Any, gamma: float = 0.0, before: Any = None) -> str:
    """A heat map over label time t (columns) and input time m (rows), with its numbers.

    Args:
        name: unique on the page.
        grid: rows of values or None.
        times: middles of rows and columns.
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
    if before is None:
        colours = {"cmap": "viridis"}
    else:
        most = float(np.abs(shown).max()) or 1.0
        colours = {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    canvas, axes = figure(5.0, 4.2)
    axes.grid(False)
    edges = np.linspace(0, 1, len(times) + 1)
    mesh = axes.pcolormesh(edges, edges, shown, linewidth=0, **colours)
    for row, m in enumerate(times):
        for column, t in enumerate(times):
            value = cells[row, column]
            if math.isfinite(value):
                r, g, b, _ = mesh.cmap(mesh.norm(value))
                ink = "#101418" if 0.3 * r + 0.59 * g + 0.11 * b > 0.5 else "#f4f6f8"
                text = f"{value:+.0f}" if before is not None else _short(value)
                axes.text(t, m, text, ha="center", va="center", fontsize=7, color=ink)
    for end in {1.0, 1 - gamma}:
        axes.plot([0, 1], [0, end], color="#e8853a", linewidth=1.4, linestyle=":")
    axes.set_aspect("equal")
    axes.set_xlabel("label time t")
    axes.set_ylabel("input time m")
    return svg(canvas, name, "validation loss over label time and input time")


def _short(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 else f"{value:.1g}"


def _ramp(place: int, count: int) -> dict[str, Any]:
    from matplotlib import colormaps

    share = 0.05 + 0.9 * place / max(1, count - 1)
    return {"color": colormaps["cool"](share), "linewidth": 1.5}


def _running_mean(points: Points) -> list[tuple[float, float]]:
    """Each value with its past, the weights falling by half in a hundredth of the curve."""
    keep = 0.5 ** (1 / max(2.0, len(points) / 100))
    mean = weight = 0.0
    out = []
    for step, value in points:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        out.append((step, mean / weight))
    return out


def _logarithmic(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ignore_outliers(axes: Any, values: Sequence[float]) -> None:
    """The first steps of a run must not press the others into a line."""
    ordered = sorted(values)
    high = ordered[int(0.98 * (len(ordered) - 1))]
    low = ordered[0]
    if len(ordered) > 30 and ordered[-1] - low > 2 * (high - low) > 0:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.15 * (high - low))


def _legend(canvas: Any, count: int) -> None:
    canvas.legend(
        loc="outside lower center",
        ncols=min(count, 4),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
