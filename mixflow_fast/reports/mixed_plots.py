"""Plots of learned sources as inline SVG: curvature of paths, and paths in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping

from mixflow_fast.reports.demo_result import ArmResult, Number, Toy, ToyArm, mean_and_spread
from mixflow_fast.reports.plots import COLORS, FAINT, INK, figure, plain, svg

_LABEL_WIDTH = 26  # characters of a bar's name in one line


def curvature_bars(name: str, bars: Mapping[str, tuple[Number, float]]) -> str:
    """A bar of each arm's curvature.

    Args:
        name: unique on the page.
        bars: label -> curvature, and its standard error, which is shown where no spread is known.
    """
    canvas, axes = figure(6.4, 0.6 + 0.42 * len(bars))
    for place, (value, se) in enumerate(bars.values()):
        mean, std = mean_and_spread(value)
        spread = se if std is None else std
        color = COLORS[place % len(COLORS)]
        axes.barh(place, mean, xerr=spread, color=color, height=0.62, capsize=3, ecolor=FAINT)
        axes.text(mean + spread, place, f"  {mean:.3g}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(bars)), [_in_lines(plain(label)) for label in bars], fontsize=8)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("curvature of the paths, 0 is straight at constant speed")
    axes.margins(x=0.12)
    return svg(canvas, name, "curvature of each arm's paths")


def _in_lines(label: str) -> str:
    """A bar's name in lines that leave room for the bar."""
    lines = [""]
    for word in label.split():
        if lines[-1] and len(lines[-1]) + len(word) >= _LABEL_WIDTH:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def bars_of(arms: Mapping[str, ArmResult]) -> dict[str, tuple[Number, float]]:
    """The bars of the arms whose curvature was measured."""
    return {
        arm["label"]: (arm["source"]["curvature"], arm["source"]["curvature_se"])
        for arm in arms.values()
        if "source" in arm
    }


def path_plot(name: str, toy: Toy, arm: ToyArm) -> str:
    """The paths of one arm from noise to samples, over real points.

    Args:
        name: unique on the page.
    """
    canvas, axes = figure(3.2, 3.2)
    axes.grid(False)
    x, y = zip(*toy["points"], strict=True)
    axes.plot(x, y, ".", color=FAINT, markersize=2.5, alpha=0.45, zorder=1)
    for path in arm["paths"]:
        x, y = zip(*path, strict=True)
        axes.plot(x, y, color=COLORS[0], linewidth=0.8, alpha=0.7, zorder=2)
        axes.plot(x[0], y[0], "o", color=INK, markersize=2, zorder=3)
        axes.plot(x[-1], y[-1], "o", color=COLORS[1], markersize=2.6, zorder=3)
    axes.set_aspect("equal")
    axes.set_xlim(-3.2, 3.2)
    axes.set_ylim(-3.2, 3.2)
    axes.set_xticks([-2, 0, 2])
    axes.set_yticks([-2, 0, 2])
    return svg(canvas, name, f"paths of {arm['label']}")
