"""Parts of messages: the nearest valid name, one line of an exception, lists, times, sizes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """ "; did you mean 'optim.lr'?" where a valid name is near, else nothing.

    A field without its section is the commonest slip, so `lr` finds `optim.lr`.
    """
    valid = list(valid)
    # difflib finds `lr` too far from `optim.lr`.
    same_field = [v for v in valid if v.rpartition(".")[2] == name.rpartition(".")[2]]
    match = same_field or difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def error_line(error: BaseException, limit: int = 300) -> str:
    """Class and text of an exception on one line, the text cut at `limit` characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


def shorten(names: Iterable[str], count: int = 5) -> str:
    """The first `count` names, and how many there are if more."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def duration(seconds: float) -> str:
    """Seconds with a unit that suits their size, such as 26 s, 7.2 min, 19 min or 3.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    size, unit = (60, "min") if seconds < 2 * 3600 else (3600, "h")
    if seconds >= 48 * 3600:
        size, unit = 24 * 3600, "days"
    count = seconds / size
    return f"{count:.1f} {unit}" if count < 10 else f"{count:.0f} {unit}"


def size_text(count: float) -> str:
    """Bytes with a decimal unit, such as 2.70 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
