"""What a run tells while it goes: the progress line, metrics.jsonl, TensorBoard and wandb."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.metrics.loggers import Loggers
from mixflow_fast.metrics.metrics_file import MetricsFile
from mixflow_fast.metrics.progress import Progress


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its folder, steps and images done, and whether it reached its end."""

    out: Path
    step: int
    images_seen: int
    finished: bool

    @property
    def weights(self) -> Path:
        """Official-layout checkpoint with "model" and "ema"; see `train.save_weights`."""
        return self.out / "weights.pt"


class RunLog:
    """The record of one part of a run: rows, and lines for people. Only rank 0 writes.

    Args:
        out: run folder.
        step: optimizer steps done.
        total: optimizer steps of the whole run.
        section: the section `train`, for the images a step and the copies of metrics.jsonl.
        config: the configuration as plain values, for the loggers.
        writes: whether this rank is the one that writes rows.
        quiet: print nothing.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        total: int,
        *,
        section: TrainConfig,
        config: Mapping[str, object],
        writes: bool,
        quiet: bool,
    ) -> None:
        self._batch, loggers = section.global_batch_size, section.loggers
        done, images = step * self._batch, total * self._batch
        self._progress = Progress(images, out.name, "images", start=done, quiet=quiet)
        self._first = ""
        self._metrics: MetricsFile | None = None
        if writes:
            copies = Loggers(loggers, out, config, step, self.log) if loggers else None
            self._metrics = MetricsFile(out / "metrics.jsonl", step, copies, self.log)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._first not in ("", line := self._progress.line()):  # the last loss
            self._progress.log(line)
        self._progress.close()
        if self._metrics is not None:
            self._metrics.close()

    def log(self, text: str) -> None:
        """A line for people."""
        self._progress.log(text)

    def start(self, step: int, facts: Mapping[str, str], **values: object) -> None:
        """The row "start", and its sentences as the first lines for people."""
        for name, words in facts.items():
            self.log(f"{name}: {words}")
        self.row("start", step, **values, **facts)

    def step(self) -> None:
        """One more optimizer step is queued."""
        self._progress.advance(self._batch)

    def training_row(self, row: dict[str, object]) -> None:
        """A row of losses, rates and costs, in the file and on the screen."""
        if self._metrics is not None:
            self._metrics.write(row)
        # Without a loss where every step was skipped.
        loss = "-" if row["loss"] is None else f"{row['loss']:.4f}"
        self._progress.show(f"loss {loss}  {row['images_per_s']:,.0f} images/s")
        if not self._first:  # a run that begins wrong shows it in its first loss
            self._first = self._progress.line()
            self._progress.log(self._first)

    def row(self, kind: str, step: int, **values: object) -> None:
        """A row of another kind: "start", "validation"."""
        if self._metrics is None:
            return
        place = {"kind": kind, "step": step, "images_seen": step * self._batch}
        self._metrics.write(place | {"time": time.time()} | values)

    def picture(self, path: Path, step: int) -> None:
        """A preview that was written."""
        if self._metrics is not None:
            self._metrics.picture(path, step)
