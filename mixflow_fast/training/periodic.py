"""Duties between steps: rows of metrics, previews, validation.

Previews and validation read a copy of the network, so that training's bits do not depend on
whether, or how often, it is looked at. The copy is made once, in eager mode and in training's own
precision.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.evaluation.validation_loss import (
    GRID,
    TIMES,
    ValidationData,
    ValidationLoss,
    bin_centers,
)
from mixflow_fast.messages import error_line
from mixflow_fast.metrics.data_wait import DataWaitWatch
from mixflow_fast.metrics.stragglers import StragglerWatch
from mixflow_fast.models import Network
from mixflow_fast.models.autoencoders.decoding import Decoder
from mixflow_fast.models.weights.source_record import SourceRecord
from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.reports.previews import PreviewOptions, preview_file, write_preview
from mixflow_fast.reports.text_previews import TextPreviewOptions
from mixflow_fast.training.conditions import Conditions
from mixflow_fast.training.duty import RunContext, Timetable
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.inputs import Inputs
from mixflow_fast.training.nonfinite_guard import NonFiniteGuard
from mixflow_fast.training.source import SourceHealth


def validation_loss(
    data: ValidationData | None,
    mix: MixFlow,
    device: torch.device,
    ways: tuple[Inputs, Conditions],
    section: TrainConfig,
    host_group: HostGroup,
) -> ValidationLoss | None:
    """This rank's share of the losses on examples to validate on; None where there are none.

    Args:
        data: the examples.
        mix: the objective.
        device: where the network is.
        ways: from a batch on the device to x, and to what the network is told.
        section: the section `train`.
        host_group: exchange between the ranks.
    """
    if data is None:
        return None
    inputs, conditions = ways
    return ValidationLoss(
        data,
        mix,
        device,
        inputs,
        conditions.undropped(),
        examples=section.validate_examples,
        batch_size=section.microbatch_size,
        rank=host_group.rank,
        ranks=host_group.ranks,
        all_gather=host_group.all_gather,
    )


class WatchedCopy:
    """The network once more, as training computes it, but eager and without gradients.

    Args:
        model: the network before DeepSpeed has it.
        precision: "fp32" or "bf16", as training's.
        device: device of this rank.
        kept: whether this rank keeps a copy; one that does not still takes part in gathering.
        shares: the copy has in common with the engine's network what adapters stand beside, which
            no step changes; not for an engine that cuts that up (ZeRO 3).

    Attributes:
        net: the copy; None where this rank keeps none.
    """

    def __init__(
        self, model: Network, precision: str, device: torch.device, kept: bool, shares: bool = False
    ) -> None:
        self.net: Network | None = None
        self._holds: tuple[str, int] | None = None
        if not kept:
            return
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # What is trained is filled by `take`: a copy of it in host memory would be for nothing.
        made: dict[int, object] = {
            id(p): nn.Parameter(torch.empty_like(p, dtype=dtype, device=device))
            for p in model.parameters()
            if p.requires_grad
        }
        if shares and model.has_adapters:
            made |= {id(p): p for p in model.parameters() if not p.requires_grad}
        net = copy.deepcopy(model, made).set_execution(mode="eager").eval().requires_grad_(False)
        self.net = net.to(device, dtype)

    @torch.no_grad()
    def take(self, engine: Engine, which: str, step: int) -> None:
        """Fill the copy with "model" or "ema" weights; every rank must call it.

        Two duties at one step gather once.
        """
        if self._holds == (which, step):
            return
        own = {} if self.net is None else dict(self.net.named_parameters())
        for name, value in engine.gathered(which, stepped=step > 0):
            if name in own:
                own[name].copy_(value)
        self._holds = which, step

    def release(self) -> None:
        """What it holds is no weights of the run any more: the run went back."""
        self._holds = None


class Logging:
    """The duty that writes a row of metrics.

    Args:
        context: what every duty has at hand.
        timetable: when it is due.
        guard: has the losses, and checks them first.
        learning_rate: as a function of the images seen.
        global_batch_size: images a step.
        data_wait: says that training waits for its data; None says nothing.
        source: numbers of a mixed source; None where it is N(0, I).
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        guard: NonFiniteGuard,
        learning_rate: Callable[[int], float],
        global_batch_size: int,
        data_wait: DataWaitWatch | None = None,
        source: SourceHealth | None = None,
    ) -> None:
        self._context, self._timetable, self._guard = context, timetable, guard
        self._learning_rate, self._batch = learning_rate, global_batch_size
        self._stragglers, self._data_wait = StragglerWatch(), data_wait
        self._source = source

    def due(self, step: int) -> bool:
        """Every so many steps, and at the end of the run."""
        return self._timetable.due(step)

    def run(self, step: int) -> None:
        """Read the losses of the steps since the last row. Every rank must call it.

        Raises:
            TrainingDiverged, RollBack: a step was not finite; see `NonFiniteGuard.check`.
        """
        self._timetable.done(step)
        images_seen = step * self._batch
        row: dict[str, object] = {"step": step, "images_seen": images_seen}
        row |= self._guard.row()
        if self._source is not None:
            row |= self._source.row(step)
        row |= {"lr": self._learning_rate(images_seen)}
        row |= self._context.throughput.take()
        self._context.log.training_row(row)
        if sentence := self._stragglers.sentence(self._context.throughput.straggler):
            self._context.log.log(sentence)
        if self._source is not None and (sentence := self._source.warning(row)):
            self._context.log.log(sentence)
        if self._data_wait is not None and (sentence := self._data_wait.sentence(step, row)):
            self._context.log.log(sentence)


class Previews:
    """The duty that draws pictures from the EMA weights on rank 0, into OUT/previews.

    Args:
        context: what every duty has at hand.
        timetable: when it is due.
        options: how the pictures come about.
        watched: the copy to sample with.
        source: the mixed source whose predictor the copy carries; None for N(0, I).
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        options: PreviewOptions | TextPreviewOptions,
        watched: WatchedCopy,
        source: SourceRecord | None = None,
    ) -> None:
        self._context, self._timetable = context, timetable
        self._options, self._watched, self._source = options, watched, source
        self._decoder: Decoder | None = None

    def due(self, step: int) -> bool:
        """Every so many steps, at the start and at the end of the run."""
        return self._timetable.due(step)

    def run(self, step: int) -> None:
        """Sample on rank 0 while the others wait."""
        self._timetable.done(step)
        group = self._context.host_group
        with self._context.throughput.paused():
            self._watched.take(self._context.engine, "ema", step)
            if group.rank == 0:
                self.draw(step)
            # The others wait here, on the host, and not inside the next step's collective.
            group.all_gather(None)

    def draw(self, step: int) -> None:
        """Write the preview; training does not need it, so failing is a warning."""
        path, log = preview_file(self._context.out, step), self._context.log
        try:
            decoder = self._decoder = self._decoder or self._options.load_decoder()
            try:
                if decoder is not None:
                    decoder.to(next(self._watched.net.parameters()).device)
                self._write(path, decoder)
            finally:
                if decoder is not None:  # training has the device's memory to itself
                    decoder.to("cpu")
            log.picture(path, step)
        # No such decoder, a full disk, samples that are not finite, no room on the GPU.
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            log.log(f"warning: no preview of step {step} ({error_line(error, 200)})")

    def _write(self, path: Path, decoder: Decoder | None) -> None:
        write_preview(self._watched.net, self._options, path, decoder, self._source)


class Validation:
    """The duty that measures losses at fixed times, of the EMA and of the live weights.

    Args:
        context: what every duty has at hand.
        timetable: when it is due.
        losses: what is measured.
        watched: the copy to measure.
    """

    def __init__(
        self,
        context: RunContext,
        timetable: Timetable,
        losses: ValidationLoss,
        watched: WatchedCopy,
    ) -> None:
        self._context, self._timetable = context, timetable
        self._losses, self._watched = losses, watched

    def due(self, step: int) -> bool:
        """Every so many steps, at the start and at the end of the run."""
        return self._timetable.due(step)

    def run(self, step: int) -> None:
        """Measure and write a row."""
        self._timetable.done(step)
        context, found = self._context, {}
        with context.throughput.paused():
            for which in ("ema", "model"):
                self._watched.take(context.engine, which, step)
                found[which] = self._losses(self._watched.net)
        examples = self._losses.examples
        context.log.row(
            "validation",
            step,
            examples=examples,
            data=self._losses.description,
            t=bin_centers(TIMES),
            grid_t=bin_centers(GRID),
            **{which: asdict(losses) for which, losses in found.items()},
        )
        values = ", ".join(f"{which} {losses.loss:.4f}" for which, losses in found.items())
        what = f"{examples} {self._losses.description}"
        context.log.log(f"{context.out.name}: step {step} validation loss {values} ({what})")
