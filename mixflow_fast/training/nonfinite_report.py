"""What is written about a step whose loss or gradient was not finite: OUT/nonfinite/step_N/.

    report.json    samples with position, index, label, t, m and loss; gradient norms by module;
                   weights that are not finite; for each rank
    rank_R.pt      the same of a rank's whole micro-batch, and its data x1, as tensors

Losses are those that the step itself had. The rest comes from running the step's micro-batch once
more: positions fix its samples, noise and times, and nothing of it was kept. The weights have
changed since, or are not finite any more: the report says which ones it took.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mixflow_fast.checkpoints.run_folder import checkpoint_name, choose_checkpoint
from mixflow_fast.checkpoints.writing import temporary_name
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.data import Batch, BatchLoader, Dataset
from mixflow_fast.data.bucket_order import BucketOrder, bucket_sizes
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.files import sync, write_text
from mixflow_fast.messages import error_line
from mixflow_fast.training.build import FirstNetwork
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.step_record import BadStep, StepOutput

Network = Callable[[Tensor, Tensor, Tensor], Tensor | tuple[Tensor, list[Tensor]]]
# Samples that a report names for each rank.
NAMED = 16


def grad_norms(gradients: Mapping[str, Tensor | None]) -> dict[str, float]:
    """Norm of the gradient of each module's own parameters, by the module's name.

    Args:
        gradients: by parameter name; None where there is none.
    """
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        if gradient is not None:
            module = name.rpartition(".")[0] or name
            square = gradient.detach().float().square().sum()
            squares[module] = squares[module] + square if module in squares else square
    return {module: math.sqrt(float(square)) for module, square in squares.items()}


def damaged_weights(module: nn.Module) -> dict[str, int]:
    """Elements that are not finite, by name; of ZeRO 3's shards, what this rank has."""
    tensors = {n: getattr(p, "ds_tensor", p) for n, p in module.named_parameters()}
    counts = {n: int((~p.detach().isfinite()).sum()) for n, p in tensors.items()}
    return {name: count for name, count in counts.items() if count}


@dataclass(frozen=True)
class SampleReport:
    """A sample of a bad step. What an examination could not find is None.

    Attributes:
        position: global sample position, which fixes its noise and times.
        index: its place in the data; `file`: its file, where the data have one a sample.
        label: as the network saw it, maybe the null class.
        t, m: label and slowed time.
        loss: as the step had it; `loss_recomputed`: as the examination has it.
        data_not_finite: how many of its numbers are not finite, of its prompt too.
    """

    position: int
    index: int | None = None
    file: str | None = None
    label: int | None = None
    t: float | None = None
    m: float | None = None
    loss: float | None = None
    loss_recomputed: float | None = None
    data_not_finite: int | None = None

    def describe(self) -> str:
        """The sample in an error message."""
        if self.index is None:
            return f"the sample at position {self.position}"
        file = f" ({self.file})" if self.file is not None else ""
        bad = self.data_not_finite
        data = f", {bad} of its numbers are not finite" if bad else ""
        return (
            f"sample {self.index} of the data{file} at position {self.position}, label "
            f"{self.label}, t {self.t:.4g}, m {self.m:.4g}{data}"
        )


@dataclass(frozen=True)
class RankReport:
    """What one rank found of a bad step.

    Attributes:
        rank: its number.
        loss_of_micro_batches: as the step had them.
        micro_batch: the one that was run once more; None where that failed.
        samples_not_finite: how many losses were not finite.
        samples: these, or the largest losses; at most NAMED.
        grad_norm_by_module: of the micro-batch; empty under ZeRO 3, None where that failed.
        error: why it could not be run once more.
        weights_not_finite: elements that are not finite, by parameter.
    """

    rank: int
    loss_of_micro_batches: list[float]
    samples_not_finite: int
    samples: list[SampleReport]
    micro_batch: int | None = None
    grad_norm_by_module: dict[str, float] | None = None
    error: str | None = None
    weights_not_finite: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """What was found of a bad step: in one to three sentences, and what may help."""

    text: str
    advice: str


@dataclass(frozen=True)
class Examiner:
    """Finds the samples behind a bad step and writes what it found.

    Attributes:
        section: `train` of the configuration.
        out: run folder.
        dataset: what the run trains on, with its labels dropped as there.
        engine: the engine that the run trains with.
        forward: what a training step does with a network and a micro-batch.
        host_group: exchange between the ranks.
        device: device of this rank.
        first_network: makes the network that this part of the run began with.
    """

    section: TrainConfig
    out: Path
    dataset: Dataset
    engine: Engine
    forward: Callable[[Network, Batch], StepOutput]
    host_group: HostGroup
    device: torch.device
    first_network: FirstNetwork

    def report(self, bad: BadStep, now: int, folder: Path | None) -> Finding:
        """Find a bad step's samples and write the folder. Every rank must call it.

        Where bad steps change weights (all but `on_nonfinite: skip`), weights that are not finite
        are replaced by the newest checkpoint's or the first ones: the run must not go on with them.

        Args:
            bad: the step.
            now: the last step made.
            folder: OUT/nonfinite, or None to write nothing.

        Returns:
            what was found; the same on all ranks.
        """
        c, group = self.section, self.host_group
        weights = f"of step {now}" if now > bad.step else "of this step"
        damaged = damaged_weights(self.engine.module)
        if c.on_nonfinite != "skip" and any(group.all_gather(bool(damaged))):
            weights = self._replace_weights() or f"of step {now}, not finite"
        try:
            found, tensors = self._examine(bad, damaged)
        except Exception as error:
            # No memory left, perhaps on this rank alone: the run goes on.
            if c.zero_stage == 3:  # whose forward pass the other ranks wait in
                raise
            found, tensors = self._recorded(bad, damaged, error), {"loss": bad.each}
        ranks = group.all_gather(found)
        path = None
        if folder is not None:
            first = (bad.step - 1) * c.global_batch_size
            content = {
                "step": bad.step,
                "positions": [first, first + c.global_batch_size - 1],
                "grad_norm": bad.norm,
                "on_nonfinite": c.on_nonfinite,
                "examined_with": f"weights {weights}",
                "ranks": [asdict(rank) for rank in ranks],
            }
            path = self._write(folder, bad.step, content, tensors)
        return self._found(bad, ranks, path)

    def _replace_weights(self) -> str | None:
        """Finite weights for the examination; what they are."""
        with contextlib.suppress(ValueError):  # all damaged: the error that comes says more
            newest, _ = choose_checkpoint(self.out, self.host_group)
            if newest is not None and self.engine.load(newest):
                return f"of the checkpoint {newest.name}"
        if self.section.zero_stage == 3:
            return None
        try:
            first = self.first_network(HostGroup.alone(), whole=True).state_dict()
        except (ValueError, OSError):  # what the run began with is not there any more
            return None
        with torch.no_grad():
            for name, parameter in self.engine.module.named_parameters():
                parameter.copy_(first[name])
        return "that this part of the run began with"

    def _indices(self, positions: Tensor) -> Tensor:
        """(B,) which samples of the dataset stand at global positions."""
        c = self.section
        order = BucketOrder(
            bucket_sizes(self.dataset), seed=c.seed, global_batch_size=c.global_batch_size
        )
        return order(positions.cpu())

    def _examine(
        self, bad: BadStep, damaged: dict[str, int]
    ) -> tuple[RankReport, dict[str, Tensor]]:
        """The worst micro-batch of this rank in the step, run once more."""
        wrong = ~bad.each.isfinite()
        order = wrong.sum(1) + (~bad.losses.isfinite()).int()
        # Where every loss is finite, the largest: its gradient may not have been.
        part = int(order.argmax()) if order.any() else int(bad.losses.argmax())
        batch = self._micro_batch(bad, part)
        made, norms = self._run(batch)
        tensors = {
            "positions": batch.positions,
            "indices": self._indices(batch.positions),
            "y": made.y.cpu(),
            "t": made.it.t.cpu(),
            "slowed_t": made.it.slowed_t.cpu(),
            "loss": bad.each[part],
            "loss_recomputed": made.samples.cpu(),
            "x1": made.it.x1.cpu(),
            "data_not_finite": _not_finite(made.it.x1, *made.cond.values()).cpu(),
        }
        suspects = wrong[part].nonzero()[:, 0].tolist()
        suspects = suspects or bad.each[part].argsort(descending=True).tolist()
        found = RankReport(
            rank=self.host_group.rank,
            loss_of_micro_batches=bad.losses.tolist(),
            micro_batch=part,
            samples_not_finite=int(wrong.sum()),
            samples=[self._sample(i, tensors) for i in suspects[:NAMED]],
            grad_norm_by_module=norms,
            weights_not_finite=damaged,
        )
        return found, tensors

    def _micro_batch(self, bad: BadStep, part: int) -> Batch:
        loader = BatchLoader(
            self.dataset,
            seed=self.section.seed,
            global_batch_size=self.section.global_batch_size,
            microbatch_size=bad.each.shape[1],
            rank=self.host_group.rank,
            world_size=self.host_group.ranks,
            start_position=(bad.step - 1) * self.section.global_batch_size,
        )
        with loader:
            return [next(loader) for _ in range(part + 1)][-1]

    def _run(self, batch: Batch) -> tuple[StepOutput, dict[str, float]]:
        """Forward pass and, but under ZeRO 3, gradient norms by module."""
        module = self.engine.module
        # ZeRO 3 gathers weights for its own backward pass only.
        with_gradients = self.section.zero_stage < 3
        with torch.enable_grad() if with_gradients else torch.no_grad():
            made = self.forward(module, batch.to(self.device))
        if not with_gradients:
            return made, {}
        trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(made.loss, list(trained.values()), allow_unused=True)
        return made, grad_norms(dict(zip(trained, gradients, strict=True)))

    def _sample(self, place: int, tensors: Mapping[str, Tensor]) -> SampleReport:
        """One sample of the micro-batch that was run once more."""
        index = int(tensors["indices"][place])
        files = getattr(self.dataset, "files", ())
        return SampleReport(
            position=int(tensors["positions"][place]),
            index=index,
            file=str(files[index]) if len(files) == len(self.dataset) else None,
            label=int(tensors["y"][place]),
            t=float(tensors["t"][place]),
            m=float(tensors["slowed_t"][place]),
            loss=float(tensors["loss"][place]),
            loss_recomputed=float(tensors["loss_recomputed"][place]),
            data_not_finite=int(tensors["data_not_finite"][place]),
        )

    def _recorded(self, bad: BadStep, damaged: dict[str, int], error: Exception) -> RankReport:
        """What `_examine` finds, of what was noted during the step alone."""
        size, start = bad.each.shape[1], (bad.step - 1) * self.section.global_batch_size
        rank, ranks = self.host_group.rank, self.host_group.ranks
        wrong = (~bad.each.isfinite()).nonzero().tolist()
        places = [start + (part * ranks + rank) * size + i for part, i in wrong]
        return RankReport(
            rank=rank,
            loss_of_micro_batches=bad.losses.tolist(),
            samples_not_finite=len(wrong),
            samples=[SampleReport(place) for place in places[:NAMED]],
            error=error_line(error, 200),
            weights_not_finite=damaged,
        )

    def _write(
        self, folder: Path, step: int, content: Mapping[str, object], tensors: dict[str, Tensor]
    ) -> Path | None:
        """The folder of one step, complete or not there; None where it could not be written."""
        final, temporary = folder / checkpoint_name(step), folder / temporary_name(step)
        failed = False
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            file = temporary / f"rank_{self.host_group.rank}.pt"
            torch.save(tensors, file)
            sync(file)
            if self.host_group.rank == 0:
                text = json.dumps(_plain(content), indent=1, allow_nan=False)
                write_text(temporary / "report.json", text)
        except (OSError, RuntimeError):  # a full disk must not hide what happened
            failed = True
        failed = any(self.host_group.all_gather(failed))
        if self.host_group.rank == 0:
            with contextlib.suppress(OSError):
                if not failed:
                    shutil.rmtree(final, ignore_errors=True)
                    os.rename(temporary, final)
                    sync(folder)
            shutil.rmtree(temporary, ignore_errors=True)
        return None if failed else final

    def _found(self, bad: BadStep, ranks: list[RankReport], path: Path | None) -> Finding:
        batch = self.section.global_batch_size
        first = (bad.step - 1) * batch
        losses = [loss for rank in ranks for loss in rank.loss_of_micro_batches]
        text = (
            f"loss {sum(losses) / len(losses):g}, gradient norm {bad.norm:g} at step {bad.step} "
            f"(samples at positions {first} to {first + batch - 1})."
        )
        advice = _ADVICE
        if (weights := self._blame_of_weights(bad, ranks)) is not None:
            text, advice = f"{text} Not finite: {weights}", _ADVICE_ON_WEIGHTS
        else:
            text = f"{text} {_name_samples(ranks)}"
        for rank in ranks:
            if rank.error is not None:
                text += f" Rank {rank.rank} could not run it once more ({rank.error})."
        return Finding(text + (f" See {path}." if path is not None else ""), advice)

    def _blame_of_weights(self, bad: BadStep, ranks: list[RankReport]) -> str | None:
        """A sentence where the weights and not single samples are the cause, else None."""
        samples = [sample for rank in ranks for sample in rank.samples]
        batch = self.section.global_batch_size
        every = sum(rank.samples_not_finite for rank in ranks) == batch
        # Of one sample alone it cannot be told. None: a rank could not look at its data.
        if not every or batch < 2 or any(s.data_not_finite != 0 for s in samples):
            return None
        init = self.section.init
        whose = ""
        if bad.step == 1:
            folder = self.first_network.section.folder
            whose = ", which are random" if folder is None else f", of model.folder={folder}"
            whose = whose if init is None else f", of train.init={init}"
        return (
            "the loss of every sample, while their data are finite: the cause is the weights of "
            f"this step{whose}, and not a sample."
        )


def _not_finite(*values: Tensor) -> Tensor:
    """(M,) how many numbers of each of M samples are not finite."""
    return sum((~value.isfinite()).flatten(1).sum(1) for value in values)


def _name_samples(ranks: list[RankReport]) -> str:
    """A sentence on the samples whose loss was not finite."""
    count = sum(rank.samples_not_finite for rank in ranks)
    if not count:
        return "Every sample's loss was finite: the gradient alone was not."
    named = [s for rank in ranks if rank.samples_not_finite for s in rank.samples]
    listed = "; ".join(sample.describe() for sample in named[:4])
    return f"Not finite: {listed}{f' and {count - 4} more' if count > 4 else ''}."


_ADVICE = (
    "Mend or remove samples whose data are not finite; lower optim.lr or set optim.grad_clip; or "
    "resume with train.on_nonfinite=skip"
)
_ADVICE_ON_WEIGHTS = (
    "Choose another checkpoint as train.init (mixflow-fast inspect looks at its values), or lower "
    "optim.lr and set optim.grad_clip; to skip steps would not help"
)


def _plain(value: object) -> object:
    """As JSON has it, which knows no NaN: they become text. What is None is left out."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
