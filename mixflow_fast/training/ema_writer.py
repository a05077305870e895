"""Snapshots of power-function EMAs along a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixflow_fast.config.schema import Config
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.optim.power_ema import (
    window_steps,
)

if TYPE_CHECKING:
    from mixflow_fast.training.engine import Engine
from mixflow_fast.checkpoints.ema_snapshots import _write


class SnapshotWriter:
    """Writes a run's snapshots.

    Args:
        config: of the run.
        agreement: the ranks'.
    """

    def __init__(self, config: Config, host_group: HostGroup) -> None:
        self._config = config
        self._host_group = host_group
        self._every = config.optim.snapshot_every or config.train.save_every

    def look(
        self,
        engine: Engine,
        step: int,
        metadata: Mapping[str, Any],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the snapshot of this step where it is time to; every rank must call it.

        Args:
            engine: holds the EMAs.
            step: optimizer steps done.
            metadata: of a weights file at this step.
            check: raises where the EMAs must not be written; called just before.

        Raises:
            OSError: it could not be written (a full disk); on all ranks.
        """
        widths, last = self._config.optim.ema_sigma_rel, step == self._config.steps
        if not widths or not step or not (last or (self._every and step % self._every == 0)):
            return
        check()
        tensors = {}
        writer = self._host_group.rank == 0
        for number in range(len(widths)):
            for name, value in engine.gathered(f"ema_power_{number}", stepped=True):
                if writer:
                    tensors[f"{number}/{name}"] = value.cpu().contiguous()
        with self._host_group.raise_together():
            if writer:
                trained = {name.partition("/")[2] for name in tensors}
                frozen = {n: t for n, t in engine.initial.items() if n not in trained}
                tensors |= {f"frozen/{name}": tensor for name, tensor in frozen.items()}
                path = Path(self._config.out) / "ema" / f"step_{step:08d}.safetensors"
                header = {name: str(value) for name, value in metadata.items()}
                _write(path, tensors, header | {"sigma_rel": json.dumps(widths)})


def describe_averages(config: Config) -> str:
    """The averages that a run keeps, for its log, with what is wrong with them."""
    words = []
    for decay in (config.optim.ema_decay, *config.optim.ema_more_decays):
        window = window_steps(decay)
        text = f"decay {decay:g} (window {window:,.0f} steps)"
        if window > config.steps:
            text += f", longer than the run's {config.steps:,}: it is mostly the start"
        words.append(text)
    widths = ", ".join(f"{width:g}" for width in config.optim.ema_sigma_rel)
    return "; ".join([*words, *([f"power functions of width {widths}"] if widths else [])])
