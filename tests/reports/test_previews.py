"""Labels and pixels of previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.validate import validate
from mixflow_fast.reports.previews import preview_labels, write_preview
from tests.support.autoencoder import small_autoencoder, write_autoencoder
from tests.support.configs import preview_options


def test_labels_of_previews_are_spread_over_the_classes() -> None:
    assert preview_labels(4, 1000).tolist() == [0, 250, 500, 750]
    assert preview_labels(6, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_latents_are_shown_as_three_channels_and_said_so(tmp_path: Path) -> None:
    config = load_config("sit-xl2-256", ["data.path=x", "train.init=null", "model.input_size=4",
                                         "train.previews=5", "train.preview_steps=1"])  # fmt: skip
    assert "latents, not pictures: the first 3 of 4 channels" in preview_options(config).caption()
    assert "latents" not in preview_options(load_config("photos")).caption()

    class Net:
        """Brings every channel to its own value in one step."""

        clock = "data_at_1"
        config = {"in_channels": 4, "input_size": 4, "num_classes": 1000}
        levels = torch.tensor([0.0, 3.0, -9.0, 1.0])[:, None, None]

        def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.levels - x

    write_preview(Net(), preview_options(config), tmp_path / "a" / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "a" / "x.png"))
    assert pixels[:64, :64].reshape(-1, 3).tolist() == [[128, 255, 0]] * 64**2
    assert pixels.shape == (2 * 66 - 2, 3 * 66 - 2, 3)


def test_with_a_decoder_latents_become_pictures(tmp_path: Path) -> None:
    """The pixels of the decoder itself, on a latent that the network is known to make."""
    write_autoencoder(tmp_path / "vae")
    config = load_config("sit-xl2-256", ["data.path=x", "train.init=null", "model.input_size=8",
                                         "train.previews=1", "train.preview_steps=1",
                                         f"train.preview_decoder={tmp_path / 'vae'}"])  # fmt: skip
    options = preview_options(config)
    assert options.caption().endswith("decoded by vae")

    class Net:
        clock = "data_at_1"
        config = {"in_channels": 4, "input_size": 8, "num_classes": 1000}
        latent = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))

        def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.latent - x

    write_preview(Net(), options, tmp_path / "x.png", options.load_decoder())
    pixels = np.asarray(Image.open(tmp_path / "x.png"))[::4, ::4]
    with torch.no_grad():
        truth = small_autoencoder().decode(Net.latent[None] / 0.18215).sample[0]
    truth = (127.5 * truth + 128).clamp(0, 255).floor().movedim(0, -1).numpy()
    assert pixels.shape == (16, 16, 3) and abs(pixels - truth).max() <= 1


def test_a_decoder_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="this run is one of pixels: leave it out"):
        validate(load_config("photos", ["train.preview_decoder=x"]))
    latents = ["data.path=x", "train.init=null", "train.preview_stats=x"]
    with pytest.raises(ValueError, match="preview_stats needs train.preview_decoder=FOLDER"):
        validate(load_config("sit-xl2-256", latents))
