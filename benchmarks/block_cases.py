"""What `compile_report` compiles of the transformer-block ops: (op, variant, call, quick) rows.

A call takes a function that forgets the launches before it, for what was only preparation.
"""

from __future__ import annotations

from collections.abc import Callable

Row = tuple[str, str, Callable[[Callable[[], None]], object], bool]


def junction_rows() -> list[Row]:
    return []


def activation_rows() -> list[Row]:
    return []


def attention_rows() -> list[Row]:
    return []


def rows() -> list[Row]:
    """Every kind of launch at least once: not every product of kinds."""
    return [*junction_rows(), *activation_rows(), *attention_rows()]
