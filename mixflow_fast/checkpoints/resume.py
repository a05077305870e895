"""Where a run begins: at a checkpoint that continues under its configuration, or with weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mixflow_fast.checkpoints.run_folder import (
    RunFolder,
    RunState,
    choose_checkpoint,
    read_state,
)
from mixflow_fast.checkpoints.shards import check_shards, fill_network, read_layout
from mixflow_fast.checkpoints.starting_weights import check_same_network, start_from
from mixflow_fast.config.loading import flatten, load_config
from mixflow_fast.config.schema import Config, TrainConfig
from mixflow_fast.data import DataSummary
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.read_once import read_once_a_machine
from mixflow_fast.models import Network
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.weights.source_record import SourceRecord

# Fields that may change between the parts of one run: they do not touch what is computed, up to
# rounding (but train.images does where the learning rate descends towards it).
FREE = {"out", "train.images", "train.log_every", "train.save_every", "train.keep_last",
        "optim.snapshot_every", "optim.impl", "train.keep_every", "train.save_weights",
        "train.engine", "train.zero_stage", "train.device",
        "train.reduce_dtype", "train.reduce_bucket_size", "train.overlap_comm",
        "train.on_nonfinite", "train.max_skips", "train.max_rollbacks",
        "train.timeout_minutes", "train.microbatch_size", "objective.impl", "data.workers",
        "data.depth", "data.resident", "data.loader",
        "model.mode", "model.compile_unit", "model.attention", "model.checkpointing",
        "train.loggers",
        "train.preview_every", "train.previews", "train.preview_steps", "train.preview_cfg",
        "train.preview_decoder", "train.preview_stats",
        "train.validate_every", "train.validate_examples", "source.sample_w"}  # fmt: skip
# Where a text-to-image network lies: what it is is compared, and its weights are the checkpoint's.
NETWORK_PATHS = {"model.folder"}
# Where the data lie. Free where the fingerprint of the data is compared, or may be another one.
DATA_PATHS = {"data.path", "data.images", "data.features"}

# What null stands for now, where the data do not say otherwise.
_FORMER_DEFAULTS = {"data.moments": False, "data.scale": 1.0}


@dataclass(frozen=True)
class ResumePoint:
    """Where a run begins.

    Attributes:
        checkpoint: the newest whole one; None for a new run.
        state: what it says of the run; None for a new run.
        resharded_from: how its shards were cut ("2 ranks, ZeRO 1") where this run cuts them
            otherwise; else "".
        passed_over: a line on each newer checkpoint that is damaged.
        finished: a line that says so where all steps are done; then nothing is to be written.
        data_changes: how the data differ from those before, where that was allowed; else "".
    """

    checkpoint: Path | None = None
    state: RunState | None = None
    resharded_from: str = ""
    passed_over: tuple[str, ...] = ()
    finished: str = ""
    data_changes: str = ""

    @property
    def step(self) -> int:
        """Optimizer steps that were done before."""
        return self.state.step if self.state is not None else 0

    @property
    def attention(self) -> list[str] | None:
        """Attention backends that the run used up to here; None where it chose none."""
        return self.state.attention if self.state is not None else None

    def describe(self, out: Path, total: int, weights: str) -> list[str]:
        """Lines on how a run of `total` steps in `out` came to this step.

        Args:
            out: run folder.
            total: optimizer steps of the whole run.
            weights: what a new run starts from, in words.
        """
        messages = [*self.passed_over, *([self.finished] if self.finished else [])]
        if self.checkpoint is None:
            messages.append(f"start: {weights}")
        if self.step and self.step < total:
            messages.append(f"{out}: resumed after step {self.step} of {total}")
            if self.resharded_from:
                messages.append(
                    f"{out}: its checkpoint is of {self.resharded_from}: the same examples and "
                    "noise, sums equal to rounding"
                )
            if self.data_changes:
                messages.append(
                    f"{out}: goes on with other data ({self.data_changes}): the order of examples "
                    "is another one from here"
                )
        return messages

    def fill(
        self,
        model: Network,
        init: str | None,
        host_group: HostGroup,
        whole: bool = False,
        source: SourceRecord | None = None,
    ) -> None:
        """Set a network on the CPU to the weights of the files that the run begins with.

        Every rank of the group must call it. Weights that all of them need are read once a machine.

        Args:
            model: its values do not matter; a new run without `init` keeps them.
            init: checkpoint whose EMA weights start a new run (`train.init`).
            host_group: all ranks, or this one alone.
            whole: also what the engine loads by itself when the run is resumed.
            source: how the predictor that the network carries is built; None without one.

        Raises:
            ValueError: weights that are damaged or do not fit; on all ranks.
        """
        tensors = model.saved_state().values()
        if self.state is not None and isinstance(model, TextToImage):
            with host_group.raise_together():
                check_same_network(model, self.state.metadata, self.checkpoint)
        if self.checkpoint is None:
            if init is not None:
                read_once_a_machine(host_group, partial(start_from, model, init, source), tensors)
        elif whole or self.resharded_from:
            read = partial(fill_network, model, self.checkpoint, trained=True)
            read_once_a_machine(host_group, read, tensors)
        else:
            with host_group.raise_together():
                fill_network(model, self.checkpoint, trained=False)
                # What the engine will read: an error in there would leave the others waiting.
                check_shards(self.checkpoint, host_group.rank)


def find(
    config: Config,
    folder: RunFolder,
    ranks: int,
    data: DataSummary,
    resume: str = "auto",
    allow_data_change: bool = False,
) -> ResumePoint:
    """Look for a checkpoint in a run's folder, which is held from here on. Every rank must call it.

    Args:
        config: configuration of the part of the run that starts now; the folder is its `out`.
        folder: that folder.
        ranks: processes of this part of the run.
        data: what the examples are.
        resume: "auto" continues what is there, "never" refuses it.
        allow_data_change: go on though the examples are others than before.

    Raises:
        ValueError: the folder is in use, holds a run with another configuration or other data, a
            run that must not be resumed, one that has done more than is asked for, one whose
            checkpoints are all damaged, or weights without checkpoints.
    """
    out = folder.out
    folder.hold()  # first, because another run may be writing its last checkpoint
    newest, passed_over = choose_checkpoint(out, folder.host_group, set_aside=not folder.rehearsal)
    if newest is None:
        with folder.host_group.raise_together():
            if folder.host_group.rank == 0 and (out / "weights.pt").exists():
                raise ValueError(
                    f"{out} holds weights.pt of a run whose checkpoints are gone: choose another "
                    f"out= (train.init={out} starts from those weights), or delete it"
                )
        return ResumePoint(passed_over=tuple(passed_over))
    if resume == "never":
        raise ValueError(
            f"{out} already holds a run ({newest.name}): choose another out=, delete it, or "
            "resume with --resume auto"
        )
    descends_to_the_end = config.optim.schedule != "constant" and not config.optim.decay_images
    free = FREE - {"train.images"} if descends_to_the_end else FREE
    free = free | NETWORK_PATHS
    # What a rank cannot read, or reads otherwise, ends all of them.
    with folder.host_group.raise_together():
        state = read_state(newest)
        if allow_data_change or state.data is not None:
            free = free | DATA_PATHS
        _check_same_run(flatten(config.to_dict()), out, free)
        changes = _check_same_data(data, state, out, allow_data_change)
        before = resharded_from(newest, config.train, ranks)
        finished = _end(out, state, config.train.images, config.steps, descends_to_the_end)
    return ResumePoint(newest, state, before, tuple(passed_over), finished, changes)


def resharded_from(checkpoint: Path, section: TrainConfig, ranks: int) -> str:
    """How a checkpoint's shards were cut, in words; "" if just as `ranks` cut them now."""
    layout, stage = read_layout(checkpoint), section.zero_stage
    if layout.is_cut_like(section.engine, stage, ranks, section.precision):
        return ""
    how = "the engine ddp" if layout.engine == "ddp" else f"ZeRO {layout.stage}"
    text = f"{layout.ranks} rank{'s' * (layout.ranks > 1)}, {how}"
    if layout.engine == section.engine and layout.stage == stage and layout.ranks == ranks:
        text += ", of a release that did not align parameters in memory"
    return text


def _end(out: Path, state: RunState, images: int, steps: int, fixed: bool) -> str:
    """A line that says that a run is finished; "" where there is something left to train.

    Args:
        out: run folder.
        state: what its newest checkpoint says.
        images, steps: how far it is to go.
        fixed: its length is a setting of every step and cannot be changed.
    """
    done = f"{state.images_seen:,}"
    if state.step > steps:
        raise ValueError(
            f"{out} has done {done} images, more than train.images={images}: raise train.images to "
            "go on, or choose another out="
        )
    if state.step < steps:
        return ""
    more = "raise train.images to go on, or choose another out="
    if fixed:
        more = f"train.init={out} in another out= goes on from its weights"
    return f"{out} is finished: {done} of {images:,} images; {more}"


def _check_same_run(new: Mapping[str, object], out: Path, free: set[str]) -> None:
    """Refuse settings that compute something else than the run in the folder.

    Args:
        new: settings by dotted name.
        out: run folder.
        free: names whose values may change between the parts of a run.
    """
    old = flatten(load_config(str(out / "config.yaml")).to_dict())
    for name, value in _FORMER_DEFAULTS.items():
        if new.get(name) is None and old.get(name) == value:
            old[name] = None
    changed = sorted(k for k in new.keys() | old.keys() if old.get(k) != new.get(k))
    changed = [key for key in changed if key not in free]
    if changed:
        listed = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:5])
        raise ValueError(
            f"{out} holds a run with another configuration ({listed}): choose another "
            "out=, or give the same settings to resume it"
        )


def _check_same_data(data: DataSummary, state: RunState, out: Path, allowed: bool) -> str:
    """How the data differ from a checkpoint's, in words; ValueError where they may not.

    Checkpoints of before the data were recorded are taken as they are.
    """
    changes = data.changes(state.data) if state.data is not None else ""
    if changes and not allowed:
        raise ValueError(
            f"{out} holds a run on other data ({changes}): give the same data, choose another out= "
            f"(train.init={out} starts from its weights), or go on with --allow-data-change, which "
            "gives the examples another order from here"
        )
    return changes
