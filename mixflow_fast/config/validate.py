"""Refuses configurations that cannot work, before any work is done."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from mixflow_fast import extension
from mixflow_fast.config.schema import DATA_FIELDS, Config, DataConfig
from mixflow_fast.environment import apex_message, detect_apex
from mixflow_fast.metrics.loggers import check_loggers
from mixflow_fast.models.execution import BACKENDS, CHECKPOINTING, MODES
from mixflow_fast.optim.adamw_ema import IMPLS
from mixflow_fast.optim.power_ema import LARGEST_SIGMA_REL


def validate(config: Config, world_size: int = 1) -> None:
    """Refuse values and combinations that cannot work. Reads nothing of the run from disk.

    Raises:
        ValueError: names the field, what came, what is expected.
    """
    m, o, d, p, t = config.model, config.objective, config.data, config.optim, config.train
    for name, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    _check_data(d, o.alignment_weight > 0, config.teacher.path is not None)
    _choice("train.precision", t.precision, ("bf16", "fp32"))
    _choice("train.zero_stage", t.zero_stage, (0, 1, 2, 3))
    _choice("train.device", t.device, ("auto", "cpu", "cuda"))
    _choice("train.save_weights", t.save_weights, ("always", "end", "never"))
    _choice("train.on_nonfinite", t.on_nonfinite, ("stop", "skip", "rollback"))
    _check_optimizer(p.name, t.device)
    _choice("optim.impl", p.impl, IMPLS)
    if p.impl == "csrc" and extension.load().state == "absent":
        raise ValueError(
            f"optim.impl=csrc needs the library of csrc/ ({extension.load().reason}): build it "
            f"with `{extension.COMMAND}`, or set optim.impl=auto"
        )
    if not all(0 < width <= LARGEST_SIGMA_REL for width in p.ema_sigma_rel):
        raise ValueError(
            f"optim.ema_sigma_rel must be in (0, {LARGEST_SIGMA_REL:.4f}], got "
            f"{list(p.ema_sigma_rel)}: EDM2 uses [0.05, 0.1]"
        )
    if p.snapshot_every and not p.ema_sigma_rel:
        raise ValueError(
            f"optim.snapshot_every = {p.snapshot_every} has no meaning without optim.ema_sigma_rel:"
            " add optim.ema_sigma_rel=[0.05,0.1]"
        )
    _choice("optim.schedule", p.schedule, ("constant", "linear", "cosine"))
    for name, value, low in (
        ("train.images", t.images, 1),
        ("train.global_batch_size", t.global_batch_size, 1),
        ("train.microbatch_size", t.microbatch_size, 1),
        ("train.timeout_minutes", t.timeout_minutes, 0.1),
        ("train.max_skips", t.max_skips, 0),
        ("train.max_rollbacks", t.max_rollbacks, 0),
        ("train.log_every", t.log_every, 1),
        ("train.save_every", t.save_every, 0),
        ("train.keep", t.keep, 1),
        ("train.keep_every", t.keep_every, 0),
        ("train.preview_every", t.preview_every, 0),
        ("train.previews", t.previews, 1),
        ("train.preview_steps", t.preview_steps, 1),
        ("train.validate_every", t.validate_every, 0),
        ("train.validate_examples", t.validate_examples, 1),
        ("train.seed", t.seed, 0),
        ("data.workers", d.workers, 0),
        ("optim.grad_clip", p.grad_clip, 0),
        ("optim.warmup_images", p.warmup_images, 0),
        ("optim.decay_images", p.decay_images, 0),
        ("optim.lr", p.lr, 0),
        ("optim.weight_decay", p.weight_decay, 0),
        ("objective.alignment_weight", o.alignment_weight, 0),
    ):
        if not value >= low:
            raise ValueError(f"{name} must be >= {low}, got {value}")
    if t.keep_every and (not t.save_every or t.keep_every % t.save_every):
        raise ValueError(
            f"train.keep_every must be a multiple of train.save_every = {t.save_every}, or no "
            f"checkpoint falls on it, got {t.keep_every}"
        )
    if t.precision == "bf16" and t.zero_stage == 0:
        raise ValueError(
            "train.precision=bf16 needs train.zero_stage >= 1: DeepSpeed's bf16 optimizer without "
            "ZeRO takes a step with zero gradients when it is built. On one rank ZeRO 1 shards "
            "nothing and costs nothing"
        )
    if t.global_batch_size % world_size:
        raise ValueError(
            f"train.global_batch_size = {t.global_batch_size} must be a multiple of the number of "
            f"ranks, got {world_size}"
        )
    for name, value in (
        ("train.label_dropout", t.label_dropout),
        ("optim.beta1", p.beta1),
        ("optim.beta2", p.beta2),
        ("optim.ema_decay", p.ema_decay),
        *(("optim.ema_more_decays", decay) for decay in p.ema_more_decays),
    ):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not 0 <= p.final_lr <= p.lr:
        raise ValueError(f"optim.final_lr must be in [0, optim.lr = {p.lr}], got {p.final_lr}")
    if not 0 <= m.init_seed < 1 << 63:
        raise ValueError(f"model.init_seed must be in [0, 2**63), got {m.init_seed}")
    _check_model(config)
    if t.label_dropout and not m.class_dropout_prob:
        raise ValueError(
            f"train.label_dropout = {t.label_dropout} needs a null class: set "
            "model.class_dropout_prob > 0, or train.label_dropout=0"
        )
    _check_alignment(config)
    _check_watching(config)
    if p.schedule != "constant" and 0 < p.decay_images <= p.warmup_images:
        raise ValueError(
            f"optim.decay_images = {p.decay_images} must be larger than optim.warmup_images = "
            f"{p.warmup_images}"
        )


def _check_model(config: Config) -> None:
    m, t = config.model, config.train
    _choice("model.mode", m.mode, ("auto", *MODES))
    _choice("model.attention", m.attention, ("auto", *BACKENDS))
    _choice("model.checkpointing", m.checkpointing, CHECKPOINTING)
    if m.checkpointing == "elementwise" and m.mode != "fused":
        raise ValueError(
            f"model.checkpointing=elementwise needs model.mode=fused, got {m.mode}: set it, or "
            "model.checkpointing=selective"
        )
    if t.zero_stage == 3 and (m.mode not in ("auto", "eager") or m.checkpointing != "none"):
        name = "checkpointing" if m.mode in ("auto", "eager") else "mode"
        raise ValueError(
            f"model.{name}={getattr(m, name)} reads weights outside of their modules, where ZeRO 3 "
            "does not gather them: set train.zero_stage=2 (models of this size need no more), or "
            "model.mode=eager and model.checkpointing=none"
        )
    head = m.name.startswith("DiTDH")
    where = f"for {m.name}" if head else "without model.z_dims"
    for name in ("z_dims", "learn_sigma", "encoder_depth", "projector_dim"):
        idle = head or (m.z_dims is None and name in ("encoder_depth", "projector_dim"))
        if idle and getattr(m, name) is not None:
            raise ValueError(f"model.{name} has no meaning {where}: leave it out")
    for name in ("depth", "hidden_size", "num_heads"):
        value = getattr(m, name)
        if value is not None and isinstance(value, tuple) != head:
            expected = "a pair, [encoder, head]," if head else "a number"
            raise ValueError(f"model.{name} must be {expected} for {m.name}, got {value}")
    if m.train_embeddings is not None and not head:
        raise ValueError(f"model.train_embeddings has no meaning for {m.name}: leave it out")
    if head and t.precision == "bf16" and t.zero_stage == 3:
        raise ValueError(
            f"{m.name} keeps its Fourier frequencies float32, which ZeRO 3 cannot under "
            "train.precision=bf16: set train.zero_stage=2"
        )
    if m.train_embeddings and t.precision == "bf16":
        raise ValueError(
            "model.train_embeddings needs train.precision=fp32: Fourier frequencies of 8 bits "
            "would be another function"
        )


def _check_watching(config: Config) -> None:
    t = config.train
    check_loggers(t.loggers)
    if t.preview_every and config.objective.prediction != "velocity":
        raise ValueError(
            f"train.preview_every = {t.preview_every} needs objective.prediction=velocity, got "
            f"{config.objective.prediction}: the samplers integrate velocities; set it to 0"
        )
    if t.preview_cfg != 1 and not config.model.class_dropout_prob:
        raise ValueError(
            f"train.preview_cfg = {t.preview_cfg} needs a null class: set "
            "model.class_dropout_prob > 0, or train.preview_cfg=1"
        )


def _check_optimizer(name: str, device: str) -> None:
    _choice("optim.name", name, ("adamw_ema", "apex_fused_adam"))
    if name != "apex_fused_adam":
        return
    if detect_apex() != "nvidia":
        raise ValueError(
            f"optim.name={name} needs NVIDIA apex (adamw_ema does not): {apex_message()}"
        )
    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            f"optim.name={name} needs a GPU, got train.device={device}"
            f"{'' if device == 'cpu' else ' and torch sees none'}: set optim.name=adamw_ema"
        )


def _check_alignment(config: Config) -> None:
    m, o, d, teacher = config.model, config.objective, config.data, config.teacher
    _choice("objective.alignment_input", o.alignment_input, ("slowed", "label"))
    _choice("teacher.precision", teacher.precision, (None, "fp32", "bf16"))
    _choice("teacher.positions", teacher.positions, ("repa", "model"))
    taught = teacher.path is not None
    given = [f"teacher.{f.name}" for f in _changed(teacher)]
    if not o.alignment_weight:
        given += ["objective.alignment_input"] * (o.alignment_input != "slowed")
        if given:
            raise ValueError(
                f"{given[0]} has no meaning without objective.alignment_weight: leave it out"
            )
        return
    needs = f"objective.alignment_weight = {o.alignment_weight} needs"
    if not (m.z_dims and len(m.z_dims) == 1):
        raise ValueError(f"{needs} model.z_dims (one REPA projector)")
    if taught and d.features:
        raise ValueError(
            "teacher.path and data.features both give the alignment its features: leave one out"
        )
    if not taught and not d.features:
        images = " and data.images=PATH (their images)" if d.kind == "latents" else ""
        raise ValueError(
            f"{needs} a teacher: add teacher.path=FOLDER (a local DINOv2, for example of `hf "
            f"download facebook/dinov2-base --local-dir FOLDER`){images}; or, with latents, "
            "data.features=FILE.npy (its features); or objective.alignment_weight=0"
        )
    if given and not taught:
        raise ValueError(f"{given[0]} has no meaning with data.features: leave it out")
    if taught and d.kind == "latents" and not d.images:
        raise ValueError(
            "teacher.path needs the images of the latents: add data.images=PATH (REPA's folder "
            "with dataset.json, or a .npy or .npz of uint8)"
        )
    if taught and d.kind != "latents" and m.in_channels != 3:
        raise ValueError(
            f"the teacher sees RGB images, got model.in_channels = {m.in_channels} for "
            f"data.kind={d.kind}"
        )
    if o.alignment_input == "label" and config.train.zero_stage == 3:
        raise ValueError(
            "objective.alignment_input=label runs some blocks outside of DeepSpeed's forward, "
            "where ZeRO 3 does not gather their weights: set train.zero_stage=2, or "
            "objective.alignment_input=slowed"
        )


def _changed(section: Any) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(section) if getattr(section, f.name) != f.default]


def _check_data(d: DataConfig, aligned: bool, taught: bool) -> None:
    _choice("data.kind", d.kind, tuple(DATA_FIELDS))
    taken = DATA_FIELDS[d.kind]
    if d.kind == "latents":
        taken += ("features",) * aligned + ("images",) * (aligned and taught)
    if "path" in taken and d.path is None:
        raise ValueError(f"data.path must be given for data.kind={d.kind}: add data.path=PATH")
    for f in _changed(d):
        if f.name not in (*taken, "kind", "workers"):
            why = {"features": "without objective.alignment_weight"}.get(f.name, "")
            if f.name == "images" and d.kind == "latents":
                why = "without objective.alignment_weight and teacher.path"
            raise ValueError(
                f"data.{f.name} has no meaning for data.kind={d.kind} {why}".rstrip()
                + ": leave it out"
            )


def _leaves(config: Config) -> list[tuple[str, Any]]:
    return [
        (f"{section}.{name}", value)
        for section, fields in config.to_dict().items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    ]


def _choice(name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
