"""The sections of a run's configuration: frozen dataclasses whose hints say what a field takes.

A recipe is a YAML file with the sections below; `section.field=value` overrides one field. Types,
choices and ranges stand in a field's hint and are checked when its section is made; the text under
a field is its documentation (`mixflow-fast settings`). What spans sections or needs the machine is
refused by `validate`, before any work is done.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mixflow_fast.config.cond_section import CondConfig
from mixflow_fast.config.data_sections import DataConfig, EncoderConfig, TeacherConfig
from mixflow_fast.config.lora_section import LoraConfig
from mixflow_fast.config.renamed import name_elsewhere, refuse_former_key
from mixflow_fast.config.section import (
    Fraction,
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Rule,
    Section,
    at_least,
    hints_of,
)
from mixflow_fast.config.source_section import SourceConfig
from mixflow_fast.environment import LoggerName
from mixflow_fast.flow.path import LossWeight, PathName, Prediction
from mixflow_fast.flow.schedule import Interval, TargetAt
from mixflow_fast.flow.timesteps import SigmaGrid
from mixflow_fast.kernels.attention.backends import BackendName
from mixflow_fast.kernels.runtime import Impl
from mixflow_fast.messages import did_you_mean
from mixflow_fast.models.dinov2 import Precision
from mixflow_fast.models.execution import Checkpointing, CompileUnit, Mode
from mixflow_fast.models.songunet import WAYS as SONGUNET_WAYS
from mixflow_fast.models.text_to_image.network import WAYS as TEXT_TO_IMAGE_WAYS
from mixflow_fast.models.text_to_image.network import WHY_NOT
from mixflow_fast.optim.adamw_ema import OptimizerImpl
from mixflow_fast.optim.apex import OptimizerName
from mixflow_fast.optim.lr_schedule import LrSchedule, learning_rate
from mixflow_fast.optim.power_ema import LARGEST_SIGMA_REL

AlignmentInput = Literal["slowed", "label"]
Device = Literal["auto", "cpu", "cuda"]
EngineName = Literal["deepspeed", "ddp"]
OnNonfinite = Literal["stop", "skip", "rollback"]
SaveWeights = Literal["always", "end", "never"]
ZeroStage = Literal[0, 1, 2, 3]

Seed = Annotated[int, Rule("in [0, 2**63)", lambda value: 0 <= value < 1 << 63)]
SigmaRel = Annotated[
    float,
    Rule(
        f"in (0, {LARGEST_SIGMA_REL:.4f}] (EDM2 uses 0.05 and 0.1)",
        lambda value: 0 < value <= LARGEST_SIGMA_REL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section, name="model"):
    """The network, and how it is run. Fields that are None keep the named model's own value."""

    name: str = "SiT-XL/2"
    """The network: SiT-{S,B,L,XL}/{2,4,8}, DiTDH-{S,B,L,XL}, SongUNet-{CIFAR10,64}, or TextToImage
    for that of model.folder."""
    folder: str | None = None
    """TextToImage: local folder of a diffusers pipeline or of its transformer alone, which says the
    network and has the weights that a run starts from. Nothing is downloaded."""
    adapter: str | None = None
    """TextToImage: a class of your own around the network, as my_file.py:MyAdapter; null: the one
    of the network's class."""
    input_size: Positive = 32
    """Side of the latent or image, in latent places or pixels."""
    in_channels: Positive = 4
    """Channels of the latent or image: 4 for the SD-VAE, 768 for RAE, 3 for pixels."""
    num_classes: Positive = 1000
    """Classes, without the null class. A SongUNet has none, and takes any data."""
    class_dropout_prob: Fraction = 0.1
    """> 0 gives the null class, which guidance needs, its row. Not for a SongUNet."""
    learn_sigma: bool | None = None
    """SiT: whether there is the unused sigma half of official checkpoints (true)."""
    depth: Positive | tuple[Positive, ...] | None = None
    """Blocks; DiTDH: [encoder, head], like the next two; SongUNet: of a level on its way down."""
    hidden_size: Positive | tuple[Positive, ...] | None = None
    """Width; SongUNet: that which model.channel_mult multiplies."""
    num_heads: Positive | tuple[Positive, ...] | None = None
    """Attention heads."""
    mlp_ratio: PositiveFloat | None = None
    """Hidden width of the MLP over the width."""
    z_dims: tuple[Positive, ...] | None = None
    """Channels of REPA's projector outputs, [768] for DINOv2-B; makes it REPA's SiT."""
    encoder_depth: Positive | None = None
    """Block after which REPA's projectors stand."""
    projector_dim: Positive | None = None
    """Hidden width of REPA's projectors."""
    qk_norm: bool | None = None
    """Normalises queries and keys."""
    train_embeddings: bool | None = None
    """DiTDH: positions and Fourier frequencies are trained too (false)."""
    channel_mult: tuple[Positive, ...] | None = None
    """SongUNet: width of each level, times model.hidden_size; each has half the side of the one
    before."""
    attn_resolutions: tuple[Positive, ...] | None = None
    """SongUNet: sides of the levels whose blocks have attention ([16])."""
    dropout: Fraction | None = None
    """SongUNet: probability of dropout in each block (CIFAR10 0.13, 64 0.05; AFHQv2 had 0.25). What
    is dropped follows from train.seed and the example."""
    init_seed: Seed = 0
    """Seed of the random initial weights."""
    mode: Literal["auto", Mode] = "auto"
    """How the network is run; auto: compile on a GPU, eager on a CPU. graph: as compile, with both
    passes and the optimizer's step recorded as CUDA graphs, for few images a GPU; needs
    train.engine=ddp."""
    compile_unit: CompileUnit = "block"
    """What torch.compile takes at once: block compiles one for all of a width, in seconds;
    all_blocks takes minutes and leaves the host less to do in each step."""
    attention: Literal["auto", BackendName] = "auto"
    """Attention backend of mode fused; auto: the fastest that is right and repeats its bits."""
    checkpointing: Checkpointing = "none"
    """What is recomputed in the backward pass to save memory."""

    @property
    def is_ditdh(self) -> bool:
        """Whether the named network is a DiT-DH, which has an encoder and a head."""
        return self.name.startswith("DiTDH")

    @property
    def is_songunet(self) -> bool:
        """Whether the named network is a SongUNet, which has levels and no classes."""
        return self.name.startswith("SongUNet")

    @property
    def is_text_to_image(self) -> bool:
        """Whether the network is another library's, which is told prompts."""
        return self.name == "TextToImage"

    @property
    def has_classes(self) -> bool:
        """Whether the network is told class labels."""
        return not self.is_songunet and not self.is_text_to_image

    @property
    def has_null_class(self) -> bool:
        """Whether the network has a null class, as guidance and label dropout need it."""
        return self.class_dropout_prob > 0 and self.has_classes

    def check(self) -> None:
        self._check_text_to_image()
        if self.is_text_to_image:
            return
        self._check_songunet()
        if self.checkpointing == "elementwise" and self.mode != "fused":
            raise ValueError(
                f"model.checkpointing=elementwise needs model.mode=fused, got {self.mode}: set "
                "it, or model.checkpointing=selective"
            )
        where = f"for {self.name}" if self.is_ditdh else "without model.z_dims"
        for name in ("z_dims", "learn_sigma", "encoder_depth", "projector_dim"):
            projects = name in ("encoder_depth", "projector_dim")
            idle = self.is_ditdh or (self.z_dims is None and projects)
            if idle and getattr(self, name) is not None:
                raise ValueError(f"model.{name} has no meaning {where}: leave it out")
        for name in ("depth", "hidden_size", "num_heads"):
            value = getattr(self, name)
            if value is not None and isinstance(value, tuple) != self.is_ditdh:
                expected = "a pair, [encoder, head]," if self.is_ditdh else "a number"
                raise ValueError(f"model.{name} must be {expected} for {self.name}, got {value}")
        if self.train_embeddings is not None and not self.is_ditdh:
            raise ValueError(f"model.train_embeddings has no meaning for {self.name}: leave it out")

    def _check_text_to_image(self) -> None:
        if not self.is_text_to_image:
            for name in ("folder", "adapter"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"model.{name} has no meaning for {self.name}: leave it out, or set "
                        "model.name=TextToImage"
                    )
            return
        if self.folder is None:
            raise ValueError(
                "model.name=TextToImage needs model.folder=FOLDER, a local folder of a diffusers "
                "pipeline (for example of `hf download stabilityai/stable-diffusion-3.5-medium "
                "--local-dir FOLDER`)"
            )
        for name, ways in TEXT_TO_IMAGE_WAYS.items():
            value = getattr(self, name)
            if value not in ("auto", *ways):
                raise ValueError(
                    f"model.{name}={value} is not for text-to-image networks: {WHY_NOT[name]}; set "
                    f"it to {' or '.join(ways)}"
                )
        own = ("name", "folder", "adapter", "init_seed", *TEXT_TO_IMAGE_WAYS)
        for f in dataclasses.fields(self):
            if f.name not in own and getattr(self, f.name) != f.default:
                value = "null" if f.default is None else f.default
                raise ValueError(
                    f"model.{f.name} has no meaning for TextToImage, whose network is that of "
                    f"model.folder: leave it out, or take back what a recipe sets with "
                    f"model.{f.name}={value}"
                )

    def _check_songunet(self) -> None:
        if not self.is_songunet:
            idle = ("channel_mult", "attn_resolutions", "dropout")
        else:
            idle = ("learn_sigma", "num_heads", "mlp_ratio", "z_dims", "encoder_depth",
                    "projector_dim", "qk_norm")  # fmt: skip
            for name, ways in SONGUNET_WAYS.items():
                value = getattr(self, name)
                if value not in ("auto", *ways):
                    raise ValueError(
                        f"model.{name}={value} is not for {self.name}, which has no transformer "
                        f"blocks: set it to {' or '.join(ways)}"
                    )
        given = [f"model.{name}" for name in idle if getattr(self, name) is not None]
        if given:
            raise ValueError(
                f"{given[0]} has no meaning for {self.name}: leave it out, or take back what a "
                f"recipe sets with {' '.join(f'{name}=null' for name in given)}"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Section, name="objective"):
    """`MixFlow`'s arguments; the clock is the model's own."""

    gamma: float = 0.8
    """How far the interpolation is slowed, in [0, 1]; 0 is plain flow matching."""
    timesteps: str = "beta21"
    """Distribution of the time label t: beta21 (the paper's), uniform, logit-normal or
    logit-normal(mean,std)."""
    path: PathName = "linear"
    """Interpolation between noise and data."""
    shift: float = 1.0
    """RAE's shift of the times for large latents; 1 is none."""
    prediction: Prediction = "velocity"
    """What the network predicts."""
    target_at: TargetAt = "slowed"
    """Time of the target: slowed is the paper, label the published patch."""
    loss_weight: LossWeight | None = None
    """SiT's weights of noise and score predictions."""
    interval: Interval = "shifted"
    """Where m is drawn: shifted and raw say in which time it is slowed, full is m ~ U[0, 1]."""
    input_perturbation: NotNegativeFloat = 0.0
    """Noise added to the network's input, relative to the noise that is in it, the target unchanged
    (Ning et al. 2023: 0.1); a rival of slowing. 0 is none."""
    rollout_steps: NotNegative = 0
    """Scheduled sampling, an ablation: the input is an Euler step of the network itself, as long as
    those of a sampler of this many steps at most; one more forward pass. 0 is none."""
    impl: Impl = "auto"
    """auto takes the Triton kernels on a GPU and PyTorch elsewhere."""
    alignment_weight: NotNegativeFloat = 0.0
    """Weight of REPA's projection loss (REPA: 0.5); needs model.z_dims and teacher.path or
    data.features."""
    alignment_input: AlignmentInput = "slowed"
    """slowed: projections of the training forward; label: of x_t, by a second pass through the
    first blocks."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section, name="optim"):
    """AdamW with EMA; lengths in images seen, so that they do not depend on the batch."""

    name: OptimizerName = "adamw_ema"
    """apex_fused_adam needs NVIDIA apex and a GPU."""
    lr: NotNegativeFloat = 1e-4
    """Learning rate."""
    beta1: Fraction = 0.9
    """Decay of the gradient's average."""
    beta2: Fraction = 0.999
    """Decay of the squared gradient's average."""
    eps: PositiveFloat = 1e-8
    """Added to the square root in AdamW's denominator."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled weight decay."""
    grad_clip: NotNegativeFloat = 0.0
    """Largest global norm of the gradient; 0 does not clip."""
    ema_decays: tuple[Fraction, ...] = (0.9999,)
    """EMAs of the weights, decays per step; the first is the EMA of weights files and pictures,
    `mixflow-fast ema --decay` writes out the others."""
    ema_sigma_rel: tuple[SigmaRel, ...] = ()
    """Relative widths of power-function EMAs, [0.05, 0.1] in EDM2."""
    snapshot_every: NotNegative = 0
    """Steps between snapshots of those EMAs in OUT/ema; 0 is with every checkpoint."""
    impl: OptimizerImpl = "auto"
    """csrc is one pass, built with the package; auto takes what is there."""
    schedule: LrSchedule = "constant"
    """Learning rate after the warm-up."""
    warmup_images: NotNegative = 0
    """Images over which the learning rate rises from 0."""
    decay_images: NotNegative = 0
    """Images at which the schedule reaches optim.final_lr; 0 is train.images."""
    final_lr: float = 0.0
    """Learning rate at the end of the schedule."""

    def rate_at(self, images_seen: int, length: int) -> float:
        """The learning rate after so many images of a run of `length`."""
        return learning_rate(
            images_seen,
            lr=self.lr,
            schedule=self.schedule,
            warmup_images=self.warmup_images,
            decay_images=self.decay_images or length,
            final_lr=self.final_lr,
        )

    def check(self) -> None:
        if not self.ema_decays:
            raise ValueError("optim.ema_decays must name at least one decay, got []")
        if self.snapshot_every and not self.ema_sigma_rel:
            raise ValueError(
                f"optim.snapshot_every = {self.snapshot_every} has no meaning without "
                "optim.ema_sigma_rel: add optim.ema_sigma_rel=[0.05,0.1]"
            )
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(
                f"optim.final_lr must be in [0, optim.lr = {self.lr}], got {self.final_lr}"
            )
        if self.schedule != "constant" and 0 < self.decay_images <= self.warmup_images:
            raise ValueError(
                f"optim.decay_images = {self.decay_images} must be larger than "
                f"optim.warmup_images = {self.warmup_images}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section, name="train"):
    """Length, batch, precision, saving."""

    images: Positive = 1_000_000
    """Length: training images to see in all."""
    global_batch_size: Positive = 256
    """Images of one optimizer step, over all ranks."""
    microbatch_size: Positive = 32
    """At most this many images per rank and forward pass."""
    label_dropout: Fraction = 0.1
    """Probability of the null class instead of the label, for guidance."""
    precision: Precision = "bf16"
    """Of the forward and backward pass; master weights and EMAs are float32."""
    engine: EngineName = "deepspeed"
    """ddp keeps the whole state on every rank, sums once a step beside the backward pass and needs
    no DeepSpeed, for models that fit; set train.zero_stage=0 with it. May change on a resume."""
    zero_stage: ZeroStage = 2
    """Of DeepSpeed: what the ranks share out. 1 in bf16 has the host wait for the GPU once a
    step."""
    reduce_dtype: Precision = "fp32"
    """Of sums of gradients over the ranks; bf16 halves the bytes and rounds at each addition."""
    reduce_bucket_size: Positive = 50_000_000
    """Gradient elements that are summed at once; one buffer of them (two with train.overlap_comm)
    stays in memory. Not for DeepSpeed's ZeRO 0, nor 1 in bf16."""
    overlap_comm: bool = False
    """Sum over the ranks while the backward pass goes on; then the host waits for the GPU once per
    micro-batch. Not for ZeRO 0, nor 1 in bf16; ZeRO 3 and the engine ddp always do."""
    seed: Seed = 0
    """Of the order of examples, flips, times and noise."""
    init: str | None = None
    """Checkpoint whose EMA weights start model and EMA; null starts from random weights, or from
    those in model.folder."""
    device: Device = "auto"
    """auto takes the GPU where there is one."""
    deterministic: bool = False
    """Repeats its bits on a GPU too: deterministic algorithms alone, none chosen by timing, slower.
    An operator without such a way ends the run with its name. A resumed run must keep it."""
    timeout_minutes: Annotated[float, at_least(0.1)] = 30.0
    """A rank that hangs so long ends the run: longer than a save or a preview takes."""
    on_nonfinite: OnNonfinite = "stop"
    """What to do where loss or gradient is not finite."""
    max_skips: NotNegative = 10
    """Skipped steps in a row; more stop the run."""
    max_rollbacks: NotNegative = 3
    """Of the whole run; one more stops it."""
    log_every: Positive = 50
    """Steps between rows of OUT/metrics.jsonl."""
    save_every: NotNegative = 5000
    """Steps between checkpoints; 0 saves at the end only."""
    keep_last: Positive = 2
    """Newest resumable checkpoints that stay on disk."""
    keep_every: NotNegative = 0
    """Steps, a multiple of train.save_every: those checkpoints stay for good."""
    save_weights: SaveWeights = "end"
    """Which checkpoints have a weights.pt: all, the one at train.images, or none. `mixflow-fast
    consolidate` makes it of any other."""
    loggers: tuple[LoggerName, ...] = ()
    """Copies of metrics.jsonl, as [tensorboard]; wandb is offline by default."""
    preview_every: NotNegative = 0
    """Steps between pictures OUT/previews/step_N.png, drawn from the EMA; 0 is none."""
    previews: Positive = 16
    """Samples in each picture."""
    preview_steps: Positive = 50
    """Euler steps of the previews."""
    preview_cfg: float = 1.0
    """Guidance scale of the previews; 1 is none."""
    preview_decoder: str | None = None
    """Local folder of the latents' decoder, as of `sample --decoder`; null is model.folder's vae
    for text to image, and else shows three channels."""
    preview_grid: SigmaGrid | None = None
    """Text to image: noise levels of the previews, those of diffusers' scheduler, or of
    linspace(1, 1/N, N); null is what the pipeline of the folder takes."""
    preview_prompts: tuple[str, ...] | None = None
    """Text to image: prompts of the previews, out of the cache; null takes its first ones."""
    preview_stats: str | None = None
    """RAE: stat.pt, for the decoder; null is that of encoder.stats."""
    validate_every: NotNegative = 0
    """Steps between validation losses at fixed times and noise; 0 is none."""
    validate_examples: Positive = 128
    """Held-out examples where the data kind has such, else training ones."""

    def check(self) -> None:
        if self.keep_every and (not self.save_every or self.keep_every % self.save_every):
            raise ValueError(
                f"train.keep_every must be a multiple of train.save_every = {self.save_every}, or "
                f"no checkpoint falls on it, got {self.keep_every}"
            )
        if self.engine == "ddp":
            self._check_ddp()
        elif self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError(
                "train.precision=bf16 needs train.zero_stage >= 1: DeepSpeed's bf16 optimizer "
                "without ZeRO takes a step with zero gradients when it is built. On one rank ZeRO "
                "1 shards nothing and costs nothing; train.engine=ddp trains bf16 without ZeRO"
            )

    def _check_ddp(self) -> None:
        if self.zero_stage:
            raise ValueError(
                f"train.engine=ddp shares nothing out between the ranks, got train.zero_stage="
                f"{self.zero_stage}: add train.zero_stage=0, or leave train.engine out"
            )
        if self.overlap_comm:
            raise ValueError(
                "train.overlap_comm=true has no meaning for train.engine=ddp, which always sums "
                "while the backward pass goes on: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    """Everything that decides a run's result, and `out`, where it goes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    cond: CondConfig = field(default_factory=CondConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = "runs/default"
    """Folder of the run."""

    def check(self) -> None:
        if not self.out.strip():
            raise ValueError(
                f"out must name the folder of the run, got {self.out!r}: out=runs/NAME"
            )

    def to_dict(self) -> dict[str, object]:
        """Plain nested dict of scalars and lists."""
        return dataclasses.asdict(self, dict_factory=_plain)

    def to_yaml(self) -> str:
        """The whole configuration as YAML; `load_config` reads it back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: object) -> Config:
        """A copy with changes by field or dotted name: `replace(**{"train.seed": 1})`."""
        by_section: dict[str, dict[str, object]] = {}
        for name, value in changes.items():
            check_key(name)
            section, _, own = name.rpartition(".")
            if isinstance(value, Mapping) and name in SECTIONS:
                value = SECTIONS[name](**value)
            by_section.setdefault(section, {})[own] = value
        top = by_section.pop("", {})
        for section, values in by_section.items():
            top[section] = dataclasses.replace(getattr(self, section), **values)
        return dataclasses.replace(self, **top)

    def microbatch(self, world_size: int) -> int:
        """Examples per forward pass: the largest equal parts of a rank's share that are allowed."""
        share, most = self.train.global_batch_size // world_size, self.train.microbatch_size
        return next(size for size in range(min(share, most), 0, -1) if share % size == 0)

    @property
    def latent(self) -> bool:
        """Whether the network makes latents: those of the data, or an encoder's."""
        return self.data.kind in ("latents", "captioned") or self.encoder.kind != "none"

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return -(-self.train.images // self.train.global_batch_size)


SECTIONS: Mapping[str, type[Section]] = {
    "model": ModelConfig,
    "objective": ObjectiveConfig,
    "source": SourceConfig,
    "cond": CondConfig,
    "lora": LoraConfig,
    "data": DataConfig,
    "encoder": EncoderConfig,
    "teacher": TeacherConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
}


def check_key(name: str, value: object = None) -> None:
    """Refuse a dotted name that no field and no section has.

    Args:
        name: section and field, or a section, or a field of `Config` itself.
        value: what it was given, for the error.

    Raises:
        ValueError: with the nearest name, with the new one of a key that was renamed, or with ours
            for a name that other trainers give.
    """
    own = [f.name for f in dataclasses.fields(Config)]
    below = {s: [f"{s}.{f.name}" for f in dataclasses.fields(cls)] for s, cls in SECTIONS.items()}
    every = [*own, *(n for names in below.values() for n in names)]
    if name in every:
        return
    refuse_former_key(name, value)
    elsewhere = name_elsewhere(name, value)
    if elsewhere is not None:
        raise ValueError(f"unknown key {name!r}: {elsewhere}")
    # The right field in the wrong section is a commoner slip than a wrong letter.
    field = name.rpartition(".")[2]
    same_field = [known for known in every if known.rpartition(".")[2] == field]
    near = below.get(name.partition(".")[0], every)
    raise ValueError(f"unknown key {name!r}{did_you_mean(name, same_field or near)}")


def hint_of(name: str) -> object:
    """The type of a field or section with its rule, by its dotted name."""
    section, _, own = name.rpartition(".")
    return hints_of(SECTIONS[section] if section else Config)[own]


def _plain(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in items}
