"""What a run says while it works: `metrics.jsonl` for machines, a progress line for people."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


class MetricsFile:
    """One JSON object a line, appended and flushed, so that a killed run keeps what it wrote.

    Args:
        path: the file.
        resume_step: rows of later steps are dropped first, since they will be written again; a
            line that a killed run left unfinished is dropped too.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        rows = [row for row in read_metrics(path) if row["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
        self._file = path.open("a")

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; it must have a "step"."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; empty if there is none. Unfinished lines are left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class Progress:
    """A tqdm bar on a terminal, one plain line per report otherwise, nothing when quiet.

    Args:
        total: steps in the run.
        start: steps already done.
        label: what stands before the bar or line.
        quiet: print nothing.
    """

    def __init__(self, total: int, start: int, label: str, quiet: bool = False) -> None:
        self._total, self._label, self._quiet = total, label, quiet
        self._bar = None
        if not quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", leave=True)

    def step(self) -> None:
        """One more optimizer step is queued. Reads nothing from the device."""
        if self._bar is not None:
            self._bar.update()

    def report(self, row: dict[str, Any]) -> None:
        """Show a metrics row."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} img/s")
        elif not self._quiet:
            self.say(
                f"{self._label}: step {row['step']}/{self._total} loss {row['loss']:.4f} "
                f"lr {row['lr']:.2e} {row['images_per_s']:.0f} img/s"
            )

    def say(self, text: str) -> None:
        """A line of text that does not break the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
