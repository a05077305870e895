"""Previews of text-to-image runs: the official pipeline's latents, captions, the page's words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.flow.timesteps import resolution_shift
from mixflow_fast.models.text_to_image import SD3Adapter
from mixflow_fast.models.text_to_image.folder import (
    PipelineGrid,
    autoencoder_folder,
    pipeline_grid,
)
from mixflow_fast.reports.text_previews import (
    SEED,
    TextPreviewOptions,
    preview_latents,
    read_settings,
    write_settings,
    write_text_preview,
)
from mixflow_fast.sampling.text_to_image import noise_of_ids
from tests.support.text_to_image import sd3, sd3_pipeline, text, write_pipeline

OPTIONS = TextPreviewOptions(
    prompts=("a fox", "a heron", "two cups on a table, seen from above, in the light of a window"),
    rows=(1, 2, 3),
    steps=4,
    cfg_scale=4.0,
    shift=3.0,
    grid="diffusers",
    batch_size=3,
    latent=(16, 8, 6),
)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_are_the_pipeline_s(guidance: float) -> None:
    """The same noise, embeddings and steps in the official pipeline, bit for bit."""
    network, cond, nothing = sd3(), text(3), text(1, seed=50)
    ours = preview_latents(SD3Adapter(network), replace(OPTIONS, cfg_scale=guidance), cond, nothing)
    noise = noise_of_ids(SEED, torch.arange(3), OPTIONS.latent)
    theirs = sd3_pipeline(network)(
        **cond,
        **{f"negative_{k}": v.repeat(3, *[1] * (v.dim() - 1)) for k, v in nothing.items()},
        latents=noise,
        guidance_scale=guidance,
        num_inference_steps=4,
        height=16,
        width=12,
        output_type="latent",
    ).images
    assert torch.equal(ours, theirs) and not torch.equal(ours, noise)


def test_batches_do_not_change_the_noise() -> None:
    network, cond, nothing = sd3(), text(3), text(1, seed=50)
    whole = preview_latents(SD3Adapter(network), OPTIONS, cond, nothing)
    parts = preview_latents(SD3Adapter(network), replace(OPTIONS, batch_size=2), cond, nothing)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)


def test_a_picture_and_its_words(tmp_path: Path) -> None:
    cond, nothing = text(3), text(1, seed=50)
    path = tmp_path / "previews" / "step_00000001.png"
    write_text_preview(SD3Adapter(sd3()), OPTIONS, cond, nothing, path)
    shown = np.asarray(Image.open(path))
    # Three channels of 8 x 6 latents, enlarged ten times, two columns and two rows.
    assert shown.shape == (2 * 80 + 2, 2 * 60 + 2, 3)
    write_settings(OPTIONS, path.parent)
    assert read_settings(path.parent) == OPTIONS
    words = OPTIONS.caption()
    for part in ("4 Euler steps on the diffusers grid of shift 3, guidance 4", "'a fox'", "..."):
        assert part in words
    assert "not pictures" in words and "not pictures" not in replace(OPTIONS, decoder="v").caption()
    (path.parent / "settings.json").write_text(json.dumps({"prompts": 1}))
    assert read_settings(path.parent) is None and read_settings(tmp_path) is None


def test_what_stands_in_a_pipeline_s_folder(tmp_path: Path) -> None:
    sd3_folder = write_pipeline(tmp_path / "sd3")
    assert pipeline_grid(sd3_folder, 1024) == PipelineGrid("diffusers", 3.0)
    assert autoencoder_folder(sd3_folder) == sd3_folder / "vae"
    flux = write_pipeline(tmp_path / "flux", "flux")
    for tokens in (256, 4096):  # another one for each size
        assert pipeline_grid(flux, tokens) == PipelineGrid("linear", resolution_shift(tokens))
    assert pipeline_grid(write_pipeline(tmp_path / "z", "z_image"), 9).grid == "linear"
    alone = sd3_folder / "transformer"
    assert pipeline_grid(alone, 9) == PipelineGrid("diffusers", None)
    assert autoencoder_folder(alone) is None
