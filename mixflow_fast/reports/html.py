"""What HTML reports here are made of: style, plots as inline SVG, pictures as base64 PNG.

A page of these parts loads nothing, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Readable on white and on black; markers and dashes tell the arms apart without colour.
COLORS = ("#3b82f6", "#ea7317", "#16a34a", "#a855f7", "#e11d48", "#0891b2")
MARKERS = "osD^vP"
DASHES = ("-", "--", "-.", ":")
INK, FAINT = "#010203", "#040506"  # stand-ins that become CSS variables of the page
MAX_CURVE_POINTS = 200

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--faint:#69727d;--line:#d8dde3;--soft:#f4f6f8}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--ink:#e6e9ec;--faint:#949da6;--line:#343a41;
--soft:#1d2125}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem 1.1rem 4rem;background:var(--bg);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:1rem 0 .3rem}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
.meta,figcaption,.note{color:var(--faint);font-size:.9rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.95rem;min-width:60%}
th,td{padding:.4rem .8rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;
min-width:7.5rem}
thead th{color:var(--faint);font-weight:600}
tr.floor td{color:var(--faint);font-style:italic}
figure{margin:0}
.plots,.grids{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr))}
.grids{grid-template-columns:repeat(auto-fit,minmax(min(100%,12rem),1fr))}
.grids img{width:100%;image-rendering:pixelated;border:1px solid var(--line);border-radius:4px}
.grids figcaption{color:var(--ink);margin-bottom:.3rem}
svg{width:100%;height:auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
pre{background:var(--soft);padding:.8rem;border-radius:6px;overflow-x:auto;font-size:.85rem}
details{margin-top:2rem}summary{cursor:pointer;font-weight:600;font-size:1.2rem}
"""


def number(value: float) -> str:
    """Four significant digits, without an exponent between 0.0001 and 100,000."""
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def figure(width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes) in the page's style, sizes in inches; ValueError without matplotlib."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            'the report\'s plots need matplotlib: pip install "mixflow_fast[eval]"'
        ) from error
    style = {
        "font.size": 10,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        canvas = Figure(figsize=(width, height), layout="constrained")
        axes = canvas.add_subplot()
    canvas.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(True, color=FAINT, alpha=0.25, linewidth=0.6)
    return canvas, axes


def svg(canvas: Any, salt: str, label: str) -> str:
    """The figure as an SVG element for an HTML page: no prologue, no metadata, page colours."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    # The text stays text: the page's font, selectable, small.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        canvas.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{salt}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\1{salt}-", text)
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and width of the curve with this number."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
    }


def plain(text: str) -> str:
    """Text that matplotlib must not read as mathematics."""
    return text.replace("$", r"\$")


def thin(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """At most MAX_CURVE_POINTS points, each the average of equally many neighbours."""
    size = -(-len(points) // MAX_CURVE_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)] if points else []
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def picture(path: str | os.PathLike[str] | None, caption: str) -> str:
    """A PNG file as a figure that holds it; ValueError if it cannot be read or is no PNG."""
    text = html.escape(caption)
    if path is None:
        return f'<figure><figcaption>{text}</figcaption><p class="note">no picture</p></figure>'
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"picture {caption!r}: cannot read {path} ({error.strerror})") from error
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"picture {caption!r}: {path} is not a PNG file")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'
