"""What HTML reports here are made of: style, the page around them, pictures as base64 PNG.

A page of these parts loads nothing, and follows the reader's light or dark mode.
"""

from __future__ import annotations

import base64
import html
import math
import os
from pathlib import Path

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


def page(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: plain text; the page's title and its first heading.
        body: HTML below the heading.
        style: CSS after the common one.
    """
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<title>{title}</title><style>{STYLE}{style}</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def number(value: float) -> str:
    """Four significant digits, without an exponent between 0.0001 and 100,000."""
    # `g` drops zeros at the end, and the rows of a table would not align.
    if not math.isfinite(value) or value == 0 or not 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def picture(path: str | os.PathLike[str] | None, caption: str) -> str:
    """A PNG file as a figure that holds it; ValueError if it cannot be read or is no PNG."""
    text = html.escape(caption)
    if path is None:
        return f'<figure><figcaption>{text}</figcaption><p class="note">no picture</p></figure>'
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"picture {caption!r}: cannot read {path} ({error.strerror})") from error
    # A browser would show a broken picture and no reason.
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"picture {caption!r}: {path} is not a PNG file")
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="{source}"></figure>'
