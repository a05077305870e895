"""The section `cond`, and what of a configuration has no meaning for a text-to-image network."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixflow_fast.config.cond_section import CondConfig
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import ModelConfig
from mixflow_fast.config.validate import validate
from tests.support.captioned import tiny

HERE = Path("model")


def test_encoders_with_their_probabilities(tmp_path: Path) -> None:
    section = CondConfig(drop_each=["clip_l:0.1", "t5: 0.25"])
    assert section.drop_by_encoder() == {"clip_l": 0.1, "t5": 0.25}
    assert CondConfig().drop_by_encoder() == {} and CondConfig().drop == 0.1
    # As an override is written, and through a run's own config.yaml.
    recipe = tmp_path / "run.yaml"
    recipe.write_text(tiny(HERE, HERE).to_yaml())
    config = load_config(str(recipe), ["cond.drop_each=[clip_l:0.1,t5:0.25]", "cond.drop=0"])
    assert config.cond == CondConfig(drop=0.0, drop_each=("clip_l:0.1", "t5:0.25"))
    recipe.write_text(config.to_yaml())
    assert load_config(str(recipe)) == config


@pytest.mark.parametrize("entry", ["clip_l", "clip_l:", ":0.1", "t5:1", "t5:-0.1", "t5:nan"])
def test_entries_that_mean_nothing(entry: str) -> None:
    with pytest.raises(ValueError, match="must hold entries NAME:PROBABILITY"):
        CondConfig(drop_each=(entry,))


def test_an_encoder_is_named_once() -> None:
    with pytest.raises(ValueError, match="names t5 twice"):
        CondConfig(drop_each=("t5:0.1", "t5:0.2"))
    with pytest.raises(ValueError, match="cond.drop_each must be a list of texts"):
        CondConfig(drop_each="t5:0.1")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.label_dropout": 0.1}, r"set train.label_dropout=0 \(cond.drop drops prompts\)"),
        ({"objective.alignment_weight": 0.5}, "alignment_weight = 0.5 has no meaning for Text"),
        ({"objective.prediction": "data"}, "objective.prediction=data is not for TextToImage"),
        ({"objective.path": "gvp"}, "objective.path=gvp is not for TextToImage"),
        ({"source.kind": "mixed", "source.lam": 1.0}, "source.kind=mixed is not for TextToImage"),
        ({"data.kind": "photos", "data.path": None}, "needs data with prompts, got data.kind=phot"),
        ({"encoder.kind": "sdvae", "encoder.path": "vae"}, "makes latents of images, got data.ki"),
        ({"model.mode": "compile", "train.zero_stage": 3}, "where ZeRO 3 does not gather them"),
        ({"train.engine": "ddp"}, "add train.zero_stage=0"),
    ],
)
def test_what_does_not_go_with_such_a_network(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        validate(tiny(HERE, HERE, **changes))


def test_what_goes_with_it() -> None:
    for changes in (
        {"train.zero_stage": 3, "model.checkpointing": "full"},
        {"model.mode": "compile", "model.checkpointing": "full"},
        {"objective.gamma": 0.0, "objective.timesteps": "logit-normal"},
        {"train.preview_cfg": 4.0, "cond.drop_each": ("t5:0.1",)},
        {"objective.gamma": 0.0, "objective.rollout_steps": 10},
    ):
        validate(tiny(HERE, HERE, **changes))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"folder": None}, "needs model.folder=FOLDER"),
        ({"mode": "fused"}, "fused blocks and recorded passes do not apply to MMDiT; set it to ea"),
        ({"mode": "graph"}, "model.mode=graph is not for text-to-image networks"),
        ({"checkpointing": "selective"}, "its own library recomputes whole blocks"),
        ({"attention": "flash"}, "its own library chooses"),
        ({"depth": 3}, "model.depth has no meaning for TextToImage, .* with model.depth=null"),
        ({"input_size": 64}, "take back what a recipe sets with model.input_size=32"),
        ({"z_dims": (768,)}, "model.z_dims has no meaning"),
        ({"dropout": 0.1}, "model.dropout has no meaning"),
    ],
)
def test_fields_of_other_networks(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**{"name": "TextToImage", "folder": "model"} | fields)


def test_its_own_fields_mean_nothing_elsewhere() -> None:
    with pytest.raises(ValueError, match="model.folder has no meaning for SiT-XL/2"):
        ModelConfig(folder="model")
    with pytest.raises(ValueError, match="cond.drop has no meaning for SiT-S/4"):
        validate(load_config("photos", ["cond.drop=0.2"]))
    with pytest.raises(ValueError, match="which SiT-S/4 is not told"):
        validate(load_config("photos", ["data.kind=captioned", "data.path=cache"]))
