"""The figures of the slow-flow report, as inline SVG in the page's style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mixflow_fast.evaluation.slow_flow import LAG_FROM, Band, MarginalPoint, StepFlow
from mixflow_fast.reports.plots import (
    COLORS,
    FAINT,
    MARKERS,
    figure,
    legend,
    line_style,
    plain,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = 5.0, 3.2


def pair_band(name: str, bands: Mapping[str, Band], steps: int) -> str:
    """E1 against t: median and 5% to 95% of each network.

    Args:
        name: unique on the page.
        bands: by the network's name.
        steps: of the sampler.
    """
    canvas, axes = figure(*_SIZE)
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=":")
    for place, (label, band) in enumerate(bands.items()):
        style = line_style(place)
        axes.fill_between(
            band.t, band.low, band.high, color=style["color"], alpha=0.18, linewidth=0
        )
        mark = "o" if len(band.t) < 15 else None
        axes.plot(band.t, band.median, label=plain(label), marker=mark, markersize=3.5, **style)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("t of the sampler")
    axes.set_ylabel("nearest m")
    if len(bands) > 1:
        legend(canvas, 2)
    return svg(canvas, name, f"Nearest time of a pair against t, {steps} steps")


def lag_curves(name: str, flows: Sequence[StepFlow], bottom: float) -> str:
    """E2: effective time over t, median of the states, from LAG_FROM on.

    Args:
        name: unique on the page.
        flows: of one network.
        bottom: where the axis of values begins.
    """
    canvas, axes = figure(*_SIZE)
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    for place, flow in enumerate(flows):
        points = [
            (t, middle / t, low / t)
            for t, middle, low in zip(
                flow.endpoint.t, flow.endpoint.median, flow.endpoint.low, strict=True
            )
            if t >= LAG_FROM - 1e-6
        ]
        t, middle, low = zip(*points, strict=True)
        style = line_style(place)
        axes.fill_between(t, low, middle, color=style["color"], alpha=0.12, linewidth=0)
        marker = MARKERS[place % len(MARKERS)] if len(t) < 15 else None
        axes.plot(t, middle, label=f"{flow.steps} steps", marker=marker, markersize=4, **style)
    axes.set_xlim(LAG_FROM, 1.01)
    axes.set_ylim(bottom, 1.02)
    axes.set_xlabel("t of the sampler")
    axes.set_ylabel("effective time / t")
    legend(canvas, min(len(flows), 4))
    return svg(canvas, name, "Effective time over t")


def lowest_lag(flows: Sequence[StepFlow]) -> float:
    """The lowest value that `lag_curves` draws."""
    return min(
        low / t
        for flow in flows
        for t, low in zip(flow.endpoint.t, flow.endpoint.low, strict=True)
        if t >= LAG_FROM - 1e-6
    )


def marginal_curves(name: str, flows: Sequence[StepFlow], limits: tuple[float, float]) -> str:
    """E3: m/t over its null with two standard errors, for each number of steps and the fine solve.

    Args:
        name: unique on the page.
        flows: of one network.
        limits: of the axis of values.
    """
    canvas, axes = figure(*_SIZE)
    axes.axhline(1, color=FAINT, linewidth=1, linestyle=":")
    for place, flow in enumerate(flows):
        style = line_style(place)
        marker = MARKERS[place % len(MARKERS)]
        _errors(axes, flow.marginal, f"{flow.steps} steps", marker, style["color"])
    # The times of the most steps are nearest to those of the fine solve.
    most = max(flows, key=lambda flow: flow.steps)
    t, ratio = zip(*((point.t, point.ratio) for point in most.fine), strict=True)
    axes.plot(t, ratio, color=FAINT, linewidth=1.4, linestyle="--", label="fine solve")
    axes.set_ylim(*limits)
    axes.set_xlabel("t of the sampler")
    axes.set_ylabel("m / t over its null")
    legend(canvas, min(len(flows) + 1, 5))
    return svg(canvas, name, "Marginal time over t")


def _errors(
    axes: Axes,
    points: Sequence[MarginalPoint],
    label: str,
    marker: str,
    color: str | tuple[float, float, float, float],
) -> None:
    t, ratio, se = zip(*((point.t, point.ratio, 2 * point.se) for point in points), strict=True)
    axes.errorbar(
        t, ratio, yerr=se, label=label, marker=marker, markersize=4, color=color, linewidth=1.6,
        capsize=2,
    )  # fmt: skip


def marginal_limits(flows: Sequence[StepFlow]) -> tuple[float, float]:
    """Limits that hold every point of `marginal_curves`, so that networks can be compared."""
    points = [point for flow in flows for point in (*flow.marginal, *flow.fine)]
    spread = [2 * point.se if math.isfinite(point.se) else 0.0 for point in points]
    low = min(point.ratio - half for point, half in zip(points, spread, strict=True))
    high = max(point.ratio + half for point, half in zip(points, spread, strict=True))
    return min(low, 0.98) - 0.01, max(high, 1.01) + 0.01


def noise_curves(name: str, flows: Sequence[StepFlow]) -> str:
    """E4: the noise level's time against t, median and 5% to 95%, side by side for each N."""
    canvas, axes = figure(*_SIZE)
    axes.plot([0.3, 1], [0.3, 1], color=FAINT, linewidth=1, linestyle=":")
    width = 0.016
    for place, flow in enumerate(flows):
        band, color = flow.noise, COLORS[place % len(COLORS)]
        at = [t + width * (place - (len(flows) - 1) / 2) for t in band.t]
        down = [middle - low for middle, low in zip(band.median, band.low, strict=True)]
        up = [high - middle for middle, high in zip(band.median, band.high, strict=True)]
        axes.errorbar(
            at, band.median, yerr=[down, up], fmt=MARKERS[place % len(MARKERS)], markersize=4,
            color=color, linewidth=1, capsize=2, label=f"{flow.steps} steps",
        )  # fmt: skip
    axes.set_xlabel("t of the sampler")
    axes.set_ylabel("m by the noise")
    legend(canvas, min(len(flows), 4))
    return svg(canvas, name, "Time by the noise level against t")
