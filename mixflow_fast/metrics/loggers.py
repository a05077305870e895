"""Copies of `metrics.jsonl` in TensorBoard and wandb. The file is the truth: a copy may fail.

Both packages are optional. wandb is offline unless WANDB_MODE says otherwise: nothing leaves the
machine until `wandb sync`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mixflow_fast.environment import LoggerName
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.metrics_file import Logger

# Numbers of a row that say where it belongs, not how the run does.
_PLACES = ("step", "time", "kind", "t", "grid_t", "examples")


class Loggers:
    """The loggers of a run. One that raises is warned of once and left out from then on.

    Args:
        names: `environment.LoggerName`s.
        out: run folder.
        config: the run's, as plain values.
        start_step: steps done.
        say: prints a line.
    """

    def __init__(
        self,
        names: Sequence[LoggerName],
        out: Path,
        config: dict[str, Any],
        start_step: int,
        log: Callable[[str], None],
    ) -> None:
        self._log = log
        self._open: dict[str, Logger] = {}
        makers: dict[LoggerName, Callable[..., Logger]] = {
            "tensorboard": _TensorBoard,
            "wandb": _Wandb,
        }
        given = out, config, start_step
        for name in names:
            self._try(name, lambda name=name: self._add(name, makers[name], *given))

    def _add(self, name: str, maker: Callable[..., Logger], *args: Any) -> None:
        self._open[name] = maker(*args)

    def write(self, row: dict[str, Any]) -> None:
        """The numbers of a row."""
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.write(row))

    def picture(self, path: Path, step: int) -> None:
        """A preview that was written."""
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.picture(path, step))

    def close(self) -> None:
        """Flush and end them."""
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)
        self._open = {}

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a foreign package may raise
            self._open.pop(name, None)
            self._log(
                f"warning: {name} failed ({error_line(error, 200)}); the run goes on without "
                "it, metrics.jsonl is complete"
            )


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by path: {"train/loss": 0.5, "validation/ema/loss": 0.4}.

    Lists give one number an entry ("train/loss_by_t/0"), tables none.
    """
    kind = row.get("kind", "train")
    return {} if kind == "start" else dict(_flat(row, kind))


def _flat(value: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, item in value.items():
        name = f"{prefix}/{key}"
        if key in _PLACES or isinstance(item, (bool, str)) or item is None:
            continue
        if isinstance(item, dict):
            yield from _flat(item, name)
        elif isinstance(item, list):
            scalars = enumerate(item)
            yield from ((f"{name}/{i}", v) for i, v in scalars if isinstance(v, (int, float)))
        elif isinstance(item, (int, float)):
            yield name, item


class _TensorBoard:
    """Scalars and pictures in OUT/tensorboard."""

    def __init__(self, out: Path, config: dict[str, Any], start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a run that was cut off wrote after its last checkpoint comes again.
        purge = start_step + 1 if start_step else None
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=purge, flush_secs=30)

    def write(self, row: dict[str, Any]) -> None:
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

    def __init__(self, out: Path, config: dict[str, Any], start_step: int) -> None:
        import wandb

        self._wandb = wandb
        mark = out / "wandb" / "run_id"
        mark.parent.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            mark.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "mixflow_fast"),
            name=os.environ.get("WANDB_NAME", out.resolve().name),
            id=mark.read_text().strip(),
            resume="allow",
            dir=str(out),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, row: dict[str, Any]) -> None:
        values = numbers(row)
        if values:
            self._run.log(values, step=row["step"])

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"previews": self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()
