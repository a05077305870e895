"""Lines of `mixflow-fast inspect`: a label and wrapped text, lists that end."""

from __future__ import annotations

import textwrap

_WIDTH = 92


def line(label: str, text: str, indent: int = 12) -> str:
    """A label and its text, wrapped and indented below itself."""
    lines = textwrap.wrap(
        text, _WIDTH - indent, break_long_words=False, break_on_hyphens=False
    ) or [""]
    return f"{label:<{indent}}" + f"\n{' ' * indent}".join(lines)


def first(lines: list[str], count: int = 12) -> list[str]:
    """The first lines, and how many more there are."""
    rest = len(lines) - count
    return lines if rest <= 1 else [*lines[:count], f"... and {rest} more, all in --json"]
