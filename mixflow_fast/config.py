"""The configuration of a run: frozen dataclasses, YAML recipes, dotted overrides.

A recipe is a YAML file with the sections below; `section.field=value` overrides one field. Every
name is checked, every value has its field's type, and `validate` refuses impossible combinations
before any work is done. The marker `???` stands for a value that the user has to give.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REQUIRED = "???"
RECIPES = Path(__file__).parent / "recipes"
# What each kind of data takes from the section `data`; anything else that is set is refused.
DATA_FIELDS = {
    "photos": ("size", "flip"),
    "digits": ("size",),
    "folder": ("path", "size", "flip"),
    "latents": ("path", "scale", "moments"),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Fields that are None keep the named model's own value."""

    name: str = "SiT-XL/2"  # SiT-{S,B,L,XL}/{2,4,8}
    input_size: int = 32  # side of the latent or image
    in_channels: int = 4
    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # > 0 gives the null class its row
    learn_sigma: bool = True  # official SiT checkpoints have the unused sigma half
    depth: int | None = None
    hidden_size: int | None = None
    num_heads: int | None = None
    mlp_ratio: float | None = None
    z_dims: tuple[int, ...] | None = None  # REPA's projector outputs; makes it REPA's SiT
    encoder_depth: int | None = None
    projector_dim: int | None = None
    qk_norm: bool | None = None
    init_seed: int = 0  # of the random initial weights


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
    alignment_weight: float = 0.0  # REPA's projection loss; needs model.z_dims and data features


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
    workers: int = 0  # decoding threads


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with EMA; lengths in images seen, so that they do not depend on the batch."""

    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 0.0  # global norm; 0 = off
    ema_decay: float = 0.9999  # per step
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
    log_every: int = 50  # steps
    save_every: int = 5000  # steps; 0 = only at the end
    keep: int = 2  # newest resumable checkpoints that stay on disk


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run's result, and `out`, where it goes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    data: DataConfig = field(default_factory=DataConfig)
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


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `section.field=value` overrides, check names and types.

    Raises:
        ValueError: unknown recipe, key or type, or a `???` left unset; names the nearest valid one.
    """
    import yaml

    file = Path(recipe)
    if file.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise ValueError(
                f"recipe {recipe!r} is not one of {', '.join(recipe_names())}"
                f"{_nearest(recipe, recipe_names())}; or give the path of a .yaml file"
            )
        file = RECIPES / f"{recipe}.yaml"
    if not file.is_file():
        raise ValueError(f"recipe file {recipe} does not exist")
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe file {recipe} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe file {recipe} must hold sections, got {type(tree).__name__}")
    tree.setdefault("out", f"runs/{file.stem}")
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form section.field=value")
        try:
            _set(tree, dotted, yaml.safe_load(text) if text else None)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: value is not valid YAML: {error}") from None
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a `Config` from nested dicts; ValueError on unknown keys, wrong types, unset `???`."""
    return _build(Config, tree, "")


def _build(cls: type, tree: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = prefix + str(key)
        if key not in fields:
            every = [prefix + f for f in fields] if prefix else _all_names()
            raise ValueError(f"unknown key {name!r}{_nearest(name, every)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be a section, got {value!r}")
            values[key] = _build(hints[key], value, f"{name}.")
        else:
            values[key] = _convert(name, value, hints[key])
    return cls(**values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    if value == REQUIRED:
        raise ValueError(f"{name} must be given: add {name}=VALUE{_HELP.get(name, '')}")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            if all(isinstance(v, int) and not isinstance(v, bool) for v in value):
                return tuple(value)
        elif option is float and isinstance(value, (int, float, str)):
            # YAML reads 1e-4 as text: it wants 1.0e-4.
            try:
                if not isinstance(value, bool):
                    return float(value)
            except ValueError:
                continue
        elif option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        elif option is int and isinstance(value, str) and _is_integer(value):
            return int(float(value))
        elif isinstance(option, type) and isinstance(value, option):
            if option is bool or not isinstance(value, bool):
                return value
    names = ["null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options]
    expected = " or ".join(names)
    raise ValueError(f"{name} must be {expected}, got {value!r}")


_HELP = {
    "train.init": " (the checkpoint to post-train; null trains from random weights)",
    "data.path": " (latents: .npz, .npy or a folder; folder: class folders with images)",
}


def _is_integer(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"unknown key {dotted!r}{_nearest(dotted, _all_names())}")
    tree[name] = value


def _all_names() -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(Config).items():
        names.append(name)
        if dataclasses.is_dataclass(hint):
            names += [f"{name}.{f.name}" for f in dataclasses.fields(hint)]
    return names


def _nearest(name: str, names: list[str]) -> str:
    # A field without its section is the commonest slip: lr= for optim.lr=.
    same_field = [n for n in names if n.rpartition(".")[2] == name.rpartition(".")[2]]
    match = same_field or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def validate(config: Config, world_size: int = 1) -> None:
    """Refuse values and combinations that cannot work. Reads nothing from disk.

    Raises:
        ValueError: names the field, what came, what is expected.
    """
    m, o, d, p, t = config.model, config.objective, config.data, config.optim, config.train
    for name, value in _leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    _check_data(d, o.alignment_weight > 0)
    _choice("train.precision", t.precision, ("bf16", "fp32"))
    _choice("train.zero_stage", t.zero_stage, (0, 1, 2, 3))
    _choice("train.device", t.device, ("auto", "cpu", "cuda"))
    _choice("optim.schedule", p.schedule, ("constant", "linear", "cosine"))
    for name, value, low in (
        ("train.images", t.images, 1),
        ("train.global_batch_size", t.global_batch_size, 1),
        ("train.microbatch_size", t.microbatch_size, 1),
        ("train.log_every", t.log_every, 1),
        ("train.save_every", t.save_every, 0),
        ("train.keep", t.keep, 1),
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
    ):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
    if not 0 <= p.final_lr <= p.lr:
        raise ValueError(f"optim.final_lr must be in [0, optim.lr = {p.lr}], got {p.final_lr}")
    if not 0 <= m.init_seed < 1 << 63:
        raise ValueError(f"model.init_seed must be in [0, 2**63), got {m.init_seed}")
    if m.z_dims is None:
        for name in ("encoder_depth", "projector_dim"):
            if getattr(m, name) is not None:
                raise ValueError(f"model.{name} has no meaning without model.z_dims: leave it out")
    if t.label_dropout and not m.class_dropout_prob:
        raise ValueError(
            f"train.label_dropout = {t.label_dropout} needs a null class: set "
            "model.class_dropout_prob > 0, or train.label_dropout=0"
        )
    if o.alignment_weight and not (m.z_dims and len(m.z_dims) == 1 and d.features):
        raise ValueError(
            f"objective.alignment_weight = {o.alignment_weight} needs model.z_dims (one REPA "
            "projector) and data.features (the teacher's features)"
        )
    if p.schedule != "constant" and 0 < p.decay_images <= p.warmup_images:
        raise ValueError(
            f"optim.decay_images = {p.decay_images} must be larger than optim.warmup_images = "
            f"{p.warmup_images}"
        )


def _check_data(d: DataConfig, aligned: bool) -> None:
    _choice("data.kind", d.kind, tuple(DATA_FIELDS))
    taken = (*DATA_FIELDS[d.kind], *(("features",) if d.kind == "latents" and aligned else ()))
    if "path" in taken and d.path is None:
        raise ValueError(f"data.path must be given for data.kind={d.kind}: add data.path=PATH")
    for f in dataclasses.fields(d):
        given = getattr(d, f.name) != f.default and f.name not in ("kind", "workers")
        if given and f.name not in taken:
            why = "without objective.alignment_weight" if f.name == "features" else ""
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
