"""One JSON object a line, on disk before the next cell starts, so that a stop loses nothing.

`KEYS` are in every row. p20, p50 and p80 are in the metric's unit; a metric that could not be
measured has null there and says why in `note`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

KEYS = (
    *("op", "provider", "mode", "variant", "metric", "shape", "dtype"),
    *("p50", "p20", "p80", "low95", "high95"),
    *("device", "torch", "triton", "cuda", "git_sha", "timestamp", "timing", "note"),
)
# What makes two rows measurements of the same thing.
IDENTITY = ("op", "provider", "mode", "variant", "metric", "shape", "dtype", "device")

Row = dict[str, Any]


class Writer:
    """Appends rows to a file. Each is flushed and synced before `add` returns.

    Args:
        path: JSON lines; made with its folder, appended to if it is there.
        environment: fields put into every row (`device.environment`).
        note: put before every row's own note ("smoke: not a speed").
    """

    def __init__(
        self, path: str | os.PathLike[str], environment: dict[str, str | None], note: str = ""
    ) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._environment = environment
        self._note = note
        self.count = 0

    def add(self, *, p50: float | None, note: str = "", **fields: Any) -> Row:
        """Write one row; `fields` are the keys of `KEYS` that are not the environment's."""
        row = dict.fromkeys(KEYS) | self._environment | {"p50": p50} | fields
        row["note"] = "; ".join(part for part in (self._note, note) if part)
        row["timestamp"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        unknown = sorted(set(row) - set(KEYS))
        if unknown:
            raise ValueError(f"rows have the keys {KEYS}, got also {unknown}")
        for key in ("p50", "p20", "p80", "low95", "high95"):
            if row[key] is not None and not math.isfinite(row[key]):
                raise ValueError(f"{key} of {row['metric']} must be finite or None: {row[key]}")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.count += 1
        return row


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file; a last line that an abrupt end cut off is left out."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines[:-1] if line]
    for row in found:
        missing = [key for key in KEYS if key not in row]
        if missing:
            raise ValueError(f"{path}: a row lacks {missing}: it is from another version")
    return found


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same thing, the last; in the order in which they first came."""
    kept: dict[str, Row] = {}
    for row in rows:
        kept[json.dumps([row[key] for key in IDENTITY])] = row
    return list(kept.values())
