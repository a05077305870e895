"""Post-training loop around an engine. The way of a batch is in `train_step` and `forward`.

Every draw is a function of (seed, global position), so a run's examples and noise do not depend on
the number of ranks, the micro-batch or interruptions: resuming needs a counter and the engine's
state. Nothing in a step waits for the device; the loss is read every `train.log_every` steps.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.checkpoints.resume import find
from mixflow_fast.checkpoints.run_folder import RunFolder, RunState, choose_checkpoint, read_state
from mixflow_fast.checkpoints.writing import SaveInProgress
from mixflow_fast.config.schema import Config
from mixflow_fast.config.validate import validate
from mixflow_fast.data import Batch
from mixflow_fast.data.label_dropout import LabelDropout, drop_labels
from mixflow_fast.distributed import heartbeat, lost_ranks, process_group
from mixflow_fast.distributed.stop_signal import StopSignal
from mixflow_fast.environment import current_environment
from mixflow_fast.files import user_path
from mixflow_fast.kernels import runtime
from mixflow_fast.metrics.data_wait import DataWaitWatch
from mixflow_fast.metrics.throughput import Throughput
from mixflow_fast.models.dinov2 import PRECISIONS
from mixflow_fast.models.flops import peak_tflops
from mixflow_fast.models.weights.metadata import Metadata
from mixflow_fast.objective.rollout import roll_in
from mixflow_fast.reports.previews import PreviewOptions
from mixflow_fast.reports.text_previews import TextPreviewOptions
from mixflow_fast.training.attention import agree_on_attention, describe_network
from mixflow_fast.training.build import FirstNetwork, RunParts, build_engine, build_run
from mixflow_fast.training.costs import run_flops
from mixflow_fast.training.data_report import agree_on_data
from mixflow_fast.training.determinism import (
    Determinism,
    compare_bits,
    describe_determinism,
    what_bits_depend_on,
)
from mixflow_fast.training.duty import Duty, RunContext, Timetable
from mixflow_fast.training.ema_writer import EmaSnapshots, describe_averages
from mixflow_fast.training.encoders import describe_encoder
from mixflow_fast.training.engines import meet
from mixflow_fast.training.loading import (
    Loader,
    LoaderOrder,
    build_loader,
    describe_loader,
    ways_out,
)
from mixflow_fast.training.nonfinite_guard import (
    GuardState,
    NonFiniteGuard,
    RollBack,
    TrainingDiverged,
)
from mixflow_fast.training.nonfinite_report import Examiner, Network
from mixflow_fast.training.periodic import (
    Logging,
    Previews,
    Validation,
    WatchedCopy,
    validation_loss,
)
from mixflow_fast.training.run_log import RunLog, TrainResult
from mixflow_fast.training.saving import Checkpoints, begin_save
from mixflow_fast.training.source import (
    build_health,
    describe_source,
    describe_start,
    example_numel,
    follow_network,
    wants_labels,
)
from mixflow_fast.training.step_record import OnStep, StepOutput, StepRecord
from mixflow_fast.training.text_previews import TextPreviews, text_preview_options


class Trainer:
    """One run: everything is checked and built here, `run` trains.

    Args:
        config: configuration of the run.
        resume: "auto" continues the run in `config.out` if there is one, "never" refuses a folder
            that already holds one.
        quiet: print no progress.
        recipe: where the configuration came from, for the run's report.
        allow_data_change: resume though the data are not those of the checkpoint.

    Attributes:
        step: optimizer steps done.
        model, mix, dataset, alignment: network, objective, examples and REPA's term.
        inputs: what the network trains on, from a batch on the device.
        conditions: what the network is told beside x and t, from such a batch.
        engine: DeepSpeed, or DDP, around the network.
        guard: what to do with steps that are not finite.
        objective: description of the implementation that runs.
        attention: the chosen attention backends.
        on_step: a hook, None by default; see `OnStep`.

    Raises:
        ValueError: anything wrong with the configuration, data, starting weights or the run folder,
            before anything is written.
    """

    def __init__(
        self,
        config: Config,
        resume: str = "auto",
        quiet: bool = False,
        recipe: str | None = None,
        allow_data_change: bool = False,
    ) -> None:
        if resume not in ("auto", "never"):
            raise ValueError(f'resume must be "auto" or "never", got {resume!r}')
        ranks = process_group.world_size()
        validate(config, ranks)
        self.config, self.out, self._recipe = config, user_path(config.out), recipe
        self._again = "the same command" + " with --resume auto" * (resume == "never")
        self.microbatch = config.microbatch(ranks)
        self.quiet = quiet or process_group.rank() > 0
        self.on_step: OnStep | None = None
        self._determinism = Determinism(config.train.deterministic)  # before CUDA starts
        self.device = process_group.local_device(config.train.device)
        parts = build_run(config, self.device)
        self.mix, self.alignment, self.dataset = parts.mix, parts.alignment, parts.dataset
        self._rollout_steps = config.objective.rollout_steps
        self.inputs, self._dtype = parts.inputs, PRECISIONS[config.train.precision]
        self.conditions = parts.conditions
        self._source_record, self._drops_here = parts.source, wants_labels(parts.mix)
        # After the parts: a rank whose data are not there ends before the others wait for it.
        self.host_group, self._save_group = meet(config.train, ranks)
        group = self.host_group
        self._data = agree_on_data(parts.dataset, config.data, config.model, self.host_group)
        self._folder = RunFolder(self.out, self.host_group)
        with heartbeat.watching(), self._folder.closed_on_error(), self._determinism.on():
            data, allowed = self._data.summary, allow_data_change
            self._start = find(config, self._folder, ranks, data, resume, allowed)
            self._first_network = FirstNetwork(
                config.model,
                config.train.init,
                self._start,
                parts.source,
                config.source.frozen,
                config.lora,
                config.train.precision,
            )
            self.model = self._first_network(group)
            follow_network(self.mix, self.model)
            self.alignment.move_teacher()
            self.inputs.move_encoder(self.device)
            self.model.set_execution(parts.execution)
            self._used_before = self._start.attention if config.model.attention == "auto" else None
            shape = self.microbatch, config.train.precision, self.device
            self.attention = agree_on_attention(self.model, shape, group, self._used_before)
            self.engine = build_engine(config.train, config.optim, self.microbatch, self.model)
            self._watch(parts)
            self._folder.make(config.to_yaml(), self._start.checkpoint, bool(self._start.finished))
            self.engine.start(self._start.checkpoint, resharded=bool(self._start.resharded_from))
            self.step = self._start.step
            self._saved = self.step if self._start.checkpoint else -1
            self._resharded = bool(self._start.resharded_from) and not self._start.finished
            self.guard = self._build_guard()
            self._source_health = build_health(self.mix, config.train, config.steps, group)
            self._stop = StopSignal(ranks, process_group.timeout())

    @property
    def examples(self) -> LabelDropout:
        """The dataset with the labels that the network is trained on, some of them dropped.

        Where the source sees the class, `forward` drops them, for the network alone.
        """
        probability = 0.0 if self._drops_here else self.config.train.label_dropout
        return LabelDropout(self.dataset, probability, self.model.null_class)

    @property
    def images_seen(self) -> int:
        """Training images so far, over all ranks."""
        return self.step * self.config.train.global_batch_size

    @property
    def _ended(self) -> bool:
        return self.step >= self.config.steps

    def run(self) -> TrainResult:
        """Train to the end, or to the first SIGINT or SIGTERM; either way leave a checkpoint.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; nothing of it is saved.
        """
        weights = self._first_network.weights
        messages = self._start.describe(self.out, self.config.steps, weights)
        messages += compare_bits(self.out, self._start.state, self._bits)
        try:
            with heartbeat.watching(), self._stop.installed(), lost_ranks.roll_call():
                while not self._train(messages):
                    messages = [self._go_back()]
        finally:
            self.close()
        return TrainResult(self.out, self.step, self.images_seen, self._ended)

    def close(self) -> None:
        """Let go of the run folder, and take back what the engine changed for the process."""
        self._folder.close()
        self.engine.close()
        self._determinism.off()

    def _train(self, messages: list[str]) -> bool:
        """Train from this step on; False where a step was bad and the run is to go back."""
        with self._open_log(messages) as log, self.loader() as loader:
            duties, checkpoints = self._duties(log)
            self._throughput.waited = loader.wait
            self._throughput.restart()
            try:
                with checkpoints.kept():
                    if self._wants_a_checkpoint_first():
                        checkpoints.run(self.step)
                        checkpoints.finish()
                    while True:
                        for duty in duties:
                            if duty.due(self.step):
                                duty.run(self.step)
                        if self._ended or self._stop.requested():
                            break
                        self.train_step(loader)
                        self._throughput.add(self.config.train.global_batch_size)
                        log.step()
                    if self._saved != self.step:  # asked to stop
                        checkpoints.run(self.step)
                    checkpoints.finish()
            except RollBack as bad:
                log.log(f"{self.out}: {bad}")
                return False
            if not self._ended:
                log.log(f"{self.out}: stopped after step {self.step}; {self._again} resumes")
        return True

    def train_step(self, loader: Loader) -> Tensor:
        """One optimizer step over the next micro-batches of a loader. Every rank must call it.

        Returns:
            (2,) float32 on the device: this rank's mean loss, and the alignment term in it before
            its weight; NaN for a step that the run passes over after going back before it.
        """
        if self.step + 1 in self.guard.state.left_out:
            # Its samples are drawn all the same, so that later steps see what they would have.
            for _ in range(loader.microsteps):
                next(loader)
            self.step += 1
            return torch.full((2,), torch.nan)
        end = self.images_seen + self.config.train.global_batch_size
        self.engine.set_lr(self._learning_rate(end))
        record = self.guard.record
        outputs: list[StepOutput] = []
        looked = False
        for _ in range(loader.microsteps):
            batch = next(loader)
            if self.on_step is not None:  # who may keep it
                batch = batch.map(torch.clone)
            with self._throughput.working:
                made = self.forward(self.engine, batch.to(self.device))
            if self._source_health is not None and not looked:
                self._source_health.look(self.step + 1, made)
                looked = True
            self.engine.backward(record.micro_batch(made))
            self.engine.step()
            if self.on_step is not None:
                outputs.append(made)
        self.step += 1
        # On the device: to read a loss here would be to wait for it.
        means = record.end_step(self.step, self.engine.grad_norm())
        if self.on_step is not None:
            self.on_step(self.step, outputs, means)
        return means

    def forward(self, net: Network, batch: Batch) -> StepOutput:
        """From a micro-batch on the device to its loss.

        Args:
            net: the engine, or the network itself.
            batch: M examples, of the loader.
        """
        own, batch = batch.y, self._dropped(batch)
        self.engine.module.set_draws(self.config.train.seed, batch.positions)
        it = self.mix.prepare(self.inputs(batch), ids=batch.positions, dtype=self._dtype, y=own)
        cond = self.conditions(batch)
        if self._rollout_steps:
            it = roll_in(self.mix, net, it, cond, self._rollout_steps)
        output = net(it.x, it.t, cond)
        pred, zs = output if isinstance(output, tuple) else (output, None)
        alignment = self.alignment(self.engine.module, zs, batch, it)
        loss, samples = self.mix.loss_and_samples(pred, it)
        if self.alignment.weight or zs is not None:
            loss = loss + self.alignment.weight * alignment
        prompts = {} if isinstance(cond, Tensor) else cond
        return StepOutput(it, batch.y, pred, alignment, loss, samples, prompts)

    def _dropped(self, batch: Batch) -> Batch:
        """The batch as the network sees it: the same labels are dropped as in the loader."""
        null, probability = self.model.null_class, self.config.train.label_dropout
        if not self._drops_here or not probability:
            return batch
        seed = self.config.train.seed
        y = drop_labels(batch.y, batch.positions, seed, probability, null)
        return dataclasses.replace(batch, y=y)

    def save(self) -> Path:
        """Write a resumable checkpoint; complete or not there. Every rank must call it.

        Not from `on_step`: `run` may be writing one, and exchanges of two saves would mix.

        Raises:
            SaveError: a rank could not write (a full disk); on all. Older checkpoints stay.
        """
        return self.begin_save().wait()

    def begin_save(self) -> SaveInProgress:
        """Begin to write a checkpoint; a thread does it. Every rank must call it."""
        c = self.config.train
        state = RunState(
            metadata=self._metadata(),
            step=self.step,
            images_seen=self.images_seen,
            world_size=self.host_group.ranks,
            attention=[choice.backend for choice in self.attention] or None,
            safety=asdict(self.guard.state),
            data=self._data.summary.to_record(),
            bits=self._bits,
        )
        weights = c.save_weights == "always" or (c.save_weights == "end" and self._ended)
        self._saved, self._resharded = self.step, False
        return begin_save(self.out, self.engine, state, c, self._save_group, weights)

    def _go_back(self) -> str:
        """Load the newest checkpoint; returns a line on what was done."""
        newest, _ = choose_checkpoint(self.out, self.host_group)
        if newest is None or not self.engine.load(newest):
            raise TrainingDiverged(f"{self.out} holds no checkpoint to go back to")
        self.step = self._saved = read_state(newest).step
        self.watched.release()
        left_out = self.guard.state.left_out[-1]
        return f"{self.out}: back after step {self.step}, without {left_out} now"

    def _wants_a_checkpoint_first(self) -> bool:
        """Whether there is nothing to go back to: no checkpoint, or shards cut for other ranks."""
        return self.config.train.on_nonfinite == "rollback" and (self._saved < 0 or self._resharded)

    def _learning_rate(self, images_seen: int) -> float:
        return self.config.optim.rate_at(images_seen, self.config.train.images)

    def _metadata(self) -> dict[str, str | int]:
        """Metadata of a weights file at this step."""
        return Metadata(
            kwargs=self.model.config,
            clock=self.model.clock,
            prediction=self.config.objective.prediction,
            steps=self.step,
            images_seen=self.images_seen,
            config=json.dumps(self.config.to_dict()),
            source=self._source_record,
        ).to_record()

    @property
    def _bits(self) -> dict[str, str] | None:
        """What the last bits of a deterministic run depend on and may change on a resume."""
        split = self.host_group.ranks, self.microbatch
        run = self.device, self.model.execution, self.objective
        return what_bits_depend_on(self.config.train, split, *run)

    def describe_network(self) -> str:
        """How the network is run: mode, attention, checkpointing."""
        return describe_network(self.model, self.attention, self._used_before)

    def _describe_source(self) -> str:
        record = self._source_record
        if record is None:
            return ""
        how = describe_start(self.config.train.init, self._start.checkpoint is not None)
        return describe_source(self.mix, record, how, example_numel(self.model))

    def _watch(self, parts: RunParts) -> None:
        """What looks at the run from outside: costs, previews, validation."""
        c, group = self.config.train, self.host_group
        self._train_flops = flops = run_flops(parts.model, parts.conditions, parts.dataset)
        fused = runtime.use_kernels(self.mix.impl, self.device)
        self.objective = "Triton kernels" if fused else "PyTorch reference"
        on_gpu = self.device.type == "cuda" and c.precision == "bf16"
        peak = peak_tflops(torch.cuda.get_device_name(self.device)) if on_gpu else None
        self._previews = self._preview_options()
        self._throughput = Throughput(self.device, flops, peak, group.ranks, group.all_gather)
        kept = bool(c.validate_every or (c.preview_every and group.rank == 0))
        shares = c.zero_stage < 3
        self.watched = WatchedCopy(self.model, c.precision, self.device, kept, shares)
        self._validation = validation_loss(
            parts.validation, self.mix, self.device, (self.inputs, self.conditions), c, group
        )

    def _preview_options(self) -> PreviewOptions | TextPreviewOptions:
        config, c, shift = self.config, self.config.train, self.config.objective.shift
        if config.model.is_text_to_image and c.preview_every:
            return text_preview_options(c, config.model, shift, self.dataset)
        return PreviewOptions.of(c, config.model, shift, config.latent, config.encoder.stats)

    def _build_guard(self) -> NonFiniteGuard:
        c, state = self.config.train, self._start.state
        steps = min(c.log_every, self.config.steps)
        parts = c.global_batch_size // (self.microbatch * self.host_group.ranks)
        return NonFiniteGuard(
            c,
            self.out,
            StepRecord(self.device, steps, parts, self.microbatch),
            Examiner(
                section=c,
                out=self.out,
                dataset=self.examples,
                engine=self.engine,
                forward=self.forward,
                host_group=self.host_group,
                device=self.device,
                first_network=self._first_network,
            ),
            aligned=bool(self.config.objective.alignment_weight),
            state=None if state is None else GuardState.from_record(state.safety),
        )

    def loader(self) -> Loader:
        """Micro-batches of this rank from this step on."""
        c = self.config
        order = LoaderOrder.of(c.train, self.microbatch, self.host_group, self.images_seen)
        return build_loader(c.data, self.examples, order, self.device)

    def _open_log(self, messages: list[str]) -> RunLog:
        """Begin the record of this part of the run, and tell people what runs."""
        c = self.config.train
        log = RunLog(
            self.out,
            self.step,
            self.config.steps,
            section=c,
            config=self.config.to_dict(),
            writes=self.host_group.rank == 0 and not self._start.finished,
            quiet=self.quiet,
        )
        facts = {
            "objective": f"{self.objective} on {self.device}",
            "source": self._describe_source(),
            "network": self.describe_network(),
            "averages": describe_averages(self.config.optim, self.config.steps),
            "data": self._data.what,
            "decoder": describe_loader(self.config.data, self.dataset, self.device),
            "encoder": describe_encoder(self.config.encoder, self.inputs.encoder),
            "deterministic": describe_determinism(c.deterministic, self.device),
        }
        log.start(
            self.step,
            {name: fact for name, fact in facts.items() if fact},
            ranks=self.host_group.ranks,
            clock=self.model.clock,
            train_gflops_per_image=self._train_flops and self._train_flops / 1e9,
            recipe=self._recipe,
            environment=current_environment(self.device).to_dict(),
        )
        where = f"previews: {self.out / 'previews'}: {self._previews.caption()}"
        for line in (*self._data.lines[1:], *([where] if c.preview_every else []), *messages):
            log.log(line)
        self.guard.log = log.log
        return log

    def _duties(self, log: RunLog) -> tuple[list[Duty], Checkpoints]:
        """What is done between steps, in this order; and its last, the checkpoints."""
        c, p, total, step = self.config.train, self.config.optim, self.config.steps, self.step
        beginning = step or -1  # a resumed run has looked at that step already
        context = RunContext(self.out, self.engine, self.host_group, self._throughput, log)
        check, batch = self.guard.check, c.global_batch_size
        rows = Timetable(c.log_every, total, step)
        data_wait = DataWaitWatch(ways_out(self.config.data), step)
        rate, health = self._learning_rate, self._source_health
        duties: list[Duty] = [Logging(context, rows, self.guard, rate, batch, data_wait, health)]
        if c.preview_every:
            duties.append(self._preview_duty(context, Timetable(c.preview_every, total, beginning)))
        if self._validation is not None:
            when = Timetable(c.validate_every, total, beginning)
            duties.append(Validation(context, when, self._validation, self.watched))
        if p.ema_sigma_rel:
            when = Timetable(p.snapshot_every or c.save_every, total, step)
            duties.append(EmaSnapshots(context, when, p.ema_sigma_rel, self._metadata, check))
        when = Timetable(c.save_every, total, step)
        checkpoints = Checkpoints(context, when, check, self.begin_save)
        self.guard.settle = checkpoints.settle
        return [*duties, checkpoints], checkpoints

    def _preview_duty(self, context: RunContext, when: Timetable) -> Duty:
        options, watched = self._previews, self.watched
        if isinstance(options, PreviewOptions):
            return Previews(context, when, options, watched, self._source_record)
        prompts = self.dataset.prompts
        return TextPreviews(context, when, options, watched, prompts, self.conditions)


def train(
    config: Config,
    resume: str = "auto",
    quiet: bool = False,
    recipe: str | None = None,
    allow_data_change: bool = False,
) -> TrainResult:
    """Build a `Trainer` and run it; arguments and errors as there."""
    return Trainer(config, resume, quiet, recipe, allow_data_change).run()
