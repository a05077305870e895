"""Progress of a run on a terminal or in a log."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, TextIO

from mixflow_fast.metrics.rows import TrainingRow

if TYPE_CHECKING:
    from tqdm import tqdm


def _has_screen(stream: TextIO) -> bool:
    """Whether a bar can be seen: on a terminal of no size, as some launchers make, it cannot."""
    if not stream.isatty():
        return False
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return True


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
        self._bar: tqdm | None = None
        if not quiet and _has_screen(sys.stderr):
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=label, unit="step", leave=True)

    def step(self) -> None:
        """Count one more optimizer step that is queued. Reads nothing from the device."""
        if self._bar is not None:
            self._bar.update()

    def report(self, row: TrainingRow) -> None:
        """Show loss, learning rate and speed of a metrics row."""
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"  # every step was skipped
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss}, {row['images_per_s']:.0f} img/s")
        elif not self._quiet:
            self.log(
                f"{self._label}: step {row['step']}/{self._total} loss {loss} "
                f"lr {row['lr']:.2e} {row['images_per_s']:.0f} img/s"
            )

    def log(self, text: str) -> None:
        """Print a line of text without breaking the bar."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
