"""A run of a tiny SD3 on a tiny cache of captioned images: what tests of such runs share."""

from __future__ import annotations

import json
from pathlib import Path

from mixflow_fast.config.loading import from_dict
from mixflow_fast.config.schema import Config
from tests.support.caches import write_cache
from tests.support.text_to_image import FAMILIES, sd3, vae

TINY = {
    "train.label_dropout": 0,
    "train.global_batch_size": 4,
    "train.microbatch_size": 4,
    "train.images": 12,
    "train.log_every": 1,
    "train.save_every": 0,
    "train.precision": "fp32",
    "optim.lr": 1e-3,
    "objective.shift": 3.0,
}
BUCKETS = {"64x64": range(9), "96x64": range(9, 16)}


def model_folder(folder: Path, large: bool = False) -> Path:
    """A pipeline's folder with transformer and autoencoder alone."""
    network = FAMILIES["sd3.5 large"].build() if large else sd3()
    network.save_pretrained(folder / "transformer")
    (folder / "vae").mkdir()
    config = json.dumps(dict(vae().config), default=str)
    (folder / "vae" / "config.json").write_text(config, encoding="utf-8")
    return folder


def model_and_cache(root: Path) -> Path:
    """A folder with model/, and cache/ of 16 images, 9 of 64 x 64 pixels and 7 of 96 x 64."""
    model_folder(root / "model")
    write_cache(root / "cache", (1, 2) * 8, BUCKETS)
    return root


def tiny(root: Path, out: Path, **overrides: object) -> Config:
    """A run of three steps of four examples; settings by their dotted names."""
    config = from_dict(
        {
            "model": {"name": "TextToImage", "folder": str(root / "model")},
            "data": {"kind": "captioned", "path": str(root / "cache"), "workers": 0},
            "train": {"label_dropout": 0},
            "out": str(out),
        }
    )
    return config.replace(**TINY | overrides)
