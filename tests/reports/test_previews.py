"""Labels and pixels of previews."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.reports.previews import caption, preview_labels, write_preview
from tests.support.configs import preview_options


def test_labels_of_previews_are_spread_over_the_classes() -> None:
    assert preview_labels(4, 1000).tolist() == [0, 250, 500, 750]
    assert preview_labels(6, 2).tolist() == [0, 0, 0, 1, 1, 1]


def test_latents_are_shown_as_three_channels_and_said_so(tmp_path: Path) -> None:
    config = load_config("sit-xl2-256", ["data.path=x", "train.init=null", "model.input_size=4",
                                         "train.previews=5", "train.preview_steps=1"])  # fmt: skip
    assert "latents, not pictures: the first 3 of 4 channels" in caption(preview_options(config))
    assert "latents" not in caption(preview_options(load_config("photos")))

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
