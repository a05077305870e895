"""Post-training loop on DeepSpeed. The way of a batch is in `Trainer._step`, top to bottom.

Every draw is a function of (seed, global position), so a run's examples and noise do not depend on
the number of ranks, the micro-batch or interruptions: resuming needs a counter and DeepSpeed's
state. Nothing in a step waits for the device; the loss is read every `train.log_every` steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
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
from mixflow_fast.config import Config, load_config, validate
from mixflow_fast.data import Batch, BatchLoader, Source, build_source
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.metrics import MetricsFile, Progress
from mixflow_fast.models import build, load_into, load_weights, repa_alignment_loss, save_weights
from mixflow_fast.models.sit import SiT
from mixflow_fast.objective import MixFlow
from mixflow_fast.optim import AdamWEMA, learning_rate

# Fields that may change between the parts of one run: they do not touch what is computed.
_FREE = {"out", "train.images", "train.log_every", "train.save_every", "train.keep",
         "train.device", "train.microbatch_size", "data.workers"}  # fmt: skip


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


def build_model(config: Config, device: str | torch.device = "cpu") -> SiT:
    """The network of a configuration with its random initial weights (a function of init_seed)."""
    options = dataclasses.asdict(config.model)
    name, seed = options.pop("name"), options.pop("init_seed")
    options = {key: value for key, value in options.items() if value is not None}
    if "z_dims" in options:
        options["z_dims"] = list(options["z_dims"])
        options.pop("learn_sigma")  # REPA's SiT has none
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return build(name, **options)


def build_objective(config: Config, clock: str) -> MixFlow:
    """The objective of a configuration, in the clock of its model."""
    options = dataclasses.asdict(config.objective)
    options.pop("alignment_weight")
    return MixFlow(**options, clock=clock, seed=config.train.seed)


def build_data(config: Config) -> Source:
    """The source of training examples; ValueError if it does not fit the model."""
    d, m = config.data, config.model
    options: dict[str, Any] = {}
    if d.kind == "latents":
        options = {"path": d.path, "scale": d.scale, "moments": d.moments}
        options["features"] = d.features if config.objective.alignment_weight else False
    elif d.kind == "folder":
        options = {"path": d.path, "size": d.size or m.input_size, "flip": d.flip}
    elif d.size is not None:
        options = {"size": d.size}
    if d.kind == "photos":
        options["flip"] = d.flip
    if d.kind in ("latents", "folder") and d.path is None:
        raise ValueError(f"data.path must be given for data.kind={d.kind}: add data.path=PATH")
    unused = [n for n in ("path", "moments", "features") if getattr(d, n) and n not in options]
    if unused:
        raise ValueError(f"data.{unused[0]} has no meaning for data.kind={d.kind}: leave it out")
    source = build_source(d.kind, **options)
    expected = (m.in_channels, m.input_size, m.input_size)
    if tuple(source.shape) != expected:
        raise ValueError(
            f"data gives examples of shape {tuple(source.shape)}, the model takes {expected}: set "
            "model.in_channels and model.input_size, or data.size"
        )
    if source.num_classes > m.num_classes:
        raise ValueError(
            f"data has {source.num_classes} classes, the model only {m.num_classes}: set "
            "model.num_classes"
        )
    return source


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
        if self._resume_from is not None:
            self._check_resume(resume, ranks)
        elif config.train.init is not None:
            state = load_weights(checkpoint.weights_file(config.train.init), key="ema")
            load_into(self.model, state)
        self.device = distributed.init_process_group(config.train.device)
        self.engine, self.optimizer = self._build_engine()
        self._prepare_folder()
        self.quiet = quiet or distributed.rank() > 0
        self._stop_signal: int | None = None

    @property
    def images_seen(self) -> int:
        """Training images so far, over all ranks."""
        return self.step * self.config.train.global_batch_size

    def run(self) -> TrainResult:
        """Train to the end, or to the first SIGINT or SIGTERM; either way leave a checkpoint."""
        c, total = self.config.train, self.config.steps
        loader = BatchLoader(
            self.source,
            seed=c.seed,
            global_batch_size=c.global_batch_size,
            microbatch_size=c.microbatch_size,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            start_position=self.images_seen,
            num_workers=self.config.data.workers,
        )
        metrics = MetricsFile(self.out / "metrics.jsonl", self.step) if self._is_writer else None
        progress = Progress(total, self.step, self.out.name, self.quiet)
        if self.step and self.step < total:
            progress.say(f"{self.out}: resumed after step {self.step} of {total}")
        saved = self.step if self._resume_from else -1
        window = _Window()
        try:
            with loader, self._signals():
                while self.step < total and not self._stop_asked():
                    window.add(self._step(loader))
                    progress.step()
                    if self.step % c.log_every == 0 or self.step == total:
                        row = self._metrics_row(window)
                        window = _Window()
                        if metrics is not None:
                            metrics.write(row)
                        progress.report(row)
                    if c.save_every and self.step % c.save_every == 0:
                        self.save()
                        saved = self.step
                if saved != self.step:
                    self.save()
        finally:
            progress.close()
            if metrics is not None:
                metrics.close()
        if self._stop_signal is not None and self.step < total:
            progress.say(f"{self.out}: stopped after step {self.step}; the same command resumes")
        return TrainResult(self.out, self.step, self.images_seen, self.step >= total)

    def _step(self, loader: BatchLoader) -> Tensor:
        """One optimizer step; returns this rank's mean loss, on the device."""
        end = self.images_seen + self.config.train.global_batch_size
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(end)
        total = torch.zeros((), device=self.device)
        for _ in range(loader.microsteps):
            batch = next(loader)
            x1 = batch.x.to(self.device, non_blocking=True)
            positions = batch.positions.to(self.device, non_blocking=True)
            y = self._drop_labels(batch.y.to(self.device, non_blocking=True), positions)
            it = self.mix.prepare(x1, ids=positions)
            output = self.engine(it.x, it.t, y)
            pred, zs = output if isinstance(output, tuple) else (output, None)
            loss = self.mix.loss(pred, it)
            loss = loss + self._alignment(zs, batch)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        self.step += 1
        return total / loader.microsteps

    def _drop_labels(self, y: Tensor, positions: Tensor) -> Tensor:
        probability = self.config.train.label_dropout
        if not probability:
            return y
        u = philox.uniform(self.config.train.seed, Stream.LABEL_DROPOUT, positions)[:, 0]
        return torch.where(u < probability, self.model.null_class, y)

    def _alignment(self, zs: list[Tensor] | None, batch: Batch) -> Tensor | float:
        weight = self.config.objective.alignment_weight
        if not weight:
            # The projectors stay out of the loss; a zero keeps their gradients defined.
            return 0.0 if zs is None else 0.0 * sum(z.float().sum() for z in zs)
        return weight * repa_alignment_loss(zs, [batch.features.to(self.device)])

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

    def _build_engine(self) -> tuple[Any, AdamWEMA]:
        c, p = self.config.train, self.config.optim
        deepspeed = _import_deepspeed()
        zero: dict[str, Any] = {"stage": c.zero_stage}
        if c.zero_stage == 2 or (c.zero_stage == 1 and c.precision == "fp32"):
            zero["compute_grad_norm"] = False  # read on the host each step; AdamWEMA has its own
        settings: dict[str, Any] = {
            "train_batch_size": c.global_batch_size,
            "train_micro_batch_size_per_gpu": c.microbatch_size,
            "gradient_accumulation_steps": c.global_batch_size
            // (c.microbatch_size * distributed.world_size()),
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            # Its overflow check reads a flag on the host each step; bf16 has float32's range.
            "bf16": {"enabled": c.precision == "bf16", "check_grad_overflow": False},
            "gradient_clipping": p.grad_clip if c.zero_stage == 3 else 0.0,
            "steps_per_print": sys.maxsize,
        }
        if c.precision == "bf16" and c.zero_stage < 3:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        optimizer = AdamWEMA(
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
        if self._resume_from is not None:
            folder, tag = self._resume_from.parent, self._resume_from.name
            path, _ = engine.load_checkpoint(str(folder), tag=tag)
            if path is None:
                raise ValueError(f"checkpoint {self._resume_from} could not be loaded")
        return engine, optimizer

    def save(self) -> Path:
        """Write a resumable checkpoint; complete or not there. Every rank must call it."""
        folder = self.out / "checkpoints"
        name = checkpoint.temporary_name(self.step)
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
            }
            checkpoint.commit(self.out, self.step, state, self.config.train.keep)
        dist.barrier()
        return folder / checkpoint.checkpoint_name(self.step)

    def _full_states(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Master weights and EMA by official name, gathered from the shards, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        model_state = {name: value for name, value in self.engine.module.state_dict().items()}
        ema_state = dict(model_state)
        for name, parameter in self.engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
                weight = safe_get_full_fp32_param(parameter)
                ema = safe_get_full_optimizer_state(parameter, "ema") if self.step else weight
            else:
                weight = parameter.detach()
                ema = self.optimizer.state[parameter].get("ema", weight)
            model_state[name] = weight.view(parameter.shape).float().cpu()
            ema_state[name] = ema.view(parameter.shape).float().cpu()
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
        changed = [key for key in changed if key not in _FREE]
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

    def _prepare_folder(self) -> None:
        if self._is_writer:
            (self.out / "checkpoints").mkdir(parents=True, exist_ok=True)
            checkpoint.clean_unfinished(self.out)
            temporary = self.out / ".config.yaml.tmp"
            temporary.write_text(self.config.to_yaml())
            os.replace(temporary, self.out / "config.yaml")
        dist.barrier()

    def _metrics_row(self, window: _Window) -> dict[str, Any]:
        loss = window.loss / window.steps
        dist.all_reduce(loss)
        norm = self.optimizer.grad_norm
        if norm is None or self.config.train.zero_stage == 3:
            norm = self.engine.get_global_grad_norm()
        loss_value = (loss / distributed.world_size()).item()  # waits for the device
        seconds = time.perf_counter() - window.started
        return {
            "step": self.step,
            "images_seen": self.images_seen,
            "loss": loss_value,
            "grad_norm": None if norm is None else float(norm),
            "lr": self._learning_rate(self.images_seen),
            "images_per_s": window.steps * self.config.train.global_batch_size / seconds,
        }

    @property
    def _is_writer(self) -> bool:
        return distributed.rank() == 0

    def _stop_asked(self) -> bool:
        # Ranks must agree on the step they stop at, and may only talk where they wait anyway.
        if distributed.world_size() > 1 and self.step % self.config.train.log_every:
            return False
        return distributed.any_rank(self._stop_signal is not None, self.device)

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


class _Window:
    """Losses since the last report, summed on the device."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.steps = 0
        self.started = time.perf_counter()

    def add(self, loss: Tensor) -> None:
        self.loss = self.loss + loss
        self.steps += 1


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
