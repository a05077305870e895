"""A file in the official layout and a run of our own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from mixflow_fast.models import save_weights
from mixflow_fast.models.weights.metadata import Metadata
from tests.support.weights import network


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A checkpoint as SiT's train.py writes it."""
    state = network().state_dict()
    args = argparse.Namespace(model="SiT-S/8", image_size=128, prediction="velocity", ckpt=None)
    torch.save(
        {"model": state, "ema": state, "opt": {"state": {0: {}}}, "args": args},
        tmp_path / "official.pt",
    )
    return tmp_path / "official.pt"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A run folder with what the trainer writes into weights.pt, of a SiT in REPA's clock."""
    model = network(learn_sigma=False, clock="noise_at_1")
    ema = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    ema["pos_embed"] = model.pos_embed.detach()
    run_config = json.dumps({"objective": {"prediction": "noise"}})
    metadata = Metadata(kwargs=model.config, clock="noise_at_1", steps=12, config=run_config)
    folder = tmp_path / "run"
    save_weights(folder / "weights.pt", model.state_dict(), ema, metadata.to_record())
    return folder
