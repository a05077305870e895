"""Post-training loop on DeepSpeed. The way of a batch is in `Trainer._step`, top to bottom.

Every draw is a function of (seed, global position), so a run's examples and noise do not depend on
the number of ranks, the micro-batch or interruptions: resuming needs a counter and DeepSpeed's
state. Nothing in a step waits for the device; the loss is read every `train.log_every` steps.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from mixflow_fast import files
from mixflow_fast.checkpoints import run_folder
from mixflow_fast.checkpoints.resume import check_resume, resharded_from, start_from
from mixflow_fast.checkpoints.shards import fill_network
from mixflow_fast.config.schema import Config
from mixflow_fast.config.validate import validate
from mixflow_fast.data import Batch, BatchLoader
from mixflow_fast.distributed import lost_ranks, process_group
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.distributed.stop_signal import StopSignal
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.attention.choice import AttentionChoice
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.metrics.progress import Progress
from mixflow_fast.models import save_weights
from mixflow_fast.optim.lr_schedule import learning_rate
from mixflow_fast.training.alignment import Alignment
from mixflow_fast.training.build import build_data, build_execution, build_model, build_objective
from mixflow_fast.training.ema_writer import SnapshotWriter, describe_averages
from mixflow_fast.training.engine import Engine
from mixflow_fast.training.nonfinite_guard import NonFiniteGuard, RollBack, TrainingDiverged
from mixflow_fast.training.periodic import Monitor
from mixflow_fast.training.step_record import StepOutput


@dataclass(frozen=True)
class TrainResult:
    """What a run left: its folder, steps and images done, and whether it reached its end."""

    out: Path
    step: int
    images_seen: int
    finished: bool

    @property
    def weights(self) -> Path:
        """Official-layout checkpoint with "model" and "ema"."""
        return self.out / "weights.pt"


class Trainer:
    """One run: everything is checked and built here, `run` trains.

    Args:
        config: the run's configuration.
        resume: "auto" continues the run in `config.out` if there is one, "never" refuses a folder
            that already holds one.
        quiet: print no progress.
        recipe: where the configuration came from, for the run's report.

    Raises:
        ValueError: anything wrong with the configuration, data, starting weights or the run folder,
            before anything is written.
    """

    def __init__(
        self, config: Config, resume: str = "auto", quiet: bool = False, recipe: str | None = None
    ) -> None:
        if resume not in ("auto", "never"):
            raise ValueError(f'resume must be "auto" or "never", got {resume!r}')
        self.config = config
        self.out = Path(config.out)
        ranks = process_group.world_size()
        validate(config, ranks)
        self.model = build_model(config)
        self.mix = build_objective(config, self.model.clock)
        self.dataset = build_data(config)
        self.device = process_group.init_process_group(
            config.train.device, 60 * config.train.timeout_minutes
        )
        self._host_group = HostGroup(process_group.timeout())
        self._lock: IO[str] | None = None
        try:
            self._prepare(config, resume, quiet, recipe, ranks)
        except BaseException:
            self._unlock()
            raise

    def _prepare(
        self, config: Config, resume: str, quiet: bool, recipe: str | None, ranks: int
    ) -> None:
        if (self.out / "checkpoints").is_dir():
            self._take_lock()  # another run may be writing its last checkpoint
        chosen = run_folder.choose_checkpoint(self.out, self._host_group, set_aside=True)
        self._resume_from, self._passed_over = chosen
        self.step = 0
        self._resharded_from = ""
        self._attention_before: list[str] | None = None
        state: dict[str, Any] = {}
        if self._resume_from is not None:
            if resume == "never":
                raise ValueError(
                    f"{self.out} already holds a run (step {self._resume_from.name}): choose "
                    "another out=, delete it, or resume with --resume auto"
                )
            state = check_resume(config, self._resume_from)
            self.step = state["step"]
            if config.model.attention == "auto":
                self._attention_before = state.get("attention")
            self._resharded_from = resharded_from(config, self._resume_from, ranks)
            fill_network(self.model, self._resume_from, trained=bool(self._resharded_from))
        elif (self.out / "weights.pt").exists():
            raise ValueError(
                f"{self.out} holds weights.pt of a run whose checkpoints are gone: choose another "
                f"out= (train.init={self.out} starts from those weights), or delete it"
            )
        elif config.train.init is not None:
            start_from(self.model, run_folder.weights_file(config.train.init))
        self.alignment = Alignment(config, self.mix, self.device)
        fused = runtime.use_kernels(self.mix.impl, self.device)
        self.objective = "Triton kernels" if fused else "PyTorch reference"
        self.model.set_execution(build_execution(config, self.device))
        self.attention = self._choose_attention(ranks)
        self.engine = Engine(config, self.model, self.device)
        self.monitor = Monitor(config, self.model, self.device, self._host_group)
        self.snapshots = SnapshotWriter(config, self._host_group)
        self._recipe = recipe
        self._prepare_folder()
        self.engine.start(self._resume_from, resharded_from=bool(self._resharded_from))
        run = config, self.mix, self.dataset, self.engine, self._forward
        self.guard = NonFiniteGuard(*run, self._host_group, self.device, state.get("safety"))
        self._saved = self.step if self._resume_from else -1
        self.quiet = quiet or process_group.rank() > 0
        self._stop = StopSignal(ranks, process_group.timeout())

    @property
    def images_seen(self) -> int:
        """Training images so far, over all ranks."""
        return self.step * self.config.train.global_batch_size

    def run(self) -> TrainResult:
        """Train to the end, or to the first SIGINT or SIGTERM; either way leave a checkpoint.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; nothing of it is saved.
        """
        messages = self._describe_start()
        try:
            with self._stop.installed(), lost_ranks.roll_call():
                while not self._train(messages):
                    messages = [self._go_back()]
        finally:
            self._unlock()
            self.engine.close()
        return TrainResult(self.out, self.step, self.images_seen, self.step >= self.config.steps)

    def _train(self, messages: list[str]) -> bool:
        """From this step on; False where a step was bad and the run is to go back."""
        c, total = self.config.train, self.config.steps
        loader = BatchLoader(
            self.dataset,
            seed=c.seed,
            global_batch_size=c.global_batch_size,
            microbatch_size=self.config.microbatch(process_group.world_size()),
            rank=process_group.rank(),
            world_size=process_group.world_size(),
            start_position=self.images_seen,
            num_workers=self.config.data.workers,
        )
        progress = Progress(total, self.step, self.out.name, self.quiet)
        facts = {"objective": f"{self.objective} on {self.device}",
                 "network": self._describe_network(),
                 "averages": describe_averages(self.config)}  # fmt: skip
        for name, words in facts.items():
            progress.log(f"{name}: {words}")
        metrics = self.monitor.open(self.step, progress.log, **facts, recipe=self._recipe)
        self.guard.log = progress.log
        for line in messages:
            progress.log(line)
        window = _Window()
        try:
            with loader:
                if c.on_nonfinite == "rollback" and (self._saved < 0 or self._resharded_from):
                    self.save()  # else there is nothing to go back to
                window.started += self.monitor.look(self.engine, self.step)
                while self.step < total and not self._stop.requested():
                    self._step(loader)
                    window.images += c.global_batch_size
                    progress.step()
                    if self.step % c.log_every == 0 or self.step == total:
                        row = self._metrics_row(window)
                        window = _Window()
                        if metrics is not None:
                            metrics.write(row)
                        progress.report(row)
                    window.started += self.monitor.look(self.engine, self.step)
                    self.snapshots.look(self.engine, self.step, self._metadata(), self.guard.check)
                    if c.save_every and self.step % c.save_every == 0:
                        started = time.perf_counter()
                        self.guard.check()
                        self.save()
                        window.started += time.perf_counter() - started
                if self._saved != self.step:
                    self.guard.check()
                    self.save()
        except RollBack as bad:
            progress.log(f"{self.out}: {bad}")
            return False
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()
        if self.step < total:
            progress.log(f"{self.out}: stopped after step {self.step}; the same command resumes")
        return True

    def _go_back(self) -> str:
        """To the newest checkpoint; what was done, in words."""
        newest, _ = run_folder.choose_checkpoint(self.out, self._host_group)
        if newest is None or not self.engine.load(newest):
            raise TrainingDiverged(f"{self.out} holds no checkpoint to go back to")
        self.step = self._saved = run_folder.read_state(newest)["step"]
        return f"{self.out}: back after step {self.step}, without {self.guard.left_out[-1]} now"

    def _step(self, loader: BatchLoader) -> Tensor:
        """One optimizer step; this rank's mean (loss, alignment term in it), on the device."""
        if self.step + 1 in self.guard.left_out:  # the run went back before it
            nothing = [torch.nan for _ in range(loader.microsteps) if next(loader)]
            self.step += 1
            return torch.tensor(nothing)
        end = self.images_seen + self.config.train.global_batch_size
        self.engine.set_lr(self._learning_rate(end))
        totals = torch.zeros(2, device=self.device)
        for _ in range(loader.microsteps):
            with self.monitor.waiting:
                batch = next(loader)
            made = self._forward(self.engine, batch.to(self.device))
            loss = self.guard.record.micro_batch(made.loss, self.mix, made.pred, made.it)
            self.engine.backward(loss)
            self.engine.step()
            totals += torch.stack([made.loss, made.alignment]).detach()
        self.step += 1
        means = totals / loader.microsteps
        self.guard.record.end_step(self.step, means, self.engine.grad_norm())
        return means

    def _forward(self, net: Any, batch: Batch) -> StepOutput:
        y = self._drop_labels(batch.y, batch.positions)
        it = self.mix.prepare(batch.x, ids=batch.positions)
        output = net(it.x, it.t, y)
        pred, zs = output if isinstance(output, tuple) else (output, None)
        alignment = self.alignment(self.engine.module, zs, batch, it, y)
        loss = self.mix.loss(pred, it) + self.alignment.weight * alignment
        return StepOutput(it, y, pred, alignment, loss)

    def _drop_labels(self, y: Tensor, positions: Tensor) -> Tensor:
        probability = self.config.train.label_dropout
        if not probability:
            return y
        u = philox.uniform(self.config.train.seed, Stream.LABEL_DROPOUT, positions)[:, 0]
        return torch.where(u < probability, self.model.null_class, y)

    def _learning_rate(self, images_seen: int) -> float:
        p = self.config.optim
        return learning_rate(
            images_seen,
            lr=p.lr,
            schedule=p.schedule,
            warmup_images=p.warmup_images,
            decay_images=p.decay_images or self.config.train.images,
            final_lr=p.final_lr,
        )

    def _choose_attention(self, ranks: int) -> list[AttentionChoice]:
        """One choice on all ranks, and the one from before where a run goes on: the same bits."""
        micro = self.config.microbatch(ranks)
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        shape = micro, dtype, self.device
        names = self._attention_before
        with self._host_group.raise_together():
            if self._is_writer:
                try:
                    choices = self.model.choose_attention(*shape, names)
                except ValueError:
                    if names is None:
                        raise
                    # Another GPU, or a package that is gone: it gives other last bits anyway.
                    choices = self.model.choose_attention(*shape)
                names = [choice.backend for choice in choices] or None
        return self.model.choose_attention(*shape, self._host_group.all_gather(names)[0])

    def _describe_start(self) -> list[str]:
        messages = list(self._passed_over)
        if self.step and self.step < self.config.steps:
            messages.append(f"{self.out}: resumed after step {self.step} of {self.config.steps}")
            if self._resharded_from:
                messages.append(
                    f"{self.out}: its checkpoint is of {self._resharded_from}: the same examples "
                    "and noise, sums equal to rounding"
                )
        return messages

    def _describe_network(self) -> str:
        how = self.model.execution
        words = [f"mode {how.mode}"]
        for choice in self.attention:
            words.append(f"attention {choice.backend} ({choice.tested[choice.backend]})")
        before = self._attention_before
        if before and before != [choice.backend for choice in self.attention]:
            words.append(f"not {', '.join(before)} as before, which does not pass here")
        if not self.attention:
            words.append("attention by PyTorch's choice")
        if how.checkpointing != "none":
            words.append(f"activation checkpointing: {how.checkpointing}")
        return ", ".join(words)

    def save(self) -> Path:
        """Write a resumable checkpoint; complete or not there. Every rank must call it.

        Raises:
            SaveError: a rank could not write (a full disk); on all. Older checkpoints stay.
        """
        writing = run_folder.Writing(self.out, self.step, self._host_group)
        self.engine.save(writing)
        metadata = self._metadata()
        wanted, ended = self.config.train.save_weights, self.step >= self.config.steps
        if wanted == "always" or (wanted == "end" and ended):
            model_state, ema_state = self.engine.full_states(stepped=self.step > 0)
            if self._is_writer:
                with writing.attempt():
                    save_weights(writing.folder / "weights.pt", model_state, ema_state, metadata)
        state = {
            "metadata": metadata,
            "step": self.step,
            "images_seen": self.images_seen,
            "world_size": process_group.world_size(),
            "attention": [choice.backend for choice in self.attention] or None,
            "safety": self.guard.state(),
        }
        path = writing.commit(state, self.config.train.keep, self.config.train.keep_every)
        self._saved, self._resharded_from = self.step, ""
        return path

    def _metadata(self) -> dict[str, Any]:
        return {
            "steps": self.step,
            "images_seen": self.images_seen,
            "clock": self.model.clock,
            "model": json.dumps(self.model.config),
            "config": json.dumps(self.config.to_dict()),
        }

    def _prepare_folder(self) -> None:
        """Make the run's folder."""
        if self._resume_from is None:
            with self._host_group.raise_together():
                if self._is_writer:
                    (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            self._take_lock()
        with self._host_group.raise_together():
            if self._is_writer:
                if self._resume_from is not None:
                    run_folder.publish(self._resume_from, self.out)
                files.write_text(self.out / "config.yaml", self.config.to_yaml())

    def _take_lock(self) -> None:
        """Keep other runs out of the folder, and put what killed ones left in order."""
        with self._host_group.raise_together():
            if self._is_writer and self._lock is None:
                self._lock = run_folder.lock(self.out)
                run_folder.clean_unfinished(self.out)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _metrics_row(self, window: _Window) -> dict[str, Any]:
        losses = self.guard.row()
        seconds = time.perf_counter() - window.started
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            **losses,
            "lr": self._learning_rate(self.images_seen),
            **self.monitor.cost(window.images, seconds),
        }

    @property
    def _is_writer(self) -> bool:
        return process_group.rank() == 0


class _Window:
    """What was done since the last report."""

    def __init__(self) -> None:
        self.images = 0
        self.started = time.perf_counter()


def train(
    config: Config, resume: str = "auto", quiet: bool = False, recipe: str | None = None
) -> TrainResult:
    """Build a `Trainer` and run it; arguments and errors as there."""
    return Trainer(config, resume=resume, quiet=quiet, recipe=recipe).run()
