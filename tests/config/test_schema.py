"""Sections refuse what no configuration can have, as soon as they are made."""

import typing
from collections.abc import Callable

import pytest
import yaml

from mixflow_fast.config.data_sections import DATA_FIELDS, DataKind
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import (
    SECTIONS,
    Config,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from mixflow_fast.data import build_dataset
from mixflow_fast.flow.path import PATHS, PathName
from mixflow_fast.kernels.attention.backends import BACKENDS, REGISTRY
from mixflow_fast.models.dinov2 import PRECISIONS, Precision
from mixflow_fast.optim.apex import OPTIMIZERS, OptimizerName

REFUSED = [
    ("train.precision=fp16", "train.precision must be one of"),
    ("train.zero_stage=4", "train.zero_stage must be one of 0, 1, 2, 3, got"),
    ("train.reduce_dtype=fp16", "train.reduce_dtype must be one of bf16, fp32, got 'fp16'"),
    ("train.reduce_bucket_size=0", "train.reduce_bucket_size must be >= 1, got 0"),
    ("train.overlap_comm=2", "train.overlap_comm must be true or false, got"),
    ("train.zero_stage=true", "train.zero_stage must be one of"),
    ("train.images=0", "train.images must be >= 1"),
    ("train.seed=-1", r"train.seed must be in \[0, 2\*\*63\), got -1"),
    ("train.seed=1e20", "train.seed must be in"),
    ("optim.eps=-1", "optim.eps must be > 0, got -1"),
    ("model.input_size=-3", "model.input_size must be >= 1, got -3"),
    ("model.depth=0", "model.depth must be >= 1, got 0"),
    ("model.z_dims=[0]", "model.z_dims must be >= 1, got 0"),
    ("train.label_dropout=1", r"label_dropout must be in \[0, 1\)"),
    ("train.device=tpu", "train.device"),
    ("train.timeout_minutes=0", "train.timeout_minutes must be >= 0.1, got 0.0"),
    ("train.loggers=[mlflow]", r"train.loggers must be a list of names out of .*\['mlflow'\]"),
    ("train.loggers=[1]", "train.loggers must be a list"),
    ("{keep_every: 3, save_every: 2}", "train.keep_every must be a multiple of"),
    ("{precision: bf16, zero_stage: 0}", "train.precision=bf16 needs train.zero_stage >= 1"),
    ("optim.schedule=step", "optim.schedule"),
    (
        "optim.name=adam",
        "optim.name must be one of adamw_ema, apex_fused_adam, got 'adam'",
    ),
    ("optim.lr=inf", "optim.lr must be finite"),
    ("optim.final_lr=1", "optim.final_lr"),
    ("optim.ema_decays=[1]", r"optim.ema_decays must be in \[0, 1\), got 1"),
    ("optim.ema_decays=[0.9, nan]", "optim.ema_decays must be finite"),
    ("optim.ema_decays=[]", "optim.ema_decays must name at least one"),
    ("optim.ema_decays=0.9", "optim.ema_decays must be a list of numbers"),
    ("objective.prediction=x0", "objective.prediction must be one of"),
    ("objective.path=cosine", "objective.path must be one of"),
    ("objective.loss_weight=snr", "loss_weight must be one of velocity, likelihood, null"),
    ("data.kind=foo", "data.kind must be one of"),
    ("model.init_seed=1e20", r"model.init_seed must be in \[0, 2\*\*63\)"),
    ("model.encoder_depth=2", "z_dims"),
    ("model.mode=fast", "model.mode must be one of"),
    ("model.attention=fa2", "model.attention must be one of"),
    ("model.checkpointing=all", "model.checkpointing must be one of"),
    ("model.checkpointing=elementwise", "model.checkpointing=elementwise needs model.mode=fused"),
    ("model.name=DiTDH-S", "model.learn_sigma has no meaning for DiTDH-S"),
    ("{name: DiTDH-S, depth: 4}", r"depth must be a pair, \[encoder"),
    ("model.depth=[2, 1]", "model.depth must be a number for SiT-S/4"),
    ("model.train_embeddings=true", "no meaning for SiT-S/4"),
]


@pytest.mark.parametrize(("override", "message"), REFUSED)
def test_what_a_section_refuses(override: str, message: str) -> None:
    if override.startswith("{"):
        section = "model" if "name" in override else "train"
        override = f"{section}={override}"
    with pytest.raises(ValueError, match=message):
        load_config("photos", [override])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(seed=-1), "train.seed must be in .*, got -1"),
        (lambda: OptimConfig(lr=float("nan")), "optim.lr must be finite"),
        (lambda: ModelConfig(mode="fast"), "model.mode must be one of"),
        (lambda: Config(train=3), "train must be a section, got 3"),
        (
            lambda: Config().replace(**{"train.seed": 0.5}),
            "train.seed must be a whole number, got 0.5",
        ),
        (lambda: Config().replace(seed=1), "unknown key 'seed'; did you mean 'train.seed'"),
        (
            lambda: Config().replace(**{"optm.lr": 1}),
            "unknown key 'optm.lr'; did you mean 'optim.lr'",
        ),
    ],
)
def test_code_is_held_to_the_same(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_values_have_the_fields_type() -> None:
    made = OptimConfig(lr=1, ema_decays=[0, "0.5"], warmup_images="1e3")
    assert (made.lr, made.ema_decays, made.warmup_images) == (1.0, (0.0, 0.5), 1000)
    assert [type(v) for v in (made.lr, *made.ema_decays, made.warmup_images)] == [float] * 3 + [int]
    assert ModelConfig(depth="4").depth == 4
    assert ModelConfig(name="DiTDH-S", depth=[4, 2]).depth == (4, 2)


def test_replace_and_yaml_are_plain() -> None:
    config = load_config("repa-xl2-256", ["data.path=x", "train.init=y"])
    changed = config.replace(**{"train.seed": 7, "train.log_every": 3, "optim.lr": 1, "out": "z"})
    assert (changed.train.seed, changed.train.log_every, changed.out) == (7, 3, "z")
    assert changed.optim.lr == 1.0 and changed.model == config.model
    assert config.train.seed == 0
    assert yaml.safe_load(config.to_yaml())["model"]["z_dims"] == [768]
    assert yaml.safe_load(config.to_yaml()) == config.to_dict()


def test_every_section_is_a_field_and_names_itself() -> None:
    config = Config()
    assert {name: type(getattr(config, name)) for name in SECTIONS} == SECTIONS
    assert {cls.section_name: cls for cls in SECTIONS.values()} == SECTIONS
    assert list(config.to_dict()) == [*SECTIONS, "out"]


def test_every_choice_has_what_it_names() -> None:
    """A choice is stated once; what serves it is registered under the same name."""
    assert tuple(REGISTRY) == BACKENDS
    assert tuple(OPTIMIZERS) == typing.get_args(OptimizerName)
    assert set(PATHS) == set(typing.get_args(PathName))
    assert set(PRECISIONS) == set(typing.get_args(Precision))
    assert tuple(DATA_FIELDS) == typing.get_args(DataKind)
    with pytest.raises(ValueError, match=f"one of {', '.join(DATA_FIELDS)}, got"):
        build_dataset("none of them")
