"""One page of all that a folder of results holds: `python -m benchmarks.page FOLDER`.

FOLDER/page.html: conditions, first contact, correctness, then kernels, training step, sampling and
loaders, each drawn against eager, compile and the roofline. It loads nothing from elsewhere. What a
folder does not hold is said to be not measured.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import plots, rows
from benchmarks.ops import OPS
from benchmarks.rows import Row
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.files import write_text
from mixflow_fast.reports.html import number, page, picture

PAGE = "page.html"
SAMPLING, LOADER, STEP = "sampling", "loader", "step"
NOT_MEASURED = '<p class="note">not measured</p>'
STYLE = "body{max-width:90rem}figure img{width:100%;height:auto}"


def make(folder: Path, drawn: Path) -> str:
    """The page of a folder; pictures are drawn into another."""
    path = folder / "rows.jsonl"
    found = rows.latest(rows.read(path)) if path.exists() else []
    pictures = {file.stem: file for file in plots.draw(path, drawn, (*OPS, SAMPLING))}
    smoke = any(row["note"].startswith("smoke") for row in found)
    kernels = [row for row in found if row["op"] in OPS and row["op"] != STEP]
    parts = [
        "<p><b>A smoke run at toy sizes: no number here is a speed.</b></p>" if smoke else "",
        _conditions(folder, found),
        "<h2>First contact</h2>" + _first_contact(found),
        "<h2>Correctness</h2>" + _correctness(folder),
        "<h2>Kernels</h2>"
        + _pictures(pictures, (op for op in OPS if op != STEP))
        + _cells(kernels, "latency_ms", roofline=True),
        "<h2>Training step</h2>"
        + _pictures(pictures, [STEP])
        + _cells([row for row in found if row["op"] == STEP], "images_per_s"),
        "<h2>Sampling</h2>"
        + _pictures(pictures, [SAMPLING])
        + _cells([row for row in found if row["op"] == SAMPLING], "samples_per_s"),
        "<h2>Loaders</h2>"
        + _cells([row for row in found if row["op"] == LOADER], "examples_per_s"),
    ]
    return page("Measured on a device", "\n".join(parts), STYLE)


def _conditions(folder: Path, found: Sequence[Row]) -> str:
    if not found:
        return NOT_MEASURED
    last = found[-1]
    said = [
        f"{last['device']}; torch {last['torch']}, triton {last['triton']}, CUDA "
        f"{last['cuda'] or 'none'}; commit {last['git_sha']}; {last['timestamp']}"
    ]
    try:
        kept = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no part that keeps it has run, or it was cut off by a kill
        kept = {}
    for suite, state in kept.items():
        said.append(f"{suite}: before {state['before']}; after {state['after'] or 'not reached'}")
    return "".join(f'<p class="meta">{html.escape(line)}</p>' for line in said)


def _first_contact(found: Sequence[Row]) -> str:
    metrics = ("gb_per_s", "model_tflops", "max_abs_error", "nan_results", "positive_results",
               "first_call_ms")  # fmt: skip
    of_device = [
        row
        for row in found
        if row["metric"] in metrics
        and (row["op"] in ("copy", "matmul") or row["metric"] not in metrics[:2])
    ]
    lines = [
        (_name(row), row["metric"], _number(row["p50"]), row["note"].partition("; ")[0])
        for row in of_device
    ]
    return _table(("", "", "", ""), lines) if lines else NOT_MEASURED


def _correctness(folder: Path) -> str:
    lines = []
    for path in sorted(folder.glob("correctness*.jsonl")):
        findings = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        failed = [f for f in findings if not f["passed"]]
        names = ", ".join(sorted({f"{f['op']}: {f['check']} {f['tensor']}" for f in failed}))
        lines.append((path.stem, str(len(findings)), str(len(failed)), names))
    head = ("", "checks", "failed", "which")
    return _table(head, lines) if lines else NOT_MEASURED


def _pictures(drawn: dict[str, Path], ops: Iterable[str]) -> str:
    return "".join(picture(drawn[op], op) for op in ops if op in drawn)


def _cells(found: Sequence[Row], metric: str, roofline: bool = False) -> str:
    """A line a cell: the metric of each provider, and how many times faster ours is."""
    of_cell: dict[tuple[str, ...], dict[tuple[str, str], Row]] = {}
    for row in found:
        key = (row["op"], row["mode"], row["variant"] or "", str(row["shape"]), row["dtype"])
        of_cell.setdefault(key, {})[row["provider"], row["metric"]] = row
    shown = [row for row in found if row["metric"] == metric]
    if not shown:
        return NOT_MEASURED
    providers = list(dict.fromkeys(row["provider"] for row in shown))
    head = ("cell", *(["roofline ms"] if roofline else []), *providers, "times faster [95%]")
    lines = []
    for key, cell in of_cell.items():
        if not any((name, metric) in cell for name in providers):
            continue
        values = [_number(_p50(cell, name, metric)) for name in providers]
        bound = [_number(_roofline_ms(cell))] if roofline else []
        lines.append((", ".join(filter(None, key)), *bound, *values, _ratios(cell)))
    text = f"{metric}, medians. The roofline is the bytes that nobody can avoid over the copy rate."
    return f'<p class="note">{text if roofline else metric + ", medians"}</p>' + _table(head, lines)


def _p50(cell: dict[tuple[str, str], Row], provider: str, metric: str) -> float | None:
    row = cell.get((provider, metric))
    return None if row is None else row["p50"]


def _roofline_ms(cell: dict[tuple[str, str], Row]) -> float | None:
    """What ours would take at the rate of a copy."""
    latency = _p50(cell, "mixflow_fast", "latency_ms")
    percent = _p50(cell, "mixflow_fast", "percent_of_copy")
    return None if latency is None or percent is None else latency * percent / 100


def _ratios(cell: dict[tuple[str, str], Row]) -> str:
    found = []
    for (provider, metric), row in cell.items():
        if metric.startswith("speedup_over_") and row["p50"] is not None:
            over = metric.removeprefix("speedup_over_")
            interval = f"{row['p50']:.2f} [{row['low95']:.2f}, {row['high95']:.2f}]"
            found.append(f"{provider} over {over} {interval}")
    return "; ".join(found)


def _name(row: Row) -> str:
    words = (row["op"], row["mode"], row["variant"], "x".join(map(str, row["shape"])), row["dtype"])
    return " ".join(word for word in words if word)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    heading = f"<thead><tr>{cells('th', head)}</tr></thead>" if any(head) else ""
    return f'<div class="wide"><table>{heading}<tbody>{body}</tbody></table></div>'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="of the pictures")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as drawn:
        text = make(options.folder, options.plots or Path(drawn))
    write_text(options.folder / PAGE, text)
    print(f"page: {options.folder / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(quiet_without_reader(main))
