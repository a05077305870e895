"""The figures of a comparison, as inline SVG in the page's style."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mixflow_fast.evaluation.paired import ClassStrip
from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.reports.plots import (
    COLORS,
    FAINT,
    MARKERS,
    figure,
    legend,
    line_style,
    logarithmic_values,
    plain,
    svg,
)

_SIZE = 5.0, 3.3
_ASIDE = 1.02


def nfe_curves(
    name: str,
    curves: Mapping[str, Sequence[tuple[int, Estimate]]],
    places: Sequence[int],
    label: str,
) -> str:
    """A number without its bias, with its 95% interval, against network evaluations.

    Args:
        name: unique on the page.
        curves: by label: (evaluations, estimate), by evaluations.
        places: the style of each curve, so that an arm has one on all of them.
        label: of the axis of values.
    """
    canvas, axes = figure(*_SIZE)
    intervals = {key: [found.interval() for _, found in points] for key, points in curves.items()}
    for number, ((key, points), place) in enumerate(zip(curves.items(), places, strict=True)):
        # A little aside, so that intervals at one number of evaluations do not hide each other.
        aside = _ASIDE ** (number - (len(curves) - 1) / 2)
        nfe, values = [each * aside for each, _ in points], [found.corrected for _, found in points]
        ends = zip(intervals[key], values, strict=True)
        errors = [(value - low, high - value) for (low, high), value in ends]
        axes.errorbar(
            nfe,
            values,
            yerr=list(zip(*errors, strict=True)),
            capsize=3,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            label=plain(key),
            **line_style(place),
        )
    every = sorted({nfe for points in curves.values() for nfe, _ in points})
    axes.set_xscale("log")
    axes.set_xticks(every, [str(nfe) for nfe in every])
    axes.minorticks_off()
    lows = [low for each in intervals.values() for low, _ in each]
    highs = [high for each in intervals.values() for _, high in each]
    if min(lows) > 0 and max(highs) / min(lows) > 4:
        logarithmic_values(axes)
    axes.set_xlabel("network evaluations of a sample (NFE)")
    axes.set_ylabel(label)
    if len(curves) > 1:
        legend(canvas, 2)
    return svg(canvas, name, f"{label} against network evaluations")


def strip_plot(name: str, strip: ClassStrip) -> str:
    """All classes sorted by their difference, and the band that sorted chance would lie in.

    Args:
        name: unique on the page.
        strip: of one pair of arms at one number of steps.
    """
    canvas, axes = figure(*_SIZE)
    count = len(strip.values)
    x = list(range(1, count + 1))
    axes.axhline(0, color=FAINT, linewidth=1, linestyle=":")
    axes.fill_between(
        x, strip.null_low, strip.null_high, color=FAINT, alpha=0.25, linewidth=0,
        label="classes that do not differ, 95%",
    )  # fmt: skip
    axes.plot(
        [1, count], [strip.expected_lowest, strip.expected_highest], marker="_", markersize=14,
        markeredgewidth=2, linestyle="", color=COLORS[1], label="their expected extremes",
    )  # fmt: skip
    size = 5 if count < 60 else 2
    axes.plot(x, strip.values, "o", markersize=size, color=COLORS[0], label="classes")
    axes.set_xlim(0.5, count + 0.5)
    if count <= 12:
        axes.set_xticks(x, [str(label) for label in strip.classes])
    axes.set_xlabel("class" if count <= 12 else "classes, sorted")
    axes.set_ylabel("from the average")
    legend(canvas, 2)
    return svg(canvas, name, "Differences of all classes, sorted")
