"""Previews of a text-to-image run: the latents of the official pipeline with the run's weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.models import load_model
from mixflow_fast.reports.images import grid_png_bytes
from mixflow_fast.reports.run_report import write_run_report
from mixflow_fast.sampling.text_to_image import noise_of_ids
from mixflow_fast.training import build
from mixflow_fast.training.trainer import Trainer, train
from tests.support.captioned import StandIn, StandInPrompts, model_folder, prompt_parts, tiny
from tests.support.text_to_image import sd3_pipeline

PREVIEWS = {
    "train.preview_every": 3,
    "train.preview_steps": 3,
    "train.preview_cfg": 4.0,
    "train.previews": 4,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = StandIn()
    (tmp_path / "prompts").mkdir()
    data.prompts = StandInPrompts(tmp_path / "prompts")
    monkeypatch.setattr(build, "build_data", lambda *_, **__: data)
    made = model_folder(tmp_path / "model")
    # Three channels of latents are shown where there is no autoencoder to be read.
    (made / "vae" / "config.json").rename(made / "config_of_vae.json")
    return made


def test_previews_are_the_pipeline_s(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(folder, out, **PREVIEWS), quiet=True)
    pictures = sorted((out / "previews").glob("*.png"))
    assert [p.name for p in pictures] == ["step_00000000.png", "step_00000003.png"]
    net = load_model(out)
    parts = {name: value.float() for name, value in prompt_parts([0, 1, 2, 3]).items()}
    cond = build.layout_for(net.config["class"], net.config["transformer"]).assemble(parts)
    theirs = sd3_pipeline(net.transformer)(
        **{name: value[1:] for name, value in cond.items()},
        **{f"negative_{n}": v[:1].expand(3, *v.shape[1:]) for n, v in cond.items()},
        latents=noise_of_ids(0, torch.arange(3), (16, 8, 8)),
        **{"guidance_scale": 4.0, "num_inference_steps": 3, "height": 16, "width": 16},
        output_type="latent",
    ).images
    expected = grid_png_bytes(theirs[:, :3] / 3, columns=2, scale=8)
    assert pictures[1].read_bytes() == expected
    assert not np.array_equal(*(np.asarray(Image.open(path)) for path in pictures))
    settings = json.loads((out / "previews" / "settings.json").read_text())
    assert settings["prompts"] == ["a fox", "a heron", "two cups on a table"]
    assert (settings["grid"], settings["shift"], settings["cfg_scale"]) == ("diffusers", 3.0, 4.0)
    page = write_run_report(out, tmp_path / "page.html").read_text()
    assert "3 Euler steps on the diffusers grid of shift 3, guidance 4" in page
    assert "a heron" in page


def test_prompts_are_chosen_from_the_cache(folder: Path, tmp_path: Path) -> None:
    chosen = {"train.preview_prompts": ["two cups on a table", "a fox"]}
    trainer = Trainer(tiny(folder, tmp_path / "run", **PREVIEWS | chosen), quiet=True)
    assert trainer._preview_rows == {1: "a fox", 3: "two cups on a table"}
    trainer.close()
    with pytest.raises(ValueError, match="holds 'a bear', which is none of the cache's prompts"):
        absent = {"train.preview_prompts": ["a bear"]}
        Trainer(tiny(folder, tmp_path / "other", **PREVIEWS | absent), quiet=True)


def test_what_is_of_text_to_image_alone(folder: Path, tmp_path: Path) -> None:
    validate(tiny(folder, tmp_path, **{"train.preview_grid": "linear"}))
    for name, value in (("preview_grid", "linear"), ("preview_prompts", ["a fox"])):
        with pytest.raises(ValueError, match=f"train.{name} has no meaning for SiT"):
            validate(load_config("photos").replace(**{f"train.{name}": value}))
