"""What only the whole configuration, or the machine, can refuse."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from tests.support.configs import resolved

IMPOSSIBLE = [
    ("model.class_dropout_prob=0", "null class"),
    ("objective.alignment_weight=1", "z_dims"),
    ("data.kind=latents", "data.path"),
    ("objective={gamma: 0.3, rollout_steps: 5}", "needs objective.gamma=0"),
    ("objective={gamma: 0, rollout_steps: 5, path: gvp}", "needs objective.path=linear"),
    ("objective={gamma: 0, rollout_steps: 5, input_perturbation: 0.1}", "input_perturbation=0"),
    ("data.moments=true", "data.moments has no meaning"),
    ("data={kind: latents, path: x, flip: true}", "data.flip has no meaning"),
    ("data={kind: latents, path: x, features: y}", "without objective.alignment_weight"),
]


@pytest.mark.parametrize(("override", "message"), IMPOSSIBLE)
def test_impossible_combinations(override: str, message: str) -> None:
    config = load_config("photos", [override])
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mode=fused", "train.zero_stage=3"], r"model.mode=fused .* train.zero_stage=2"),
        (["model.checkpointing=full", "train.zero_stage=3"], "model.checkpointing=full"),
        (["objective={gamma: 0, rollout_steps: 5}", "train.zero_stage=3"], "rollout_steps=0"),
    ],
)
def test_refuses_networks_that_cannot_run(overrides: list[str], message: str) -> None:
    config = load_config("photos", overrides)
    with pytest.raises(ValueError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("reduce_dtype=bf16 precision=fp32", "train.reduce_dtype=bf16 would round"),
        (
            "overlap_comm=true zero_stage=0 precision=fp32",
            "train.overlap_comm = True has no meaning",
        ),
        ("overlap_comm=true zero_stage=1", "train.zero_stage=1 in bf16"),
        ("reduce_bucket_size=1000 zero_stage=1", "train.reduce_bucket_size = 1000 has no meaning"),
        ("reduce_bucket_size=1000 zero_stage=0 precision=fp32", "zero_stage=0 in fp32"),
    ],
)
def test_refuses_settings_of_communication_that_deepspeed_would_ignore(
    overrides: str, message: str
) -> None:
    given = [f"train.{text}" for text in ("precision=bf16", "zero_stage=2", *overrides.split())]
    with pytest.raises(ValueError, match=message):
        validate(load_config("photos", given))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_takes_settings_of_communication(stage: int) -> None:
    given = ["overlap_comm=true", "reduce_bucket_size=1e6", f"zero_stage={stage}", "precision=fp32"]
    config = load_config("photos", [f"train.{text}" for text in given])
    assert config.train.reduce_bucket_size == 1_000_000
    validate(config)


def test_trained_embeddings_need_float32() -> None:
    c = resolved("rae-xl-256").replace(**{"model.train_embeddings": True})
    with pytest.raises(ValueError, match="train.precision=fp32"):
        validate(c)
    validate(c.replace(**{"train.precision": "fp32"}))
    c = resolved("rae-xl-256").replace(**{"train.zero_stage": 3})
    with pytest.raises(ValueError, match="train.zero_stage=2"):
        validate(c)


def test_batch_must_divide_by_the_ranks_and_microbatches_fit() -> None:
    config = load_config("photos", ["train.global_batch_size=96", "train.microbatch_size=40"])
    assert [config.microbatch(ranks) for ranks in (1, 2, 3, 4)] == [32, 24, 32, 24]
    with pytest.raises(ValueError, match="ranks, got 5"):
        validate(config, world_size=5)


def test_loggers_need_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What wandb leaves in the working directory is not the package.
    (tmp_path / "wandb").mkdir()
    config = load_config("photos", ["train.loggers=[wandb]"])
    assert config.train.loggers == ("wandb",)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])
        patch.delitem(sys.modules, "wandb", raising=False)
        with pytest.raises(ValueError, match="needs the package wandb: pip install wandb"):
            validate(config)
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    validate(config)


RAE = [
    "model={name: DiTDH-S, input_size: 4, in_channels: 32, num_classes: 2}",
    "data={kind: images, path: x}",
    "encoder={kind: rae, path: y}",
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data={kind: latents, path: x}"], "got data.kind=latents, which are encoded already"),
        (["data={kind: photos}"], "makes latents of images, got data.kind=photos.*folder, images"),
        (["encoder.path=null"], "encoder.path must be given for encoder.kind=rae.*registers-base"),
        (["encoder.path=null", "encoder.kind=sdvae"], "for encoder.kind=sdvae.*sd-vae-ft"),
        (["encoder={kind: none}"], "3 channels, model.in_channels = 32 .*add encoder.kind=rae "),
        (
            ["encoder={kind: none}", "model.in_channels=4"],
            "3 channels, model.in_channels = 4 .*add encoder.kind=sdvae .*data encode",
        ),
        (["encoder={kind: none, stats: z}"], "encoder.stats has no meaning for encoder.kind=none"),
        (["encoder={kind: sdvae, path: y, stats: z}"], "encoder.stats has no meaning .*=sdvae"),
        (["data.size=32"], "data.size = 32 .* model.input_size = 4: .*leave data.size out .it is"),
    ],
)
def test_encoders_that_do_not_fit_the_data_or_the_model(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(load_config("photos", [*RAE, *overrides]))


def test_encoders_that_fit() -> None:
    for more in ([], ["data.size=64"], ["encoder.stats=z", "encoder.precision=bf16"]):
        validate(load_config("photos", [*RAE, *more]))
    for kind in ("folder", "webdataset"):
        validate(load_config("photos", [*RAE, f"data.kind={kind}"]))
    pixels = ["encoder={kind: none}", "model.in_channels=3"]
    validate(load_config("photos", [*RAE, *pixels]))


def test_a_teacher_sees_the_images_of_which_an_encoder_makes_latents() -> None:
    repa = ["model={name: SiT-S/2, input_size: 8, in_channels: 4, num_classes: 2, z_dims: [32]}"]
    repa += ["objective.alignment_weight=0.5", "teacher.path=t", "encoder.kind=sdvae"]
    validate(load_config("photos", [*RAE, *repa]))
    with pytest.raises(ValueError, match="the teacher sees RGB images"):
        validate(load_config("photos", [*repa, "encoder={kind: none}"]))
