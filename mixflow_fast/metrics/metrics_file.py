"""What a run says while it works: `metrics.jsonl` for machines, a progress line for people.

Rows of metrics.jsonl by their "kind"; each has "step":

    (none)        training, one per log_every steps: means over the window since the last one
    "start"       a process took up the run: versions, device, how the network is run
    "validation"  losses at fixed times and over the grid, of EMA and live weights
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

from mixflow_fast import files

TRAINING = "training"  # the kind of rows that name none


class Logger(Protocol):
    """What gets the rows too."""

    def write(self, row: dict[str, Any]) -> None: ...

    def picture(self, path: Path, step: int) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """One JSON object a line, appended and flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file.
        resume_step: rows of later steps are dropped first, since they will be written again; a
            line that a killed run left unfinished is dropped too.
        logger: gets each row after the file has it.
    """

    def __init__(self, path: Path, resume_step: int = 0, logger: Logger | None = None) -> None:
        self._mirror = logger
        rows = [row for row in read_metrics(path, kind=None) if row["step"] <= resume_step]
        files.write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a "step". What is not finite is written as null."""
        row = _finite(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(row)

    def picture(self, path: Path, step: int) -> None:
        """Tell the logger of a picture that was written."""
        if self._mirror is not None:
            self._mirror.picture(path, step)

    def close(self) -> None:
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path, kind: str | None = TRAINING) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; empty if there is none. Unfinished lines are left out.

    Args:
        path: the file.
        kind: of the rows; None gives all.
    """
    rows = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                if kind is None or row.get("kind", TRAINING) == kind:
                    rows.append(row)
    return rows
