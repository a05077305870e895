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
from mixflow_fast.data.prompts_store import PartInfo
from mixflow_fast.models import load_model
from mixflow_fast.models.text_to_image.prompts import Part, prompt_encoder
from mixflow_fast.reports.images import grid_png_bytes
from mixflow_fast.reports.run_report import write_run_report
from mixflow_fast.sampling.text_to_image import noise_of_ids
from mixflow_fast.training import build
from mixflow_fast.training.trainer import Trainer, train
from tests.support.caches import SD3_PARTS, part_values, write_cache
from tests.support.captioned import model_folder, tiny
from tests.support.command_line import run
from tests.support.image_folders import smooth
from tests.support.text_to_image import sd3_pipeline, write_pipeline

PREVIEWS = {
    "train.preview_every": 3,
    "train.preview_steps": 3,
    "train.preview_cfg": 4.0,
    "train.previews": 4,
}


def parts_of(folder: Path) -> dict[str, Part]:
    return prompt_encoder(folder, 16).parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = model_folder(tmp_path / "model")
    # Three channels of latents are shown where there is no autoencoder to be read.
    (made / "vae" / "config.json").rename(made / "config_of_vae.json")
    write_cache(tmp_path / "cache", (1, 1, 1))
    return tmp_path


def test_previews_are_the_pipeline_s(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny(root, out, **PREVIEWS), quiet=True)
    pictures = sorted((out / "previews").glob("*.png"))
    assert [p.name for p in pictures] == ["step_00000000.png", "step_00000003.png"]
    net = load_model(out)
    parts = {name: part_values(name, part, 4).float() for name, part in SD3_PARTS.items()}
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
    assert settings["prompts"] == ["prompt 1", "prompt 2", "prompt 3"]
    assert (settings["grid"], settings["shift"], settings["cfg_scale"]) == ("diffusers", 3.0, 4.0)
    page = write_run_report(out, tmp_path / "page.html").read_text()
    assert "3 Euler steps on the diffusers grid of shift 3, guidance 4" in page
    assert "prompt 2" in page


def test_prompts_are_chosen_from_the_cache(root: Path, tmp_path: Path) -> None:
    chosen = {"train.preview_prompts": ["prompt 3", "prompt 1"]}
    trainer = Trainer(tiny(root, tmp_path / "run", **PREVIEWS | chosen), quiet=True)
    assert trainer._previews.prompts == ("prompt 1", "prompt 3")
    assert trainer._previews.rows == (1, 3)
    trainer.close()
    with pytest.raises(ValueError, match="holds 'a bear', which is none of the cache's prompts"):
        absent = {"train.preview_prompts": ["a bear"]}
        Trainer(tiny(root, tmp_path / "other", **PREVIEWS | absent), quiet=True)


def test_what_is_of_text_to_image_alone(root: Path, tmp_path: Path) -> None:
    validate(tiny(root, tmp_path, **{"train.preview_grid": "linear"}))
    for name, value in (("preview_grid", "linear"), ("preview_prompts", ["prompt 1"])):
        with pytest.raises(ValueError, match=f"train.{name} has no meaning for SiT"):
            validate(load_config("photos").replace(**{f"train.{name}": value}))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_on_a_cache_and_what_comes_after_it(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pictures decoded by the pipeline's autoencoder; the export samples what the run does.

    With all weights trained, and with adapters, which the export adds to the weights.
    """
    folder = write_pipeline(tmp_path / "model")
    write_cache(
        tmp_path / "cache",
        captions=(2,) * 12,
        buckets={"64x64": range(8), "96x64": range(8, 12)},
        parts={name: PartInfo(part.shape, "bfloat16") for name, part in parts_of(folder).items()},
        length=16,
    )
    out = tmp_path / "run"
    how = {"lora.rank": rank, "optim.lr": 0.1} if rank else {"optim.lr": 0.01}
    train(tiny(tmp_path, out, **PREVIEWS | how), quiet=True)
    shown = Image.open(out / "previews" / "step_00000003.png")
    assert shown.size == (2 * 96 + 2, 2 * 64 + 2)
    settings = json.loads((out / "previews" / "settings.json").read_text())
    assert settings["decoder"] == str(folder / "vae")
    assert settings["prompts"] == [f"prompt {row}" for row in (1, 2, 3, 4)]
    # Of three steps the EMA has hardly moved.
    online = ("--weights", "model")
    export = ("export", out, *online, "--to", "diffusers", "--out", tmp_path / "trained")
    assert run(*export, capsys=capsys)[0] == 0
    made = {}
    for name, checkpoint in (("run", out), ("export", tmp_path / "trained")):
        command = ("sample", checkpoint, "--out", tmp_path / f"of_{name}", "--prompts", "prompt 1")
        settings = online if name == "run" else ("--size", "96x64", "--t5-length", 16)
        code, said, err = run(*command, "--steps", 2, *settings, capsys=capsys)
        assert code == 0, err
        # The run's own size and length of prompts come from its cache.
        assert "96x64" in said and "text of 16 tokens" in said
        drawn = Image.open(tmp_path / f"of_{name}" / "00000.png")
        made[name] = np.asarray(drawn).astype(int)
    assert np.abs(made["run"] - made["export"]).max() <= (1 if rank else 0)
    command = ("sample", folder, "--out", tmp_path / "base", "--prompts", "prompt 1", "--steps", 2)
    assert run(*command, "--size", "96x64", "--t5-length", 16, capsys=capsys)[0] == 0
    base = np.asarray(Image.open(tmp_path / "base" / "00000.png")).astype(int)
    assert np.abs(made["run"] - base).max() > 5


def test_online_and_cached_text_draw_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same prompts, whether the cache holds embeddings or tokens that are embedded now."""
    folder, pictures = write_pipeline(tmp_path / "model"), tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        smooth(64, 64, number).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text(f"a picture of number {number}\n")
    shown = {}
    for text in ("cached", "online"):
        cache = tmp_path / text
        encode = ("encode", "--model", folder, "--data", pictures, "--out", cache)
        options = ("--buckets", "64x64", "--t5-length", 16, "--text", text)
        code, _, err = run(*encode, *options, capsys=capsys)
        assert code == 0, err
        config = tiny(tmp_path, tmp_path / f"run_{text}", **PREVIEWS | {"data.path": str(cache)})
        train(config, quiet=True)
        drawn = tmp_path / f"run_{text}" / "previews" / "step_00000000.png"
        shown[text] = np.asarray(Image.open(drawn)).astype(int)
    assert np.abs(shown["cached"] - shown["online"]).max() <= 1
