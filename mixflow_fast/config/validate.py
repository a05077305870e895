"""Refuses what no single section can see: sections that do not fit each other or the machine."""

from __future__ import annotations

import dataclasses

import torch

from mixflow_fast import extension
from mixflow_fast.config.cond_section import CondConfig
from mixflow_fast.config.data_sections import (
    ANY_KIND,
    DATA_FIELDS,
    ENCODER_FIELDS,
    IMAGE_KINDS,
    DataConfig,
    EncoderConfig,
    TeacherConfig,
)
from mixflow_fast.config.lora_section import LoraConfig
from mixflow_fast.config.schema import (
    Config,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    TrainConfig,
)
from mixflow_fast.config.section import Section
from mixflow_fast.config.source_section import SourceConfig
from mixflow_fast.environment import apex_message, detect_apex, is_installed
from mixflow_fast.models.autoencoders.rae import PIXELS_PER_TOKEN


def validate(config: Config, world_size: int = 1) -> None:
    """Refuse combinations that cannot work, here or anywhere. Reads nothing of the run from disk.

    Values that are impossible in themselves were refused when their section was made.

    Raises:
        ValueError: names the field, what came, what is expected.
    """
    c = config
    _check_text_to_image(c.model, c.objective, c.source, c.train)
    _check_prompts(c.cond, c.model, c.data)
    _check_lora(c.lora, c.model)
    _check_data(c.data, c.objective.alignment_weight > 0, c.teacher.path is not None)
    _check_encoder(c.encoder, c.data, c.model)
    _check_optimizer(c.optim, c.train.device)
    _check_batch(c.train, c.model, world_size)
    _check_communication(c.train)
    _check_model(c.model, c.train)
    _check_alignment(c.objective, c.model, c.data, c.teacher, c.train.zero_stage)
    _check_rollout(c.objective, c.train.zero_stage)
    _check_source(c.source, c.objective, c.model, c.train.init)
    _check_watching(c.train, c.model, c.objective, c.latent)


def _check_text_to_image(
    m: ModelConfig, o: ObjectiveConfig, s: SourceConfig, t: TrainConfig
) -> None:
    if not m.is_text_to_image:
        return
    what = "a text-to-image network gives the velocity of the straight path from data to N(0, I)"
    for name, needed in (("path", "linear"), ("prediction", "velocity")):
        if getattr(o, name) != needed:
            raise ValueError(
                f"objective.{name}={getattr(o, name)} is not for TextToImage: {what}; set "
                f"objective.{name}={needed}"
            )
    if s.kind != "standard":
        raise ValueError(
            f"source.kind={s.kind} is not for TextToImage: {what}; set source.kind=standard"
        )
    if o.alignment_weight:
        raise ValueError(
            f"objective.alignment_weight = {o.alignment_weight} has no meaning for TextToImage, "
            "which has no projectors: set objective.alignment_weight=0"
        )
    if t.label_dropout:
        raise ValueError(
            f"train.label_dropout = {t.label_dropout} has no meaning for TextToImage, which is "
            "told prompts and no classes: set train.label_dropout=0 (cond.drop drops prompts)"
        )


def _check_prompts(p: CondConfig, m: ModelConfig, d: DataConfig) -> None:
    if m.is_text_to_image:
        if d.kind != "captioned":
            raise ValueError(
                f"model.name=TextToImage needs data with prompts, got data.kind={d.kind}: set "
                "data.kind=captioned and data.path=CACHE (`mixflow-fast encode` makes one)"
            )
        return
    if d.kind == "captioned":
        raise ValueError(
            f"data.kind=captioned gives latents with prompts, which {m.name} is not told: set "
            "model.name=TextToImage model.folder=FOLDER, or another data.kind"
        )
    if given := _changed(p):
        raise ValueError(
            f"cond.{given[0].name} has no meaning for {m.name}, which is told no prompts: leave it "
            "out"
        )


def _check_lora(a: LoraConfig, m: ModelConfig) -> None:
    if a.rank and not m.is_text_to_image:
        raise ValueError(
            f"lora.rank = {a.rank} has no meaning for {m.name}, whose whole network is trained: "
            "leave it out, or set model.name=TextToImage"
        )
    if a.rank and not is_installed("peft"):
        raise ValueError(
            f'lora.rank = {a.rank} needs peft: pip install "mixflow_fast[text]", or set lora.rank=0'
        )


def _check_rollout(o: ObjectiveConfig, zero_stage: int) -> None:
    if not o.rollout_steps:
        return
    needed = {"path": "linear", "prediction": "velocity", "gamma": 0.0, "input_perturbation": 0.0}
    wrong = [name for name, value in needed.items() if getattr(o, name) != value]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"objective.rollout_steps = {o.rollout_steps} makes the input in another way: it needs "
            f"objective.{name}={needed[name]}, got {getattr(o, name)}"
        )
    if zero_stage == 3:
        raise ValueError(
            "objective.rollout_steps runs the network twice a step, which is not tested under ZeRO "
            "3: set train.zero_stage=2, or objective.rollout_steps=0"
        )


def _check_source(s: SourceConfig, o: ObjectiveConfig, m: ModelConfig, init: str | None) -> None:
    if s.kind == "standard":
        return
    if s.frozen and init is None:
        raise ValueError(
            "source.frozen=true needs the weights of a trained source: add train.init=RUN of a run "
            "with source.kind=mixed, or set source.frozen=false"
        )
    if o.gamma > 0 and not s.frozen:
        raise ValueError(
            f"objective.gamma = {o.gamma} slows the interpolation of a source that is being "
            "trained, which would learn to shrink |x1 - x0| for a reason that has nothing to do "
            "with its paths: train with objective.gamma=0 objective.timesteps=uniform first, then "
            "go on from that run with train.init=RUN source.frozen=true"
        )
    if m.mode == "graph" and not s.frozen:
        raise ValueError(
            "model.mode=graph records a network whose input needs no gradient, and a source is "
            "trained through the input: set model.mode=compile, or source.frozen=true"
        )
    if o.rollout_steps:
        raise ValueError(
            f"objective.rollout_steps = {o.rollout_steps} makes the input by a step from given "
            "noise, and a mixed source makes the noise itself: set objective.rollout_steps=0"
        )
    if o.alignment_input == "label":
        raise ValueError(
            "objective.alignment_input=label prepares every example a second time, with the source "
            "once more: set objective.alignment_input=slowed (which is the same at "
            "objective.gamma=0)"
        )


def _check_batch(t: TrainConfig, m: ModelConfig, world_size: int) -> None:
    if t.global_batch_size % world_size:
        raise ValueError(
            f"train.global_batch_size = {t.global_batch_size} must be a multiple of the number of "
            f"ranks, got {world_size}"
        )
    if t.label_dropout and m.is_songunet:
        raise ValueError(
            f"train.label_dropout = {t.label_dropout} has no meaning for {m.name}, which has no "
            "classes: set train.label_dropout=0"
        )
    if t.label_dropout and not m.has_null_class:
        raise ValueError(
            f"train.label_dropout = {t.label_dropout} needs a null class: set "
            "model.class_dropout_prob > 0, or train.label_dropout=0"
        )


def _check_communication(t: TrainConfig) -> None:
    if t.reduce_dtype == "bf16" and t.precision == "fp32":
        raise ValueError(
            "train.reduce_dtype=bf16 would round the gradients of train.precision=fp32: leave it "
            "out, or set train.precision=bf16"
        )
    # DeepSpeed's wrappers there sum once, after the backward pass, in buckets of a fixed size.
    if t.engine == "ddp":
        return
    if t.zero_stage == 0 or (t.zero_stage == 1 and t.precision == "bf16"):
        for f in _changed(t):
            if f.name in ("overlap_comm", "reduce_bucket_size"):
                raise ValueError(
                    f"train.{f.name} = {getattr(t, f.name)} has no meaning for train.zero_stage="
                    f"{t.zero_stage} in {t.precision}, where DeepSpeed sums all gradients after "
                    "the backward pass: leave it out, or set train.zero_stage=2"
                )


def _check_model(m: ModelConfig, t: TrainConfig) -> None:
    if m.mode == "graph" and t.engine != "ddp":
        raise ValueError(
            "model.mode=graph replays both passes as they were recorded, which DeepSpeed is not "
            "tested with: set train.engine=ddp and train.zero_stage=0, or model.mode=compile"
        )
    # Another library's checkpointing calls whole blocks, by their modules.
    recomputes = m.checkpointing != "none" and not m.is_text_to_image
    if t.zero_stage == 3 and (m.mode not in ("auto", "eager") or recomputes):
        name = "checkpointing" if m.mode in ("auto", "eager") else "mode"
        raise ValueError(
            f"model.{name}={getattr(m, name)} reads weights outside of their modules, where ZeRO 3 "
            "does not gather them: set train.zero_stage=2 (models of this size need no more), or "
            "model.mode=eager and model.checkpointing=none"
        )
    if m.is_ditdh and t.precision == "bf16" and t.zero_stage == 3:
        raise ValueError(
            f"{m.name} keeps its Fourier frequencies float32, which ZeRO 3 cannot under "
            "train.precision=bf16: set train.zero_stage=2"
        )
    if m.train_embeddings and t.precision == "bf16":
        raise ValueError(
            "model.train_embeddings needs train.precision=fp32: Fourier frequencies of 8 bits "
            "would be another function"
        )


def _check_watching(t: TrainConfig, m: ModelConfig, o: ObjectiveConfig, latent: bool) -> None:
    for name in t.loggers:
        if not is_installed(name):
            raise ValueError(
                f"train.loggers={list(t.loggers)} needs the package {name}: pip install {name}, or "
                "leave it out (metrics.jsonl is written anyway)"
            )
    if t.preview_every and o.prediction != "velocity":
        raise ValueError(
            f"train.preview_every = {t.preview_every} needs objective.prediction=velocity, got "
            f"{o.prediction}: the samplers integrate velocities; set it to 0"
        )
    if t.preview_decoder and not latent:
        raise ValueError(
            f"train.preview_decoder = {t.preview_decoder} decodes latents, and this run is one of "
            "pixels: leave it out"
        )
    if t.preview_stats and not t.preview_decoder:
        raise ValueError("train.preview_stats needs train.preview_decoder=FOLDER: leave it out")
    for name in ("preview_grid", "preview_prompts"):
        if getattr(t, name) is not None and not m.is_text_to_image:
            raise ValueError(
                f"train.{name} has no meaning for {m.name}, which is told no prompts: leave it out"
            )
    if t.preview_cfg != 1 and m.is_songunet:
        raise ValueError(
            f"train.preview_cfg = {t.preview_cfg} has no meaning for {m.name}, which has no "
            "classes to guide to: set train.preview_cfg=1"
        )
    if t.preview_cfg != 1 and not m.has_null_class and not m.is_text_to_image:
        raise ValueError(
            f"train.preview_cfg = {t.preview_cfg} needs a null class: set "
            "model.class_dropout_prob > 0, or train.preview_cfg=1"
        )


def _check_optimizer(p: OptimConfig, device: str) -> None:
    if p.impl == "csrc" and extension.load().state == "absent":
        raise ValueError(
            f"optim.impl=csrc needs the library of csrc/ ({extension.load().reason}): build it "
            f"with `{extension.COMMAND}`, or set optim.impl=auto"
        )
    if p.name != "apex_fused_adam":
        return
    if detect_apex() != "nvidia":
        raise ValueError(
            f"optim.name={p.name} needs NVIDIA apex (adamw_ema does not): {apex_message()}"
        )
    if device == "cpu" or not torch.cuda.is_available():
        raise ValueError(
            f"optim.name={p.name} needs a GPU, got train.device={device}"
            f"{'' if device == 'cpu' else ' and torch sees none'}: set optim.name=adamw_ema"
        )


def _check_alignment(
    o: ObjectiveConfig, m: ModelConfig, d: DataConfig, teacher: TeacherConfig, zero_stage: int
) -> None:
    taught = teacher.path is not None
    given = [f"teacher.{f.name}" for f in _changed(teacher)]
    if not o.alignment_weight:
        if o.alignment_input != "slowed":
            given.append("objective.alignment_input")
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
            "teacher.path needs the images of the latents: add data.images=PATH (a prepared "
            "set, REPA's folder with dataset.json, or a .npy or .npz of uint8)"
        )
    if taught and d.kind in ("photos", "digits") and m.in_channels != 3:
        raise ValueError(
            f"the teacher sees RGB images, got model.in_channels = {m.in_channels} for "
            f"data.kind={d.kind}"
        )
    if o.alignment_input == "label" and zero_stage == 3:
        raise ValueError(
            "objective.alignment_input=label runs some blocks outside of DeepSpeed's forward, "
            "where ZeRO 3 does not gather their weights: set train.zero_stage=2, or "
            "objective.alignment_input=slowed"
        )


def _changed(section: Section) -> list[dataclasses.Field]:
    return [f for f in dataclasses.fields(section) if getattr(section, f.name) != f.default]


def _check_data(d: DataConfig, aligned: bool, taught: bool) -> None:
    taken = DATA_FIELDS[d.kind]
    if d.kind == "latents" and aligned:
        taken += ("features", "images") if taught else ("features",)
    if "path" in taken and d.path is None:
        raise ValueError(f"data.path must be given for data.kind={d.kind}: add data.path=PATH")
    for f in _changed(d):
        if f.name not in (*taken, *ANY_KIND):
            why = ""
            if f.name == "features":
                why = " without objective.alignment_weight"
            elif f.name == "images" and d.kind == "latents":
                why = " without objective.alignment_weight and teacher.path"
            raise ValueError(
                f"data.{f.name} has no meaning for data.kind={d.kind}{why}: leave it out"
            )


# What an encoder is, and where it is to be had.
_ENCODERS = {
    "sdvae": "a local AutoencoderKL, for example of `hf download stabilityai/sd-vae-ft-ema "
    "--local-dir FOLDER`",
    "rae": "a local DINOv2 with registers, for example of `hf download "
    "facebook/dinov2-with-registers-base --local-dir FOLDER`",
}


def _check_encoder(e: EncoderConfig, d: DataConfig, m: ModelConfig) -> None:
    for f in _changed(e):
        if f.name not in (*ENCODER_FIELDS[e.kind], "kind"):
            raise ValueError(
                f"encoder.{f.name} has no meaning for encoder.kind={e.kind}: leave it out"
            )
    if e.kind == "none":
        if d.kind in IMAGE_KINDS and m.in_channels != 3:
            kind = "sdvae" if m.in_channels == 4 else "rae"
            raise ValueError(
                f"data.kind={d.kind} gives images of 3 channels, model.in_channels = "
                f"{m.in_channels} is a model of latents: add encoder.kind={kind} "
                f"encoder.path=FOLDER ({_ENCODERS[kind]}); or set data.kind=latents with "
                "data.path of their latents (`mixflow-fast data encode` makes the SD-VAE's); or "
                "model.in_channels=3"
            )
        return
    if d.kind not in IMAGE_KINDS:
        why = "which are encoded already" if d.kind == "latents" else "which it does not take"
        raise ValueError(
            f"encoder.kind={e.kind} makes latents of images, got data.kind={d.kind}, {why}: set "
            f"encoder.kind=none, or data.kind to one of {', '.join(IMAGE_KINDS)}"
        )
    if e.path is None:
        raise ValueError(
            f"encoder.path must be given for encoder.kind={e.kind}: add encoder.path=FOLDER "
            f"({_ENCODERS[e.kind]})"
        )
    if e.kind == "rae" and d.size not in (None, PIXELS_PER_TOKEN * m.input_size):
        raise ValueError(
            f"data.size = {d.size} does not fit model.input_size = {m.input_size}: RAE's latents "
            f"have a place for {PIXELS_PER_TOKEN} x {PIXELS_PER_TOKEN} pixels; leave data.size out "
            f"(it is {PIXELS_PER_TOKEN * m.input_size} then), or set model.input_size"
        )
