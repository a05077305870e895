"""From pictures with captions to a trained network: every family, cached and online prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mixflow_fast.cli import main
from mixflow_fast.models import load_model
from mixflow_fast.training.trainer import Trainer
from tests.support.captioned import tiny
from tests.support.text_to_image import write_pipeline

CAPTIONS = ["a fox", "a red fox\nfox in the snow", "two hares", "a fox", "snow", "nothing"]
# Encoded in one batch of seven, embedded online in batches of four: sums in another order, bf16.
# A rounding of bfloat16, and what it does to a loss.
ROUNDING, TOLERANCE = 2**-8, 1e-4


def pictures(folder: Path) -> Path:
    folder.mkdir()
    for number, text in enumerate(CAPTIONS):
        width, height = ((64, 64), (96, 64))[number % 2]
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(text)
    return folder


def encode(root: Path, *more: str) -> None:
    """Into root/cache."""
    paths = ["--model", root / "model", "--data", root / "pictures", "--out", root / "cache"]
    options = ["--buckets", "64x64,96x64", "--t5-length", "16", "--device", "cpu", *more]
    assert main([str(argument) for argument in ("encode", *paths, *options)]) == 0


@pytest.mark.filterwarnings("ignore:.*seems to be distilled")
@pytest.mark.parametrize("family", ["sd3", "flux", "z_image"])
def test_online_prompts_train_as_cached_ones(family: str, tmp_path: Path) -> None:
    losses, told = {}, {}
    drops = {"cond.drop": 0.3, "cond.drop_each": () if family == "z_image" else ("t5:0.3",)}
    for text in ("cached", "online"):
        root = tmp_path / text
        root.mkdir()
        write_pipeline(root / "model", family)
        pictures(root / "pictures")
        encode(root, "--text", text)
        trainer = Trainer(tiny(root, root / "run", **drops), quiet=True)
        assert (trainer.conditions.encoder is None) == (text == "cached")
        losses[text], told[text] = [], []

        def note(step: int, made: list, means: Tensor, text: str = text) -> None:
            losses[text].append(means[0].clone())
            told[text].append(made[0].cond)

        trainer.on_step = note
        assert trainer.run().finished
        assert load_model(root / "run").config["class"] == type(trainer.model.transformer).__name__
    for cached, online in zip(told["cached"], told["online"], strict=True):
        assert cached.keys() == online.keys()
        for name, value in cached.items():
            close = {"rtol": 2 * ROUNDING, "atol": 2 * ROUNDING}
            torch.testing.assert_close(online[name].float(), value.float(), **close)
    torch.testing.assert_close(
        torch.stack(losses["online"]), torch.stack(losses["cached"]), rtol=TOLERANCE, atol=0
    )
