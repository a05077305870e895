"""`mixflow-fast report RUN`: a run's folder as one HTML page that loads nothing.

It reads what the run wrote and nothing else, so it works beside a run that is going on, on one that
was interrupted, and on a copy of the folder on another machine.
"""

from __future__ import annotations

import html
import json
import time
from collections.abc import Sequence
from pathlib import Path

from mixflow_fast.config.loading import flatten
from mixflow_fast.config.schema import Config
from mixflow_fast.files import check_writable, write_text
from mixflow_fast.messages import duration
from mixflow_fast.metrics.rows import TrainingRow, ValidationRow
from mixflow_fast.reports.html import number, page, picture
from mixflow_fast.reports.plots import grid_map, loss_over_times, plot
from mixflow_fast.reports.previews import PreviewOptions
from mixflow_fast.reports.run_history import Run, read_recipe, read_run
from mixflow_fast.reports.text_previews import read_settings

MOST_PREVIEWS = 12
_STYLE = """
.tiles{display:grid;gap:.7rem;
grid-template-columns:repeat(auto-fit,minmax(9.3rem,1fr));margin:1rem 0}
.tiles div{background:var(--soft);border-radius:8px;padding:.6rem .8rem}
.tiles span{display:block;color:var(--faint);font-size:.8rem}
.tiles b{font-size:1.05rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.bar{height:.5rem;border-radius:4px;background:var(--soft);overflow:hidden;margin:.6rem 0}
.bar i{display:block;height:100%;background:#3b82f6}
.text{text-align:left;white-space:normal}
"""


def write_run_report(out: Path, path: Path | None = None, force: bool = False) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        out: run folder.
        path: the HTML file; None: report.html in the folder, which is renewed.
        force: replace another file, too.

    Returns:
        the file.

    Raises:
        ValueError: no run folder, a file in the way at `path`, or matplotlib is not installed.
    """
    own = out / "report.html"
    path = own if path is None else path
    check_writable(path, force or path.resolve() == own.resolve())
    write_text(path, render(read_run(out)))
    return path


def render(run: Run) -> str:
    """The page."""
    written = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    sections = [
        _summary(run),
        _curves(run),
        _validation(run),
        _previews(run),
        _throughput(run),
        _configuration(run),
        _environment(run),
    ]
    body = f'<p class="meta">Report of {written} on {html.escape(str(run.out))}</p>\n' + "".join(
        sections
    )
    return page(run.out.resolve().name, body, _STYLE)


def _summary(run: Run) -> str:
    """Where the run stands: tiles with a number each, the share that is done, notes."""
    total = run.config.steps if run.config else None
    tiles = "".join(
        f"<div><span>{html.escape(name)}</span><b>{html.escape(value)}</b></div>"
        for name, value in _tiles(run, total)
    )
    done = min(100.0, 100 * run.step / total) if total else 0
    bar = f'<div class="bar"><i style="width:{done:.1f}%"></i></div>' if total else ""
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in _notes(run))
    return f'<div class="tiles">{tiles}</div>{bar}{notes}'


def _tiles(run: Run, total: int | None) -> list[tuple[str, str]]:
    recent = run.training[-20:]  # enough to average a noisy loss, few enough to be of now
    tiles: list[tuple[str, str]] = [("status", run.status)]
    tiles.append(("step", f"{run.step:,}" + (f" of {total:,}" if total else "")))
    images = run.training[-1].get("images_seen") if run.training else None
    if images is not None:
        tiles.append(("images seen", f"{images:,}"))
    if losses := _values(recent, "loss"):
        words = "training loss" if len(losses) < 2 else f"loss, last {len(losses)} rows"
        tiles.append((words, number(sum(losses) / len(losses))))
    if run.validation:
        ema = run.validation[-1].get("ema", {}).get("loss")
        if ema is not None:
            tiles.append(("validation loss, EMA", number(ema)))
    rates = _values(recent, "images_per_s")
    if rates:
        tiles.append(("images/s", number(sum(rates) / len(rates))))
    if seconds := _values(run.training, "seconds"):
        tiles.append(("time in training", duration(sum(seconds))))
        if run.active and run.config and total and rates:
            batch = run.config.train.global_batch_size
            left = (total - run.step) * batch / (sum(rates) / len(rates))
            tiles.append(("to go, at this rate", duration(left)))
    return tiles


def _notes(run: Run) -> list[str]:
    if not run.training:
        return [
            "No training row has been written yet: the first comes after train.log_every steps."
        ]
    notes = []
    if run.status == "interrupted":
        notes.append("The run did not reach its end. The same command resumes it.")
    last = run.training[-1]
    counts = {"skipped": last.get("skipped"), "rollbacks": last.get("rollbacks")}
    for name, count in counts.items():
        if count:
            notes.append(f"{name} so far, for a loss or gradient not finite: {count}")
    return notes


def _curve(
    rows: Sequence[TrainingRow | ValidationRow], *keys: str | int
) -> list[tuple[float, float]]:
    """(step, value) of the rows that have a number under the keys, one key a level."""
    points: list[tuple[float, float]] = []
    for row in rows:
        value: object = row
        for key in keys:
            value = _inside(value, key)
        if isinstance(value, (int, float)):
            points.append((row["step"], value))
    return points


def _inside(value: object, key: str | int) -> object:
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, list) and isinstance(key, int) and key < len(value):
        return value[key]
    return None


def _values(rows: Sequence[TrainingRow], key: str) -> list[float]:
    return [value for _, value in _curve(rows, key)]


def _resumed(run: Run) -> list[int]:
    return sorted({row["step"] for row in run.starts if row["step"]})


def _section(title: str, plots: Sequence[tuple[str, str]], note: str = "") -> str:
    figures = "".join(
        f"<figure><figcaption>{html.escape(words)}</figcaption>{drawing}</figure>"
        for words, drawing in plots
        if drawing
    )
    if not figures:
        return ""
    note = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f'<h2>{html.escape(title)}</h2>{note}<div class="plots">{figures}</div>'


def _curves(run: Run) -> str:
    rows, marks = run.training, _resumed(run)
    parts = max((len(row.get("loss_by_t") or ()) for row in rows), default=0)
    by_t = {
        f"{i / parts:g}–{(i + 1) / parts:g}": _curve(rows, "loss_by_t", i) for i in range(parts)
    }
    return _section(
        "Training",
        [
            ("Loss", plot("loss", {"loss": _curve(rows, "loss")}, marks, smooth=True)),
            (_by_time(run), plot("loss-by-t", by_t, marks, ramp=True, smooth=True)),
            ("Alignment term", plot("alignment", {"": _curve(rows, "alignment")}, marks)),
            (
                "Gradient norm, before clipping",
                plot("norm", {"": _curve(rows, "grad_norm")}, marks, log=True),
            ),
            ("Learning rate", plot("lr", {"": _curve(rows, "lr")}, marks, zero=True)),
        ],
        "Against optimizer steps." + (" Dotted lines: the run was resumed." if marks else ""),
    )


def _by_time(run: Run) -> str:
    ends = {"data_at_1": ": 0 is noise, 1 is data", "noise_at_1": ": 0 is data, 1 is noise"}
    clock = run.starts[-1].get("clock") if run.starts else None
    return f"Loss by label time, network's clock{ends.get(clock or '', '')}"


def _validation(run: Run) -> str:
    rows = run.validation
    if not rows:
        return ""
    last, first = rows[-1], rows[0]
    curves = {
        words: _curve(rows, which, "loss")
        for which, words in (("ema", "EMA"), ("model", "live weights"))
    }
    times = {f"EMA, step {last['step']:,}": (last.get("t"), last.get("ema", {}).get("loss_by_t"))}
    if last is not first:
        started = (first.get("t"), first.get("ema", {}).get("loss_by_t"))
        times = {f"EMA, step {first['step']:,}": started, **times}
    grid, before = (row.get("ema", {}).get("grid") for row in (last, first))
    objective = run.config.objective if run.config else None
    gamma = objective.gamma if objective and objective.interval == "shifted" else 0.0
    at = last.get("grid_t")
    maps = [(f"EMA at step {last['step']:,}: loss", grid_map("grid", grid, at, gamma))]
    if last is not first:
        words = f"Change since step {first['step']:,}, in percent: blue is better"
        maps.append((words, grid_map("change", grid, at, gamma, before)))
    what = f"{last.get('examples', '?')} {last.get('data', 'examples')}, the same noise each time"
    note = (
        "Columns: the time t that the network is told. Rows: the time m at which its input was "
        "mixed; 0 is noise, 1 is data. On the diagonal m = t: plain flow matching. Below it the "
        "input is noisier than its label says, as a sampler's own errors make it."
    )
    if gamma:
        note += f" This run trains between the dotted lines, (1 - {gamma:g}) t to t."
    return _section(
        "Validation loss",
        [
            ("Mean over 16 times", plot("validation", curves, _resumed(run))),
            ("By time: 0 is noise, 1 is data", loss_over_times("times", times)),
        ],
        what,
    ) + _section("Validation loss of slowed inputs", maps, note)


def _previews(run: Run) -> str:
    if not run.previews:
        return ""
    # Spread over the run, first and last among them; a page of hundreds would be too large.
    count = len(run.previews)
    chosen = sorted(
        {round(i * (count - 1) / max(1, MOST_PREVIEWS - 1)) for i in range(MOST_PREVIEWS)}
    )
    figures = []
    for step, path in (run.previews[i] for i in chosen):
        try:
            figures.append(picture(path, f"step {step:,}"))
        except ValueError:  # half of a copied folder
            continue
    words = "the same noise and labels each time"
    settings = read_settings(run.out / "previews")
    if settings is not None:
        words = settings.caption()
    elif run.config:
        c = run.config
        options = PreviewOptions.of(c.train, c.model, c.objective.shift, c.latent, c.encoder.stats)
        words = options.caption()
    words = words[0].upper() + words[1:] + "."
    if len(figures) < count:
        words += f" {len(figures)} of the {count} in {run.out / 'previews'}."
    return (
        f'<h2>Previews over time</h2><p class="note">{html.escape(words)}</p>'
        f'<div class="grids">{"".join(figures)}</div>'
    )


def _throughput(run: Run) -> str:
    rows, marks = run.training, _resumed(run)
    waits = [
        (row["step"], 100 * row["data_wait_s"] / row["seconds"])
        for row in rows
        if row.get("seconds") and row.get("data_wait_s") is not None
    ]
    memory = [(step, mib / 1024) for step, mib in _curve(rows, "peak_memory_mib")]
    images, tflops = _curve(rows, "images_per_s"), _curve(rows, "model_tflops")
    peaks = _values(rows, "peak_tflops")
    rates = sorted(_values(rows, "model_tflops"))
    note = ""
    if rates:
        middle = rates[len(rates) // 2]
        note = f"Median {number(middle)} model TFLOP/s a device"
        if peaks:
            note += f", {100 * middle / peaks[-1]:.1f}% of {peaks[-1]:g} (dense bf16)"
        else:
            note += "; its peak is not known, so there is no percentage"
        note += ". FLOPs by formula: nothing that is computed twice counts."
    return _section(
        "Throughput and memory",
        [
            ("Images per second, all devices", plot("rate", {"": images}, marks, zero=True)),
            ("Model TFLOP/s a device", plot("tflops", {"": tflops}, marks, zero=True)),
            ("Waiting for data, percent of the time", plot("wait", {"": waits}, marks, zero=True)),
            ("Peak memory, GiB", plot("memory", {"": memory}, marks, zero=True)),
        ],
        note,
    )  # fmt: skip


def _configuration(run: Run) -> str:
    if run.config is None:
        why = f"config.yaml is missing or damaged, or of another release ({run.problem})."
        return f'<h2>Configuration</h2><p class="note">{html.escape(why)}</p>'
    recipe = next((row["recipe"] for row in reversed(run.starts) if row.get("recipe")), None)
    # Against its recipe a run differs in a handful of settings, which are what people look for.
    base, needed = read_recipe(recipe)
    origin = f"the recipe {recipe}" if base is not None else "the defaults"
    before = flatten((base or Config()).to_dict())
    changed = [
        (key, "to be given" if key in needed else _text(before.get(key)), _text(value))
        for key, value in flatten(run.config.to_dict()).items()
        if value != before.get(key) and key != "out"
    ]
    if changed:
        table = _table(("setting", origin, "this run"), changed)
        words = f"What differs from {origin}:"
    else:
        table, words = "", f"Just as {origin}."
    return (
        f'<h2>Configuration</h2><p class="note">{html.escape(words)}</p>{table}'
        f"<details><summary>All of it</summary><pre>{html.escape(run.config.to_yaml())}</pre>"
        "</details>"
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    columns = "".join(f'<th scope="col" class="text">{html.escape(name)}</th>' for name in head)
    body = "".join(
        "<tr>" + "".join(f'<td class="text">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{columns}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{body}</tbody></table></div>'


def _environment(run: Run) -> str:
    if not run.starts:
        return ""
    last = run.starts[-1]
    facts: dict[str, object] = {
        "ranks": last.get("ranks"),
        "objective": last.get("objective"),
        "network": last.get("network"),
        "averages": last.get("averages"),
        "GFLOP an image, training": last.get("train_gflops_per_image"),
        **last.get("environment", {}),
    }
    rows = [(key, _text(value)) for key, value in facts.items() if value is not None]
    section = f"<h2>Environment</h2>{_table((), rows)}"
    if len(run.starts) > 1:
        parts = [
            (
                time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(row.get("time", 0))),
                f"{row['step']:,}",
                str(row.get("ranks", "?")),
                str(row.get("environment", {}).get("device", "?")),
            )
            for row in run.starts
        ]
        table = _table(("started", "after step", "ranks", "device"), parts)
        section += f"<h3>Parts of the run</h3>{table}"
    return section
