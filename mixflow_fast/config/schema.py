"""The configuration of a run: frozen dataclasses, YAML recipes, dotted overrides.

A recipe is a YAML file with the sections below; `section.field=value` overrides one field. Every
name is checked, every value has its field's type, and `validate` refuses impossible combinations
before any work is done. The marker `???` stands for a value that the user has to give.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

# What each kind of data takes from the section `data`; anything else that is set is refused.
DATA_FIELDS = {
    "photos": ("size", "flip"),
    "digits": ("size",),
    "folder": ("path", "size", "flip"),
    "latents": ("path", "scale", "moments"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network, and how it is run. Fields that are None keep the named model's own value."""

    name: str = "SiT-XL/2"  # SiT-{S,B,L,XL}/{2,4,8} | DiTDH-{S,B,L,XL}
    input_size: int = 32  # side of the latent or image
    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # > 0 gives the null class its row
    learn_sigma: bool | None = None  # SiT: official checkpoints have the unused sigma half (true)
    depth: int | tuple[int, ...] | None = None  # DiTDH: [encoder, head], like the next two
    hidden_size: int | tuple[int, ...] | None = None
    num_heads: int | tuple[int, ...] | None = None
    mlp_ratio: float | None = None
    z_dims: tuple[int, ...] | None = None  # REPA's projector outputs; makes it REPA's SiT
    encoder_depth: int | None = None
    projector_dim: int | None = None
    qk_norm: bool | None = None
    train_embeddings: bool | None = None  # DiTDH: positions and Fourier frequencies too (false)
    init_seed: int = 0  # of the random initial weights
    mode: str = "auto"  # eager | compile | fused; auto = compile on a GPU, eager on a CPU
    attention: str = "auto"  # flash3 | flash2 | cudnn | flash | efficient | math
    checkpointing: str = "none"  # none | elementwise | selective | full: recomputed


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """`MixFlow`'s arguments; the clock is the model's own."""

    gamma: float = 0.8
    timesteps: str = "beta21"
    path: str = "linear"
    shift: float = 1.0
    prediction: str = "velocity"
    target_at: str = "slowed"
    loss_weight: str | None = None
    interval: str = "shifted"
    impl: str = "auto"
    alignment_weight: float = 0.0  # of REPA's projection loss (REPA: 0.5); needs model.z_dims and
    # teacher.path or data.features
    alignment_input: str = "slowed"  # slowed: projections of the training forward; label: of x_t


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the examples come from."""

    kind: str = "latents"  # photos | digits | folder | latents
    path: str | None = None  # folder and latents
    size: int | None = None  # side in pixels: photos, digits, folder
    flip: bool = False  # random horizontal flips: photos, folder
    moments: bool = False  # latents hold VAE mean|std: the posterior is sampled every step
    scale: float = 1.0  # latents are multiplied by this (SD-VAE: 0.18215)
    features: str | None = None  # .npy of teacher features (N, T, z) for REPA
    images: str | None = None  # uint8 images of the latents, for the teacher: folder, .npy, .npz
    workers: int = 0  # decoding threads


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """REPA's frozen DINOv2, run during training instead of reading `data.features`."""

    path: str | None = None  # local folder with config.json and model.safetensors
    resolution: int | None = None  # pixels it sees; null = REPA's: 224 for 256 px, 448 for 512 px
    precision: str | None = None  # fp32 | bf16; null = train.precision
    positions: str = "repa"  # resampled once as REPA does; model: by transformers


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with EMA; lengths in images seen, so that they do not depend on the batch."""

    name: str = "adamw_ema"  # adamw_ema | apex_fused_adam (needs NVIDIA apex and a GPU)
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # global norm; 0 = off
    ema_decay: float = 0.9999  # per step
    ema_more_decays: tuple[float, ...] = ()  # further EMAs; `mixflow-fast ema --decay`
    ema_sigma_rel: tuple[float, ...] = ()  # widths of power-function EMAs, [0.05, 0.1] in EDM2
    snapshot_every: int = 0  # steps; those EMAs go to OUT/ema; 0 = with every checkpoint
    impl: str = "auto"  # csrc (one pass, built with the package) | foreach; auto = what is there
    schedule: str = "constant"  # constant | linear | cosine
    warmup_images: int = 0
    decay_images: int = 0  # 0 = train.images
    final_lr: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, precision, saving."""

    images: int = 1_000_000  # training images to see in all
    global_batch_size: int = 256
    microbatch_size: int = 32  # at most this many examples per rank and forward pass
    label_dropout: float = 0.1  # probability of the null class (for guidance)
    precision: str = "bf16"  # bf16 | fp32
    zero_stage: int = 2  # DeepSpeed ZeRO 0-3; bf16 at 1 waits for the host once a step
    seed: int = 0
    init: str | None = None  # checkpoint whose EMA weights start model and EMA; null = random
    device: str = "auto"  # auto | cpu | cuda
    timeout_minutes: float = 30.0  # a rank that hangs so long ends the run; saves must fit in
    on_nonfinite: str = "stop"  # stop | skip | rollback: where loss or gradient is not finite
    max_skips: int = 10  # steps in a row; more stop the run
    max_rollbacks: int = 3  # of the whole run; one more stops it
    log_every: int = 50  # steps
    save_every: int = 5000  # steps; 0 = only at the end
    keep: int = 2  # newest resumable checkpoints that stay on disk
    keep_every: int = 0  # steps, a multiple of save_every; those checkpoints stay for good
    save_weights: str = "always"  # always | end | never: weights.pt in each checkpoint, in the last
    # one, in none (`mixflow-fast consolidate` makes it from the shards)
    loggers: tuple[str, ...] = ()  # of metrics.jsonl: tensorboard, wandb (offline by default)
    preview_every: int = 0  # steps; OUT/previews/step_N.png from the EMA; 0 = none
    previews: int = 16  # pictures in each
    preview_steps: int = 50  # Euler steps
    preview_cfg: float = 1.0  # guidance scale; 1 = none
    validate_every: int = 0  # steps; losses at fixed times and noise; 0 = none
    validate_examples: int = 128  # held-out where the data kind has such, else training examples


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's result, and `out`, where it goes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    out: str = "runs/default"

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of scalars and lists."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """The whole configuration as YAML; `load_config` reads it back."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def replace(self, **changes: Any) -> Config:
        """A copy with changes by field or dotted name: `replace(**{"train.seed": 1})`."""
        from mixflow_fast.config.loading import _set, from_dict

        tree = self.to_dict()
        for dotted, value in changes.items():
            _set(tree, dotted, value)
        return from_dict(tree)

    def microbatch(self, world_size: int) -> int:
        """Examples per forward pass: the largest equal parts of a rank's share that are allowed."""
        share, most = self.train.global_batch_size // world_size, self.train.microbatch_size
        return next(size for size in range(min(share, most), 0, -1) if share % size == 0)

    @property
    def steps(self) -> int:
        """Optimizer steps in the run."""
        return -(-self.train.images // self.train.global_batch_size)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value
