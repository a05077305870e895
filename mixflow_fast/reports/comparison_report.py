"""The before/after page: one self-contained file; `comparison_result.record` is its JSON twin.

No clock, no duration and no name of a machine is on it: the same comparison gives the same bytes.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence

from mixflow_fast.evaluation.paired import Paired
from mixflow_fast.evaluation.uncertainty import Estimate
from mixflow_fast.reports.comparison_plots import nfe_curves, strip_plot
from mixflow_fast.reports.comparison_result import (
    COVERS,
    NO_CONTROL,
    Comparison,
    Pair,
    config_differences,
    direction,
    disagreement,
    metric_name,
    own_configs,
    signed,
)
from mixflow_fast.reports.html import number, page, picture
from mixflow_fast.reports.slow_flow_report import (
    PANEL_STYLE,
    SlowFlowReport,
    overshoot_warnings,
    panels,
)

_STYLE = f"""{PANEL_STYLE}
.better{{color:#15803d;font-weight:700}}.worse{{color:#dc2626;font-weight:700}}
@media(prefers-color-scheme:dark){{.better{{color:#4ade80}}.worse{{color:#f87171}}}}
td small{{display:block;color:var(--faint)}}
.verdicts td:nth-child(2),.verdicts th:nth-child(2),.verdicts td:nth-child(3),
.verdicts th:nth-child(3){{text-align:left}}
.verdicts td:nth-child(3) small{{white-space:normal;max-width:14rem}}
.verdicts td:first-child,.verdicts th:first-child{{min-width:4rem}}
tr.gap td{{border-top:2px solid var(--line)}}
.text td{{text-align:left;white-space:normal}}.text th{{text-align:left}}
.text td{{overflow-wrap:anywhere;min-width:6rem}}
code{{font-size:.75rem;overflow-wrap:anywhere}}
.wide+.wide{{margin-top:1.2rem}}
.grids.pairs{{grid-template-columns:repeat(auto-fit,minmax(min(100%,17rem),1fr))}}
h2+.note{{margin-top:0}}
"""


def render(comparison: Comparison) -> str:
    """The page."""
    sections = [
        _opening(comparison),
        _verdicts(comparison),
        _numbers(comparison),
        _curves(comparison),
        _pictures(comparison),
        _classes(comparison),
        _slow_flow(comparison),
        _configurations(comparison),
        _origins(comparison),
    ]
    return page("Before and after", "\n".join(sections), _STYLE)


def _e(text: object) -> str:
    return html.escape(str(text))


def _warn(lines: Iterable[str]) -> str:
    return "".join(f'<p class="warn">{_e(line)}</p>' for line in lines)


def _row(cells: Sequence[str], kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    return f"<tr{attribute}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    top = "".join(f'<th scope="col">{_e(cell)}</th>' for cell in head)
    attribute = f' class="{kind}"' if kind else ""
    return (
        f'<div class="wide"><table{attribute}><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _opening(c: Comparison) -> str:
    arms = "; ".join(arm.label for arm in c.arms.values())
    parts = [
        f'<p class="meta">{_e(arms)}. {c.n:,} images of each at each number of steps, of the same '
        f"noise and labels. Reference: {_e(c.reference)}.</p>"
    ]
    if c.allowed:
        fields = "; ".join(map(str, c.allowed))
        parts.append(
            _warn(
                [
                    "These differ by consent (--allow-different), so the numbers are not of one "
                    f"kind: {fields}. Images of one id are no pairs: there are no intervals of "
                    "differences, and nothing is judged."
                ]
            )
        )
    notes = list(c.notes)
    if "control" not in c.arms:
        notes.insert(0, f"{NO_CONTROL[0].upper()}{NO_CONTROL[1:]}.")
    parts.append(_warn(notes))
    return "\n".join(parts)


def _verdict(found: Paired) -> str:
    kind = found.verdict if found.verdict in ("better", "worse") else ""
    return f'<span class="{kind}">{_e(found.verdict)}</span>' if kind else _e(found.verdict)


def _verdicts(c: Comparison) -> str:
    rows = []
    for steps in c.steps:
        for place, pair in enumerate(pair for pair in c.pairs if pair.main):
            found = c.differences[pair, steps, c.primary]
            rows.append(_row(_verdict_cells(c, pair, steps, found), "" if place else "gap"))
    name, way = metric_name(c.primary), direction(c.primary)
    return (
        f"<h2>Verdict by {_e(name)} ({way}), n = {c.n:,}</h2>"
        + _table(
            ["steps", "compared", "verdict", "difference (95%)", "first", "second"],
            rows,
            "verdicts",
        )
        + f'<p class="note">Differences are paired by image and without the bias of a set of this '
        f"size. {COVERS} {_e(_rule(c))}</p>"
    )


def _rule(c: Comparison) -> str:
    others = [metric_name(name) for name in c.metrics if name != c.primary]
    if not others:
        return ""
    return f"The other numbers ({', '.join(others)}) stand below and may say otherwise."


def _verdict_cells(c: Comparison, pair: Pair, steps: int, found: Paired) -> list[str]:
    cells = c.cells[pair.a, steps], c.cells[pair.b, steps]
    a, b = (number(cell.found.estimates[c.primary].value) for cell in cells)
    nfe = " / ".join(str(value) for value in dict.fromkeys(cell.nfe for cell in cells))
    return [
        f"{steps}<small>{nfe} NFE</small>",
        f"{_e(c.arms[pair.a].label)}<small>against {_e(c.arms[pair.b].label)}</small>",
        f"{_verdict(found)}<small>{_e(disagreement(c, pair, steps).removeprefix('; '))}</small>",
        _apart(found),
        a,
        b,
    ]


def _apart(found: Paired) -> str:
    if found.low is None or found.high is None:
        return f"{signed(found.value)}<small>no interval</small>"
    interval = f"{signed(found.low)} to {signed(found.high)}"
    return f"{signed(found.corrected)}<small>{interval}</small>"


def _numbers(c: Comparison) -> str:
    parts = [f"<h2>Numbers, n = {c.n:,}</h2>"]
    parts.append(
        '<p class="note">First line of a cell: the value as such numbers are published, biased by '
        "the number of images. Second: without that bias, and its 95% interval. Below the arms: "
        "their differences, paired by image.</p>"
    )
    for metric in c.metrics:
        rows = []
        for key, arm in c.arms.items():
            own = [c.cells[key, steps].found.estimates[metric] for steps in c.steps]
            rows.append(_row([_e(arm.label), *map(_estimate, own)]))
        for place, pair in enumerate(c.pairs):
            found = [c.differences[pair, steps, metric] for steps in c.steps]
            words = f"{c.arms[pair.a].label} − {c.arms[pair.b].label}"
            rows.append(_row([_e(words), *map(_difference, found)], "" if place else "gap"))
        head = ["", *(f"{steps} steps" for steps in c.steps)]
        title = f"{metric_name(metric)} ({direction(metric)}), n = {c.n:,}"
        parts.append(f"<h3>{_e(title)}</h3>" + _table(head, rows))
    if c.warnings:
        items = "".join(f"<li>{_e(line)}</li>" for line in c.warnings)
        parts.append(f'<ul class="note">{items}</ul>')
    return "\n".join(parts)


def _estimate(found: Estimate) -> str:
    low, high = found.interval()
    return (
        f"{number(found.value)}<small>{number(found.corrected)} "
        f"({number(low)} to {number(high)})</small>"
    )


def _difference(found: Paired) -> str:
    if found.low is None or found.high is None:
        return f"{signed(found.value)}<small>not judged</small>"
    return (
        f"{signed(found.corrected)} {_verdict(found)}"
        f"<small>({signed(found.low)} to {signed(found.high)})</small>"
    )


def _curves(c: Comparison) -> str:
    figures = []
    for place, metric in enumerate(c.metrics):
        curves = {
            arm.label: sorted(
                (
                    (c.cells[key, steps].nfe, c.cells[key, steps].found.estimates[metric])
                    for steps in c.steps
                ),
                key=lambda point: point[0],
            )
            for key, arm in c.arms.items()
        }
        name = metric_name(metric)
        drawing = nfe_curves(f"nfe-{place}", curves, range(len(curves)), direction(metric))
        figures.append(
            f"<figure><figcaption>{_e(name)}, without its bias, 95%, n = {c.n:,}</figcaption>"
            f"{drawing}</figure>"
        )
    return (
        f'<h2>Against network evaluations</h2><div class="plots">{"".join(figures)}</div>'
        '<p class="note">Bars are of each arm alone. Arms share their noise, so a paired '
        "difference above may be sure where bars overlap.</p>"
    )


def _pictures(c: Comparison) -> str:
    parts = ["<h2>Pairs of pictures</h2>"]
    for each in c.pictures:
        if each.chosen is None:
            words = (
                f"Ids {each.ids[0]} to {each.ids[-1]}, fixed in advance, of n = {c.n:,}; the same "
                "noise and label at the same place."
            )
        else:
            listed = ", ".join(map(str, each.ids))
            words = f"{each.chosen} of n = {c.n:,}, so not typical. Ids {listed}."
        grids = "".join(picture(path, c.arms[key].label) for key, path in each.files.items())
        parts.append(
            f"<h3>{each.steps} steps{'' if each.chosen is None else ', chosen'}</h3>"
            f'<p class="note">{_e(words)}</p><div class="grids pairs">{grids}</div>'
        )
    return "\n".join(parts)


def _classes(c: Comparison) -> str:
    if not c.strips:
        return (
            "<h2>By class</h2><p class='note'>Fewer than two classes have 50 images or more, so "
            f"classes are not compared (n = {c.n:,}).</p>"
        )
    figures = []
    for place, ((pair, steps), strip) in enumerate(c.strips.items()):
        more = f", {strip.omitted} smaller ones left out" if strip.omitted else ""
        counts = f"{min(strip.counts)} to {max(strip.counts)} images each"
        if min(strip.counts) == max(strip.counts):
            counts = f"{strip.counts[0]} images each"
        words = (
            f"{steps} steps: {c.arms[pair.a].label} − {c.arms[pair.b].label}, n = {c.n:,}; "
            f"{len(strip.classes)} classes, {counts}{more}"
        )
        drawing = strip_plot(f"strip-{place}", strip)
        figures.append(f"<figure><figcaption>{_e(words)}</figcaption>{drawing}</figure>")
    return (
        "<h2>By class</h2>"
        f'<div class="plots">{"".join(figures)}</div>'
        f'<p class="note">What a class adds to the difference of {_e(metric_name(c.primary))} '
        "beyond the average image; below zero the class gained more than the others. All classes "
        "with enough images, sorted. Of many classes some lie far out by chance: the band is where "
        "as many classes of the same sizes would lie that do not differ, the dashes their expected "
        "lowest and highest.</p>"
    )


def _slow_flow(c: Comparison) -> str:
    if not c.slow:
        return f'<h2>Slow flow</h2><p class="note">{_e(c.slow_note)}</p>' if c.slow_note else ""
    first = c.slow[0].slow
    report = SlowFlowReport(c.slow, c.command)
    warnings = [text for each in c.slow for text in overshoot_warnings(each)]
    return (
        f'<h2>Slow flow</h2><p class="note">{first.settings.states:,} states, '
        f"{_e(first.settings.method)}, no guidance; {_e(first.description)}. Times: 0 is noise, 1 "
        f"is data.</p>{_warn(warnings)}"
        + panels(report).replace("<h2>", "<h3>").replace("</h2>", "</h3>")
    )


def _configurations(c: Comparison) -> str:
    own = own_configs(c.arms)
    silent = [
        arm.label for key, arm in c.arms.items() if arm.config is None and "_remedy" not in key
    ]
    parts = ["<h2>Configuration</h2>"]
    if silent:
        words = f"Not recorded: how {', '.join(silent)} came about."
        parts.append(f'<p class="note">{_e(words)}</p>')
    if len(own) > 1:
        rows = config_differences(c.arms)
        lines = [_row([_e(name), *(_e(_text(value)) for value in values)]) for name, values in rows]
        head = ["setting", *(arm.label for arm in own.values())]
        parts.append('<p class="note">Settings of the trainings that differ:</p>')
        parts.append(_table(head, lines, "text") if rows else "<p>None.</p>")
    return "\n".join(parts)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _code(text: str) -> str:
    return f"<code>{_e(text)}</code>"


def _origins(c: Comparison) -> str:
    rows = [
        _row([_e(arm.label), _e(arm.path), _e(arm.average or "–"), _code(arm.sha256 or "–")])
        for arm in c.arms.values()
    ]
    hashes = [_row([_e(what), _code(value)]) for what, value in c.hashes]
    protocols = [
        _row([f"{steps} steps", _e(c.arms[key].label), _code(cell.protocol.sha256)])
        for (key, steps), cell in c.cells.items()
    ]
    sampler = "".join(f"<li>{_e(line)}</li>" for line in c.sampler)
    return (
        "<h2>Where the numbers come from</h2>"
        f"<ul>{sampler}</ul>"
        + _table(["weights", "file", "average", "SHA-256"], rows, "text")
        + _table(["", "SHA-256"], hashes, "text")
        + "<details><summary>Protocols</summary>"
        + '<p class="note">Of sampling, features, reference and metrics together; report.json has '
        "the records.</p>"
        + _table(["steps", "arm", "SHA-256"], protocols, "text")
        + f"</details><p>Run again with</p><pre>{_e(c.command)}</pre>"
    )
