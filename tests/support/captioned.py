"""A run of a tiny SD3 on a tiny captioned data set: what tests of such runs share."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from mixflow_fast.config.loading import from_dict
from mixflow_fast.config.schema import Config
from mixflow_fast.data import Batch
from mixflow_fast.data.summary import DataSummary
from mixflow_fast.kernels.interpolate import Moments
from tests.support.text_to_image import FAMILIES, numbers, sd3, vae

TINY = {
    "train.global_batch_size": 4,
    "train.microbatch_size": 4,
    "train.images": 12,
    "train.log_every": 1,
    "train.save_every": 0,
    "train.label_dropout": 0,
    "train.precision": "fp32",
    "optim.lr": 1e-3,
    "objective.shift": 3.0,
}


class StandInPrompts:
    """Prompts of the stand-in: "" and three more, in a folder as a cache's set has them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        texts = ["", "a fox", "a heron", "two cups on a table"]
        lines = [json.dumps({"row": row, "text": text}) for row, text in enumerate(texts)]
        (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")

    def take(self, rows: Tensor) -> dict[str, Tensor]:
        return prompt_parts(rows.tolist())


def prompt_parts(seeds: list[int]) -> dict[str, Tensor]:
    """Parts of prompts, numbers of their seeds."""
    parts = {"clip_l": (5, 8), "clip_g": (5, 12), "t5": (7, 32)}
    parts |= {"pooled_l": (24,), "pooled_g": (40,)}
    return {
        name: torch.stack([numbers(*shape, seed=100 + seed) for seed in seeds]).bfloat16()
        for name, shape in parts.items()
    }


class StandIn:
    num_classes = 1
    shape = (16, 8, 8)
    name = "captioned"
    info = SimpleNamespace(text="cached", length=4)

    def __len__(self) -> int:
        return 16

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        mean = torch.stack([numbers(16, 8, 8, seed=int(i)) for i in indices])
        std = torch.full_like(mean, 0.1)
        cond = prompt_parts(indices.tolist())
        y = torch.zeros(len(indices), dtype=torch.int64)
        return Batch(Moments(mean, std, 1.5), y, positions, cond=cond)

    def summary(self) -> DataSummary:
        return DataSummary(
            unit="latents", examples=16, classes=1, shape=self.shape, digest="0" * 16
        )


def model_folder(folder: Path, large: bool = False) -> Path:
    """A pipeline's folder with transformer and autoencoder alone."""
    network = FAMILIES["sd3.5 large"].build() if large else sd3()
    network.save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text(json.dumps(dict(vae().config), default=str))
    return folder


def tiny(folder: Path, out: Path, **overrides: object) -> Config:
    """A run of three steps of four examples; settings by their dotted names."""
    config = from_dict(
        {
            "model": {"name": "TextToImage", "folder": str(folder)},
            "data": {"kind": "captioned", "path": str(folder), "workers": 0},
            "train": {"label_dropout": 0},
            "out": str(out),
        }
    )
    return config.replace(**TINY | overrides)
