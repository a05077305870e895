"""EMA snapshots along a run: the duty that writes the power-function EMAs of a step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from mixflow_fast.checkpoints.ema_snapshots import snapshot_file, write_snapshot
from mixflow_fast.config.schema import OptimConfig
from mixflow_fast.messages import error_line
from mixflow_fast.optim.power_ema import window_steps
from mixflow_fast.training.duty import RunContext, Timetable


class EmaSnapshots:
    """The duty that writes OUT/ema/step_N.safetensors, before the checkpoint of the same step.

    Args:
        context: what every duty has at hand; its engine holds the EMAs.
        timetable: when it is due.
        widths: sigma_rel of each EMA, as in `optim.ema_sigma_rel`.
        metadata: of a weights file at this step.
        check: raises where the EMAs must not be written; called just before.
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        widths: tuple[float, ...],
        metadata: Callable[[], Mapping[str, object]],
        check: Callable[[], None],
    ) -> None:
        self._context, self._timetable, self._widths = context, timetable, widths
        self._metadata, self._check = metadata, check

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end of the run."""
        return self._timetable.due(step)

    def run(self, step: int) -> None:
        """Write the snapshot of this step; every rank must call it.

        One that cannot be written (a full disk) is a warning, and missing later.
        """
        self._timetable.done(step)
        with self._context.throughput.paused():
            self._check()
            try:
                self._write(step)
            except OSError as error:
                text = f"warning: no EMA snapshot of step {step} ({error_line(error, 200)})"
                self._context.log.log(text)

    def _write(self, step: int) -> None:
        engine, group = self._context.engine, self._context.host_group
        tensors = {}
        writes = group.rank == 0
        for number in range(len(self._widths)):
            for name, value in engine.gathered(f"ema_power_{number}", stepped=True):
                if writes:
                    tensors[f"{number}/{name}"] = value.cpu().contiguous()
        with group.raise_together():
            if writes:
                tensors |= {f"frozen/{name}": value for name, value in engine.initial.items()}
                header = {name: str(value) for name, value in self._metadata().items()}
                header["sigma_rel"] = json.dumps(self._widths)
                write_snapshot(snapshot_file(self._context.out, step), tensors, header)


def describe_averages(section: OptimConfig, steps: int) -> str:
    """The averages that a run keeps, for its log, with what is wrong with them.

    Args:
        section: the optimizer's configuration.
        steps: optimizer steps of the run.
    """
    words = []
    for decay in section.ema_decays:
        window = window_steps(decay)
        text = f"decay {decay:g} (window {window:,.0f} steps)"
        if window > steps:
            text += f", longer than the run's {steps:,}: it is mostly the start"
        words.append(text)
    if section.ema_sigma_rel:
        widths = ", ".join(f"{width:g}" for width in section.ema_sigma_rel)
        words.append(f"power functions of width {widths}")
    return "; ".join(words)
