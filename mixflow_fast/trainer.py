"""Post-training loop on DeepSpeed. The way of a batch is in `Trainer._step`, top to bottom.

Every draw is a function of (seed, global position), so a run's examples and noise do not depend on
the number of ranks, the micro-batch or interruptions: resuming needs a counter and DeepSpeed's
state. Nothing in a step waits for the device; the loss is read every `train.log_every` steps.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixflow_fast import checkpoint, distributed
from mixflow_fast.alignment import Alignment
from mixflow_fast.build import build_data, build_execution, build_model, build_objective
from mixflow_fast.config import Config, load_config
from mixflow_fast.data import BatchLoader
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.attention_backends import AttentionChoice
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.metrics import MetricsFile, Progress
from mixflow_fast.models import load_into, load_weights, read_model_config, save_weights
from mixflow_fast.optim import OPTIMIZERS, AdamWEMA, learning_rate
from mixflow_fast.validation import validate

# Fields that may change between the parts of one run: they do not touch what is computed (but
# train.images does where the learning rate descends towards it).
_FREE = {"out", "train.images", "train.log_every", "train.save_every", "train.keep",
         "train.device", "train.microbatch_size", "data.workers", "objective.impl", "model.mode",
         "model.attention", "model.checkpointing"}  # fmt: skip


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

    Raises:
        ValueError: anything wrong with the configuration, data, starting weights or the run folder,
            before anything is written.
    """

    def __init__(self, config: Config, resume: str = "auto", quiet: bool = False) -> None:
        if resume not in ("auto", "never"):
            raise ValueError(f'resume must be "auto" or "never", got {resume!r}')
        self.config = config
        self.out = Path(config.out)
        ranks = distributed.world_size()
        validate(config, ranks)
        self.model = build_model(config)
        self.mix = build_objective(config, self.model.clock)
        self.source = build_data(config)
        self._resume_from = checkpoint.newest_checkpoint(self.out)
        self.step = 0
        self._attention_before: list[str] | None = None
        if self._resume_from is not None:
            self._check_resume(resume, ranks)
            load_into(self.model, load_weights(self._resume_from / "weights.pt", key="model"))
        elif (self.out / "weights.pt").exists():
            raise ValueError(
                f"{self.out} holds weights.pt of a run whose checkpoints are gone: choose another "
                f"out= (train.init={self.out} starts from those weights), or delete it"
            )
        elif config.train.init is not None:
            self._load_init(checkpoint.weights_file(config.train.init))
        self.device = distributed.init_process_group(config.train.device)
        self.alignment = Alignment(config, self.mix, self.device)
        fused = runtime.use_kernels(self.mix.impl, self.device)
        self.objective = "Triton kernels" if fused else "PyTorch reference"
        self.model.set_execution(build_execution(config, self.device))
        self.attention = self._choose_attention(ranks)
        deepspeed = _import_deepspeed()
        self._lock = self._prepare_folder()
        # DeepSpeed casts and shards the module: these keep what it must start from and export.
        self._initial = {n: p.detach().clone() for n, p in self.model.state_dict().items()}
        # ZeRO 3 puts its own there, for the whole process.
        self._linear = torch.nn.functional.linear
        self.engine, self.optimizer = self._build_engine(deepspeed)
        self.quiet = quiet or distributed.rank() > 0
        self._stop_signal: int | None = None
        self._votes = dist.new_group(backend="gloo") if ranks > 1 else None
        self._vote: tuple[Any, Tensor] | None = None

    @property
    def images_seen(self) -> int:
        """Training images so far, over all ranks."""
        return self.step * self.config.train.global_batch_size

    def run(self) -> TrainResult:
        """Train to the end, or to the first SIGINT or SIGTERM; either way leave a checkpoint.

        Raises:
            TrainingDiverged: the loss or the gradient is not finite; nothing of it is saved.
        """
        c, total = self.config.train, self.config.steps
        loader = BatchLoader(
            self.source,
            seed=c.seed,
            global_batch_size=c.global_batch_size,
            microbatch_size=self.config.microbatch(distributed.world_size()),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_position=self.images_seen,
            num_workers=self.config.data.workers,
        )
        metrics = MetricsFile(self.out / "metrics.jsonl", self.step) if self._is_writer else None
        progress = Progress(total, self.step, self.out.name, self.quiet)
        progress.say(f"objective: {self.objective} on {self.device}")
        progress.say(f"network: {self._network_in_words()}")
        if self.step and self.step < total:
            progress.say(f"{self.out}: resumed after step {self.step} of {total}")
        saved = self.step if self._resume_from else -1
        window = _Window(self.device)
        try:
            with loader, self._signals():
                while self.step < total and not self._stop_asked():
                    window.add(self._step(loader), c.global_batch_size)
                    progress.step()
                    if self.step % c.log_every == 0 or self.step == total:
                        row = self._metrics_row(window)
                        window = _Window(self.device)
                        if metrics is not None:
                            metrics.write(row)
                        progress.report(row)
                    if c.save_every and self.step % c.save_every == 0:
                        started = time.perf_counter()
                        self._check_finite(window)
                        self.save()
                        window.started += time.perf_counter() - started
                        saved = self.step
                if saved != self.step:
                    self._check_finite(window)
                    self.save()
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()
            if self._lock is not None:
                self._lock.close()
            torch.nn.functional.linear = self._linear
        if self._stop_signal is not None and self.step < total:
            progress.say(f"{self.out}: stopped after step {self.step}; the same command resumes")
        return TrainResult(self.out, self.step, self.images_seen, self.step >= total)

    def _step(self, loader: BatchLoader) -> Tensor:
        """One optimizer step; this rank's mean (loss, alignment term in it), on the device."""
        end = self.images_seen + self.config.train.global_batch_size
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(end)
        totals = torch.zeros(2, device=self.device)
        for _ in range(loader.microsteps):
            batch = next(loader).to(self.device)
            y = self._drop_labels(batch.y, batch.positions)
            it = self.mix.prepare(batch.x, ids=batch.positions)
            output = self.engine(it.x, it.t, y)
            pred, zs = output if isinstance(output, tuple) else (output, None)
            alignment = self.alignment(self.engine.module, zs, batch, it, y)
            loss = self.mix.loss(pred, it) + self.alignment.weight * alignment
            self.engine.backward(loss)
            self.engine.step()
            totals += torch.stack([loss, alignment]).detach()
        self.step += 1
        return totals / loader.microsteps

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
        names = [self._attention_before]
        if ranks > 1:
            if distributed.rank() == 0:
                choices = self.model.choose_attention(micro, dtype, self.device, names[0])
                names = [[choice.backend for choice in choices] or None]
            dist.broadcast_object_list(names)
        return self.model.choose_attention(micro, dtype, self.device, names[0])

    def _network_in_words(self) -> str:
        how = self.model.execution
        words = [f"mode {how.mode}"]
        for choice in self.attention:
            words.append(f"attention {choice.backend} ({choice.tested[choice.backend]})")
        if not self.attention:
            words.append("attention by PyTorch's choice")
        if how.checkpointing != "none":
            words.append(f"activation checkpointing: {how.checkpointing}")
        return ", ".join(words)

    def _build_engine(self, deepspeed: Any) -> tuple[Any, AdamWEMA]:
        c, p = self.config.train, self.config.optim
        micro = self.config.microbatch(distributed.world_size())
        zero: dict[str, Any] = {"stage": c.zero_stage}
        if c.zero_stage == 2 or (c.zero_stage == 1 and c.precision == "fp32"):
            zero["compute_grad_norm"] = False  # read on the host each step; AdamWEMA has its own
        settings: dict[str, Any] = {
            "train_batch_size": c.global_batch_size,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": c.global_batch_size
            // (micro * distributed.world_size()),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # Its overflow check reads a flag on the host each step; bf16 has float32's range.
            "bf16": {"enabled": c.precision == "bf16", "check_grad_overflow": False},
            "gradient_clipping": p.grad_clip if c.zero_stage == 3 else 0.0,
            "steps_per_print": sys.maxsize,
        }
        if c.precision == "bf16" and c.zero_stage < 3:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = OPTIMIZERS[p.name](
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=p.lr,
            betas=(p.beta1, p.beta2),
            eps=p.eps,
            weight_decay=p.weight_decay,
            ema_decay=p.ema_decay,
            grad_clip=0.0 if c.zero_stage == 3 else p.grad_clip,
            sharded=c.zero_stage > 0,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            engine, _, _, _ = deepspeed.initialize(
                model=self.model, optimizer=optimizer, config=settings
            )
        for name in self.model.float32_names:  # DeepSpeed casts every parameter
            parameter = self.model.get_parameter(name)
            parameter.data = self._initial[name].to(parameter.device)
        if self._resume_from is None:
            self._set_master_weights(engine)
        else:
            folder, tag = self._resume_from.parent, self._resume_from.name
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
            if path is None:
                raise ValueError(f"checkpoint {self._resume_from} could not be loaded")
        return engine, optimizer

    def _set_master_weights(self, engine: Any) -> None:
        """Give bf16's float32 master weights the digits that the cast of the module took away."""
        from deepspeed.utils import safe_set_full_fp32_param

        if self.config.train.precision == "bf16":
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, self._initial[name].to(self.device))

    def save(self) -> Path:
        """Write a resumable checkpoint; complete or not there. Every rank must call it.

        Raises:
            OSError: it could not be written (a full disk); older checkpoints stay.
        """
        folder = self.out / "checkpoints" / checkpoint.temporary_name(self.step)
        try:
            return self._save(folder)
        except (OSError, RuntimeError) as error:
            shutil.rmtree(folder, ignore_errors=True)
            free = shutil.disk_usage(self.out).free / 2**20
            raise OSError(
                f"checkpoint of step {self.step} could not be written to {self.out} "
                f"({free:.0f} MiB free): {error}"
            ) from error

    def _save(self, temporary: Path) -> Path:
        folder, name = temporary.parent, temporary.name
        self.engine.save_checkpoint(str(folder), tag=name, save_latest=False)
        model_state, ema_state = self._full_states()
        if self._is_writer:
            metadata = {
                "steps": self.step,
                "images_seen": self.images_seen,
                "clock": self.model.clock,
                "model": json.dumps(self.model.config),
                "config": json.dumps(self.config.to_dict()),
            }
            save_weights(folder / name / "weights.pt", model_state, ema_state, metadata)
            state = {
                "step": self.step,
                "images_seen": self.images_seen,
                "world_size": distributed.world_size(),
                "attention": [choice.backend for choice in self.attention] or None,
            }
            checkpoint.commit(self.out, self.step, state, self.config.train.keep)
        dist.barrier()
        return folder / checkpoint.checkpoint_name(self.step)

    def _full_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Master weights and EMA by official name, gathered from the shards, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model_state, ema_state = dict(self._initial), dict(self._initial)
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            shape = self._initial[name].shape  # ZeRO 3 empties the parameter itself
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
                weight = safe_get_full_fp32_param(parameter)
                ema = safe_get_full_optimizer_state(parameter, "ema") if self.step else weight
            else:
                weight = parameter.detach()
                ema = self.optimizer.state[parameter].get("ema", weight)
            model_state[name] = weight.view(shape).float().cpu()
            ema_state[name] = ema.view(shape).float().cpu()
        return model_state, ema_state

    def _check_resume(self, resume: str, ranks: int) -> None:
        if resume == "never":
            raise ValueError(
                f"{self.out} already holds a run (step {self._resume_from.name}): choose another "
                "out=, delete it, or resume with --resume auto"
            )
        old = _flat(load_config(str(self.out / "config.yaml")).to_dict())
        new = _flat(self.config.to_dict())
        changed = sorted(k for k in new.keys() | old.keys() if old.get(k) != new.get(k))
        fixed = {"train.images"} if self._descends_to_the_end else set()
        changed = [key for key in changed if key not in _FREE - fixed]
        if changed:
            listed = ", ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:5])
            raise ValueError(
                f"{self.out} holds a run with another configuration ({listed}): choose another "
                "out=, or give the same settings to resume it"
            )
        state = checkpoint.read_state(self._resume_from)
        if state["world_size"] != ranks:
            raise ValueError(
                f"{self._resume_from} was written by {state['world_size']} ranks and its shards "
                f"fit no other number, got {ranks}: start as many, or post-train from "
                f"train.init={self.out / 'weights.pt'} in a new out="
            )
        self.step = state["step"]
        if self.config.model.attention == "auto":
            self._attention_before = state.get("attention")

    @property
    def _descends_to_the_end(self) -> bool:
        return self.config.optim.schedule != "constant" and not self.config.optim.decay_images

    def _load_init(self, path: Path) -> None:
        """Start model (and so the EMA) from a checkpoint's EMA weights."""
        load_into(self.model, load_weights(path, key="ema"))
        recorded, own = read_model_config(path), self.model.config | {"clock": self.model.clock}
        # What the shapes cannot show; a wrong clock or head count would train without an error.
        for name in ("clock", "num_heads", "encoder_depth"):
            if name in recorded and recorded[name] != own[name]:
                raise ValueError(
                    f"train.init={path} was trained with {name}={recorded[name]!r}, this model has "
                    f"{own[name]!r}: set model.{name}"
                )

    def _prepare_folder(self) -> Any:
        """Make the run's folder; returns the open lock file that keeps other runs out of it."""
        lock = None
        if self._is_writer:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = checkpoint.lock(self.out)
            checkpoint.clean_unfinished(self.out)
            if self._resume_from is not None:
                checkpoint.publish(self._resume_from, self.out)
            temporary = self.out / ".config.yaml.tmp"
            temporary.write_text(self.config.to_yaml())
            os.replace(temporary, self.out / "config.yaml")
        dist.barrier()
        return lock

    def _check_finite(self, window: _Window) -> tuple[float, float, float | None]:
        """The window's mean loss and alignment, the last gradient norm; waits for the device."""
        losses = window.losses / max(window.steps, 1)
        dist.all_reduce(losses)
        norm = self.optimizer.grad_norm
        if norm is None or self.config.train.zero_stage == 3:
            norm = self.engine.get_global_grad_norm()
        mean, alignment = (loss / distributed.world_size() for loss in losses.tolist())
        norm = None if norm is None else float(norm)
        if not math.isfinite(mean) or not math.isfinite(norm or 0.0):
            last = self.images_seen
            raise TrainingDiverged(
                f"loss {mean}, gradient norm {norm} by step {self.step}: something in the samples "
                f"at positions {last - window.images} to {last - 1} or before made it so. Nothing "
                f"of it was saved; the newest checkpoint in {self.out} is from before. Lower "
                "optim.lr or set optim.grad_clip"
            )
        return mean, alignment, norm

    def _metrics_row(self, window: _Window) -> dict[str, Any]:
        loss, alignment, norm = self._check_finite(window)
        seconds = time.perf_counter() - window.started
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": loss,
            **({"alignment": alignment} if self.alignment.weight else {}),
            "grad_norm": norm,
            "lr": self._learning_rate(self.images_seen),
            "images_per_s": window.steps * self.config.train.global_batch_size / seconds,
        }

    @property
    def _is_writer(self) -> bool:
        return distributed.rank() == 0

    def _stop_asked(self) -> bool:
        asked = self._stop_signal is not None
        if self._votes is None:
            return asked
        # Ranks must stop at the same step. Each step starts a vote on the host and reads the one
        # that the step before started, so nothing waits.
        before, value = self._vote, torch.tensor(float(asked))
        work = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._votes, async_op=True)
        self._vote = work, value
        if before is None:
            return False
        before[0].wait()
        return bool(before[1])

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def handle(number: int, _frame: object) -> None:
            if self._stop_signal is not None:  # asked twice: at once, without a checkpoint
                raise KeyboardInterrupt
            self._stop_signal = number

        old = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                with contextlib.suppress(ValueError):  # not the main thread
                    old[number] = signal.signal(number, handle)
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient became infinite or not a number."""


class _Window:
    """(loss, alignment) since the last report, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.losses = torch.zeros(2, device=device)
        self.steps = 0
        self.images = 0
        self.started = time.perf_counter()

    def add(self, losses: Tensor, images: int) -> None:
        self.losses = self.losses + losses
        self.steps += 1
        self.images += images


def train(config: Config, resume: str = "auto", quiet: bool = False) -> TrainResult:
    """Build a `Trainer` and run it; arguments and errors as there."""
    return Trainer(config, resume=resume, quiet=quiet).run()


def _import_deepspeed() -> Any:
    """DeepSpeed without its chatter; on the CPU, without compiling anything."""
    try:
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            import deepspeed
    except ImportError as error:
        raise ValueError(
            f'training needs DeepSpeed ({error}): pip install "mixflow_fast[train]"'
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On the CPU DeepSpeed would compile its shared-memory collectives inside the first run; a build
    # that is killed leaves a lock that hangs every later run. Without them it uses gloo.
    compatible = getattr(deepspeed.ops, "__compatible_ops__", {})
    if os.environ.get("DS_ACCELERATOR") == "cpu" and "deepspeed_shm_comm" in compatible:
        compatible["deepspeed_shm_comm"] = False
    return deepspeed


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
