"""A chart for each op from the rows of one file, with the conditions under it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as rows_file
from benchmarks.rows import Row

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
    "mixflow_fast": ("#009E73", "o"),
    "mixflow_fast_adamwema": ("#000000", "o"),
    "mixflow_fast_recompute": ("#F0E442", "o"),
}
OURS = "mixflow_fast"


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
        if not any(row["metric"] == "latency_ms" for row in measured):
            continue
        with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            made.append(_chart(op, measured, out / f"{op}.png"))
    return made


def _cells(measured: Sequence[Row]) -> list[tuple[Any, ...]]:
    """The cells in the order measured; arms of the step differ in dtype only."""
    keys = [_cell(row) for row in measured if row["metric"] == "latency_ms"]
    return list(dict.fromkeys(keys))


def _cell(row: Row) -> tuple[Any, ...]:
    dtype = "" if row["op"] == "step" else row["dtype"]
    return row["mode"], row["variant"] or "", tuple(row["shape"]), dtype


def _name(cell: tuple[Any, ...], graphs: set[tuple[Any, ...]]) -> str:
    mode, variant, shape, dtype = cell
    first = "x".join(map(str, shape)) + (" *" if cell in graphs else "")
    second = [variant] if mode == "step" else [mode, variant, dtype]
    return f"{first}\n{', '.join(part for part in second if part)}"


def _graphs(measured: Sequence[Row]) -> set[tuple[Any, ...]]:
    """The cells that were timed as CUDA graphs; a * marks them."""
    return {_cell(row) for row in measured if (row["timing"] or "").startswith("CUDA graph")}


def _chart(op: str, measured: Sequence[Row], path: Path) -> Path:
    from matplotlib.figure import Figure

    cells, graphs = _cells(measured), _graphs(measured)
    providers = [p for p in STYLES if any(row["provider"] == p for row in measured)]
    others = [p for p in providers if p != OURS]
    on_gpu = any(row["metric"] in ("percent_of_copy", "percent_of_989") for row in measured)
    rate = "images_per_s" if op == "step" else "percent_of_copy"
    panels = 2 + (on_gpu or op == "step")
    width = 3.6 * panels + 2.2
    caption = _conditions(measured, int(width * 15))
    # Inches: text below the axes, the axes, title and legend above them.
    below, above = 0.14 * (caption.count("\n") + 1) + 0.65, 0.75
    height = below + above + 0.45 * len(cells) * max(1.0, len(providers) / 3)
    figure = Figure(figsize=(width, height), dpi=130)
    axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(
        left=2.1 / width, right=0.985, bottom=below / height, top=1 - above / height, wspace=0.08
    )
    metrics = ["latency_ms", rate] if panels == 3 else ["latency_ms"]
    for panel, metric in zip(axes, metrics, strict=False):
        _points(panel, measured, cells, providers, metric)
    _speedups(axes[-1], measured, cells, others)
    if op == "step":
        axes[0].set_xlabel("time per step, ms")
        axes[0].set_xlim(left=0)
    else:
        axes[0].set_xscale("log")
        axes[0].xaxis.set_major_formatter(_plain_number)
        axes[0].xaxis.set_minor_formatter(_sparse_number)
        axes[0].set_xlabel("time per call, ms (log scale)")
    if panels == 3:
        label = "images per second" if op == "step" else "algorithmic bytes, % of copy bandwidth"
        axes[1].set_xlabel(label)
        axes[1].set_xlim(left=0)
    axes[0].set_yticks(range(len(cells)), [_name(cell, graphs) for cell in cells])
    axes[0].set_ylim(len(cells) - 0.4, -0.6)
    for panel in axes:
        panel.grid(axis="x", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        for line in range(1, len(cells)):
            panel.axhline(line - 0.5, color="#eeeeee", linewidth=0.8)
    handles, labels = axes[0].get_legend_handles_labels()
    top = 1 - 0.08 / height
    figure.text(0.1 / width, top, _title(op, measured), va="top", fontsize=11, weight="bold")
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(0, 1 - 0.25 / height),
        ncols=len(labels),
        frameon=False,
    )
    small = dict(va="bottom", fontsize=7.5, color="#444444")
    figure.text(0.1 / width, 0.06 / height, caption, **small)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _points(
    panel: Any, measured: Sequence[Row], cells: list, providers: list[str], metric: str
) -> None:
    """p50 of each provider with a bar from p20 to p80."""
    for place, provider in enumerate(providers):
        chosen = [r for r in measured if r["provider"] == provider and r["metric"] == metric]
        y = [cells.index(_cell(r)) + _offset(place, len(providers)) for r in chosen]
        x = [r["p50"] for r in chosen]
        spread = [
            [max(0.0, r["p50"] - r["p20"]) for r in chosen],
            [max(0.0, r["p80"] - r["p50"]) for r in chosen],
        ]
        color, marker = STYLES[provider]
        panel.errorbar(
            x, y, xerr=spread, fmt=marker, color=color, markersize=5, capsize=2, label=provider
        )


def _speedups(panel: Any, measured: Sequence[Row], cells: list, others: list[str]) -> None:
    """Ours against each other provider: paired ratio and 95% interval, in the other's colour."""
    for place, provider in enumerate(others):
        metric = f"speedup_over_{provider}"
        chosen = [r for r in measured if r["provider"] == OURS and r["metric"] == metric]
        y = [cells.index(_cell(r)) + _offset(place, len(others)) for r in chosen]
        color, marker = STYLES[provider]
        spread = [
            [max(0.0, r["p50"] - r["low95"]) for r in chosen],
            [max(0.0, r["high95"] - r["p50"]) for r in chosen],
        ]
        x = [r["p50"] for r in chosen]
        panel.errorbar(x, y, xerr=spread, fmt=marker, color=color, markersize=5, capsize=2)
        for row, height in zip(chosen, y, strict=True):
            text = f" {row['p50']:.2f}x"
            panel.annotate(
                text, (row["high95"], height), va="center", fontsize=7.5, color=color, clip_on=False
            )
    panel.axvline(1.0, color="#222222", linewidth=1)
    metrics = {f"speedup_over_{provider}" for provider in others}
    shown = [r for r in measured if r["provider"] == OURS and r["metric"] in metrics]
    highest = [r["high95"] for r in shown]
    panel.set_xlim(0, 1.2 * max([1.0, *highest]))
    panel.set_xlabel("mixflow_fast, times faster (paired, 95% interval)")


def _offset(place: int, count: int) -> float:
    return 0.0 if count == 1 else 0.5 * (place / (count - 1) - 0.5)


def _plain_number(value: float, _: int) -> str:
    return f"{value:g}"


def _sparse_number(value: float, _: int) -> str:
    """Minor ticks of a log axis at 2 and 5 only."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _title(op: str, measured: Sequence[Row]) -> str:
    smoke = any(row["note"].startswith("smoke") for row in measured)
    return op + (" (smoke run at toy sizes: not a speed)" if smoke else "")


def _conditions(measured: Sequence[Row], columns: int) -> str:
    """What stands under the chart: where, with what, how, and how each provider was set up."""
    first = measured[-1]
    shas = sorted({row["git_sha"][:12] + row["git_sha"][40:] for row in measured})
    timings = {row["timing"] for row in measured if row["metric"] == "latency_ms"}
    lines = [
        f"{first['device']}; torch {first['torch']}, triton {first['triton']}, "
        f"CUDA {first['cuda'] or 'none'}; commit {', '.join(shas)}; {first['timestamp']}",
        "Points: median; bars: p20 to p80. "
        + "; ".join(sorted(("* " if t.startswith("CUDA graph") else "") + t for t in timings)),
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
