"""Small trained networks with and without mixed sources, whose outputs are not trivial."""

from __future__ import annotations

import io
from pathlib import Path

import torch

from mixflow_fast.files import write_bytes
from mixflow_fast.training.trainer import train
from tests.support.runs import tiny, tiny_mixed

# What the table of classes needs in place of the small U-Net of `tiny_mixed`.
TABLE = ["source.kappa=class", "source.predictor=table", "source.widths=null"]
TABLE += ["source.groups=null", "source.layers=null", "source.sample_w=0.5"]


def train_kinds(root: Path) -> dict[str, Path]:
    """Runs by the kind of their source: standard, data, class (sample_w = 0.5), noise."""
    own = {
        "standard": tiny(root / "standard"),
        "data": tiny_mixed(root / "data"),
        "class": tiny_mixed(root / "class", *TABLE),
        "noise": tiny_mixed(root / "noise", "source.kappa=noise"),
    }
    for name, config in own.items():
        train(config, quiet=True)
        _enliven(root / name / "weights.pt")
    return {name: root / name for name in own}


def _enliven(path: Path) -> None:
    """Random layers where a few steps leave almost nothing of zeros."""
    content = torch.load(path, weights_only=True)
    for name, value in content["ema"].items():
        own = torch.Generator().manual_seed(len(name))
        if name.startswith("final_layer.linear") or "adaLN" in name:
            value.copy_(0.2 * torch.randn(value.shape, generator=own))
    for name, value in content.get("source_ema", {}).items():
        if value.dim() > 1:
            own = torch.Generator().manual_seed(len(name))
            value.copy_(value + 0.2 * torch.randn(value.shape, generator=own))
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())
