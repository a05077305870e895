"""A chart for each op from the rows of one file, with the conditions under it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks import rows as rows_file
from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinguishable with any colour vision (Okabe and Ito), and by their markers.
STYLES = {
    "eager": ("#E69F00", "s"),
    "eager_tf32": ("#CC79A7", "v"),
    "eager_bf16": ("#E69F00", "s"),
    "eager_tuned": ("#D55E00", "s"),
    "compile_unpadded": ("#56B4E9", "D"),
    "compile": ("#0072B2", "D"),
    "liger": ("#CC79A7", "^"),
    "flash3": ("#56B4E9", "<"),
    "flash2": ("#56B4E9", ">"),
    "cudnn": ("#D55E00", "<"),
    "flash": ("#D55E00", ">"),
    "efficient": ("#7F7F7F", "P"),
    "fused_flash": ("#56B4E9", "P"),
    "fused": ("#7F7F7F", "X"),
    "official": ("#E69F00", "s"),
    "mixflow_fast": ("#009E73", "o"),
    "mixflow_fast_compile": ("#0072B2", "D"),
    "mixflow_fast_graph": ("#CC79A7", "^"),
    "mixflow_fast_adamwema": ("#000000", "o"),
    "mixflow_fast_recompute": ("#F0E442", "o"),
}
OURS = "mixflow_fast"
# What an op's second panel shows, if not its share of the copy rate; and its label.
RATES = {
    "step": ("images_per_s", "images per second"),
    "sampling": ("samples_per_s", "samples per second"),
}
COPY = ("percent_of_copy", "algorithmic bytes, % of copy bandwidth")
CONTEXT = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


class Line(NamedTuple):
    """A line of the chart; arms of the step differ in dtype only, and stand on one."""

    mode: str
    variant: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The shape, and below it what else there is."""
        parts = [self.variant] if self.mode == "step" else [self.mode, self.variant, self.dtype]
        return "x".join(map(str, self.shape)) + "\n" + ", ".join(part for part in parts if part)


def _line(row: Row) -> Line:
    dtype = "" if row["op"] == "step" else row["dtype"]
    return Line(row["mode"], row["variant"] or "", tuple(row["shape"]), dtype)


def _is_graph(timing: str | None) -> bool:
    return (timing or "").startswith("CUDA graph")


def draw(path: Path, out: Path, ops: Iterable[str]) -> list[Path]:
    """OUT/<op>.png for each op that has times in the file; nothing without matplotlib.

    Where a number was measured more than once, the last one counts.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        print('no plots: matplotlib is not installed (pip install "mixflow_fast[eval]")')
        return []
    found = rows_file.latest(rows_file.read(path)) if path.exists() else []
    made = []
    for op in ops:
        measured = [row for row in found if row["op"] == op and row["p50"] is not None]
        shown = [row for row in measured if row["provider"] in STYLES]
        if any(row["metric"] == "latency_ms" for row in shown):
            with rc_context(CONTEXT):
                made.append(_chart(op, shown, out / f"{op}.png"))
    return made


def _chart(op: str, measured: Sequence[Row], path: Path) -> Path:
    from matplotlib.figure import Figure

    lines = list(dict.fromkeys(_line(row) for row in measured if row["metric"] == "latency_ms"))
    providers = [p for p in STYLES if any(row["provider"] == p for row in measured)]
    rate = RATES.get(op, COPY)[0]
    has_rate = any(row["metric"] == rate for row in measured)
    width = 3.6 * (2 + has_rate) + 2.2
    caption = _conditions(measured, int(width * 15))
    # Inches: the text below the axes, and title and legend above them.
    below, above = 0.14 * (caption.count("\n") + 1) + 0.15, 1.25
    height = below + above + 0.45 * len(lines) * max(1.0, len(providers) / 3)
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    figure.get_layout_engine().set(rect=(0, below / height, 1, 1 - below / height))
    times, *rates, ratios = figure.subplots(1, 2 + has_rate, sharey=True)
    for place, provider in enumerate(providers):
        offset = _offset(place, len(providers))
        for panel, metric in zip((times, *rates), ("latency_ms", rate), strict=False):
            chosen = [r for r in measured if r["provider"] == provider and r["metric"] == metric]
            _points(panel, chosen, lines, offset, provider, "p20", "p80")
    for panel in rates:
        _rooflines(panel, measured, lines, rate)
    _speedups(ratios, measured, lines, [p for p in providers if p != OURS])
    _label(op, times, rates)
    graphs = {_line(row) for row in measured if _is_graph(row["timing"])}
    names = [line.name.replace("\n", " *\n") if line in graphs else line.name for line in lines]
    times.set_yticks(range(len(lines)), names)
    times.set_ylim(len(lines) - 0.4, -0.6)
    for panel in (times, *rates, ratios):
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        for place in range(1, len(lines)):
            panel.axhline(place - 0.5, color="#eeeeee", linewidth=0.8)
    handles, labels = times.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    smoke = any(row["note"].startswith("smoke") for row in measured)
    title = op + (" (smoke run at toy sizes: not a speed)" if smoke else "")
    legend.set(title=title, alignment="left", frame_on=False)
    legend.get_title().set(fontsize=11, weight="bold")
    place = 0.1 / width, 0.06 / height
    figure.text(*place, caption, va="bottom", fontsize=7.5, color="#444444")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _label(op: str, times: Axes, rates: Sequence[Axes]) -> None:
    """Axes of the times and, where there are rates, of those."""
    if op == "step":
        times.set_xlabel("time per step, ms")
        times.set_xlim(left=0)
    else:
        times.set_xscale("log")
        times.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        # Minor ticks of a log axis at 2 and 5 only.
        times.xaxis.set_minor_formatter(
            lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""
        )
        times.set_xlabel("time per call, ms (log scale)")
    for panel in rates:
        panel.set_xlabel(RATES.get(op, COPY)[1] + "; dotted: the roofline")
        panel.set_xlim(left=0)


def _rooflines(panel: Axes, measured: Sequence[Row], lines: Sequence[Line], rate: str) -> None:
    """The rate of a copy, or of a network that is nothing but products at the measured rate."""
    for place, line in enumerate(lines):
        of_line = [row for row in measured if _line(row) == line]
        reached = {row["provider"]: row["p50"] for row in of_line if row["metric"] == rate}
        shares = {
            row["provider"]: row["p50"] for row in of_line if row["metric"] == "percent_of_matmul"
        }
        bounds = [100 * reached[name] / share for name, share in shares.items() if name in reached]
        if rate == COPY[0] and reached:
            bounds = [100.0]
        for bound in bounds[:1]:
            panel.plot(2 * [bound], [place - 0.45, place + 0.45], color="#222222", ls=":")


def _points(
    panel: Axes, rows: Sequence[Row], lines: Sequence[Line], at: float, provider: str, *ends: str
) -> None:
    """p50 of each row with a bar between the two ends; `at`: below its line."""
    color, marker = STYLES[provider]
    places = [lines.index(_line(row)) + at for row in rows]
    bars = [[abs(row["p50"] - row[end]) for row in rows] for end in ends]
    style = dict(fmt=marker, color=color, markersize=5, capsize=2, label=provider)
    panel.errorbar([row["p50"] for row in rows], places, xerr=bars, **style)


def _speedups(
    panel: Axes, measured: Sequence[Row], lines: Sequence[Line], others: Sequence[str]
) -> None:
    """Ours against each other provider: paired ratio and 95% interval, in the other's colour."""
    highest = 1.0
    for place, provider in enumerate(others):
        metric, offset = f"speedup_over_{provider}", _offset(place, len(others))
        # Of ours over this provider, or of a mode of ours over the official loop.
        wanted = ((OURS, metric), (provider, "speedup_over_official"))
        chosen = [r for r in measured if (r["provider"], r["metric"]) in wanted]
        _points(panel, chosen, lines, offset, provider, "low95", "high95")
        for row in chosen:
            highest = max(highest, row["high95"])
            at, style = (row["high95"], lines.index(_line(row)) + offset), STYLES[provider]
            text = panel.annotate(f" {row['p50']:.2f}x", at, va="center", fontsize=7.5)
            text.set(color=style[0], clip_on=False)
    panel.axvline(1.0, color="#222222", linewidth=1)
    panel.set_xlim(0, 1.2 * highest)
    panel.set_xlabel("mixflow_fast, times faster (paired, 95% interval)")


def _offset(place: int, count: int) -> float:
    return 0.0 if count == 1 else 0.5 * (place / (count - 1) - 0.5)


def _conditions(measured: Sequence[Row], columns: int) -> str:
    """What stands under the chart: where, with what, how, and how each provider was set up."""
    first = measured[-1]
    shas = sorted({row["git_sha"][:12] + row["git_sha"][40:] for row in measured})
    timings = {row["timing"] for row in measured if row["metric"] == "latency_ms"}
    lines = [
        f"{first['device']}; torch {first['torch']}, triton {first['triton']}, "
        f"CUDA {first['cuda'] or 'none'}; commit {', '.join(shas)}; {first['timestamp']}",
        "Points: median; bars: p20 to p80. "
        + "; ".join(sorted(("* " if _is_graph(t) else "") + t for t in timings)),
    ]
    for provider in STYLES:
        notes = {
            row["note"].partition(", chosen at")[0]
            for row in measured
            if row["provider"] == provider and row["metric"] == "latency_ms"
        }
        if notes:
            lines.append(f"{provider}: {' | '.join(sorted(notes))}")
    return "\n".join(part for line in lines for part in textwrap.wrap(line, columns))
