"""Copies of `metrics.jsonl` in TensorBoard and wandb. The file is the truth: a copy may fail.

Both packages are optional. wandb is offline unless WANDB_MODE says otherwise: nothing leaves the
machine until `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mixflow_fast.environment import LoggerName
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.metrics_file import Logger

# Numbers of a row that say where it belongs, not how the run does.
_PLACES = ("step", "time", "kind", "t", "grid_t", "examples")


class Loggers:
    """The loggers of a run. One that raises is warned of once and left out from then on.

    Args:
        names: loggers to open.
        out: run folder.
        config: configuration of the run, as plain values.
        start_step: steps done.
        log: prints a line.
    """

    def __init__(
        self,
        names: Sequence[LoggerName],
        out: Path,
        config: Mapping[str, object],
        start_step: int,
        log: Callable[[str], None],
    ) -> None:
        self._log = log
        self._open: dict[LoggerName, Logger] = {}
        makers: dict[LoggerName, Callable[[Path, Mapping[str, object], int], Logger]] = {
            "tensorboard": _TensorBoard,
            "wandb": _Wandb,
        }
        for name in names:
            with self._warned(name):
                self._open[name] = makers[name](out, config, start_step)

    def write(self, row: Mapping[str, object]) -> None:
        """Log the numbers of a row."""
        # A list, because a logger that fails is taken out while this goes on.
        for name, logger in list(self._open.items()):
            with self._warned(name):
                logger.write(row)

    def picture(self, path: Path, step: int) -> None:
        """Log a preview that was written."""
        for name, logger in list(self._open.items()):
            with self._warned(name):
                logger.picture(path, step)

    def close(self) -> None:
        """Flush and end them."""
        for name, logger in list(self._open.items()):
            with self._warned(name):
                logger.close()
        self._open = {}

    @contextmanager
    def _warned(self, name: LoggerName) -> Iterator[None]:
        """An error inside becomes a warning, and that logger is left out from then on."""
        try:
            yield
        except Exception as error:  # whatever a foreign package may raise
            self._open.pop(name, None)
            self._log(
                f"warning: {name} failed ({error_line(error, 200)}); the run goes on without "
                "it, metrics.jsonl is complete"
            )


def numbers(row: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a row by path: {"train/loss": 0.5, "validation/ema/loss": 0.4}.

    Lists give one number an entry ("train/loss_by_t/0"), tables none.
    """
    kind = row.get("kind", "train")
    return {} if kind == "start" else dict(_numbers_below(row, str(kind)))


def _numbers_below(values: Mapping[str, object], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        name = f"{prefix}/{key}"
        if key in _PLACES:
            continue
        if isinstance(value, dict):
            yield from _numbers_below(value, name)
        elif isinstance(value, list):
            places = enumerate(value)
            yield from ((f"{name}/{i}", v) for i, v in places if isinstance(v, (int, float)))
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value


class _TensorBoard:
    """TensorBoard: scalars and pictures in OUT/tensorboard."""

    def __init__(self, out: Path, config: Mapping[str, object], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run wrote after its last checkpoint, before it was cut off, is written again.
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge, flush_secs=30)

    def write(self, row: Mapping[str, object]) -> None:
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, row["step"], row.get("time"))

    def picture(self, path: Path, step: int) -> None:
        import numpy as np
        from PIL import Image

        pixels = np.asarray(Image.open(path).convert("RGB"))
        self._writer.add_image("previews", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A wandb run in OUT/wandb; the parts of a resumed run have one id."""

    def __init__(self, out: Path, config: Mapping[str, object], start_step: int) -> None:
        import wandb

        self._wandb = wandb
        id_file = out / "wandb" / "run_id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        if not id_file.exists():
            id_file.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mixflow_fast"),
            name=os.environ.get("WANDB_NAME", out.resolve().name),
            id=id_file.read_text().strip(),
            resume="allow",
            dir=str(out),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, row: Mapping[str, object]) -> None:
        values = numbers(row)
        if values:
            self._run.log(values, step=row["step"])

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"previews": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()
