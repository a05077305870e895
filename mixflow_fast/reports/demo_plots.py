"""The demo's plots as inline SVG: distance against sampling steps, training loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mixflow_fast.reports.demo_result import METRICS, DemoResult, Metric, cell_value
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


def _legend_height(result: DemoResult, columns: int) -> float:
    return 0.2 * -(-(len(result["arms"]) + 1) // columns)


def _legend(canvas: Figure, axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        legend(canvas, columns)


def distance_plot(result: DemoResult, metric: Metric) -> str:
    """Distance of every arm against the number of steps, with the floor of real crops."""
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


def loss_plot(result: DemoResult) -> str:
    """Training loss of every arm that was trained."""
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
