"""Files of RAE's first stage as users have them, made of the tensors in tests/golden."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.golden import load


def save_encoder(folder: Path, golden: str) -> None:
    """config.json and model.safetensors of the encoder."""
    tensors, config = load(golden)
    (folder / "config.json").write_text(json.dumps(config["encoder_config_json"]))
    state = {
        key.removeprefix("state.encoder."): value
        for key, value in tensors.items()
        if key.startswith("state.encoder.")
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def save_statistics(folder: Path, golden: str) -> None:
    """stat.pt."""
    tensors, _ = load(golden)
    torch.save({name: tensors[f"stat.{name}"] for name in ("mean", "var")}, folder / "stat.pt")


def save_decoder(folder: Path, golden: str) -> None:
    """model.pt and decoder.json, the decoder's weights and its config.json."""
    tensors, config = load(golden)
    (folder / "decoder.json").write_text(json.dumps(config["decoder_config_json"]))
    state = {
        key.removeprefix("state.decoder."): value
        for key, value in tensors.items()
        if key.startswith("state.decoder.")
    }
    torch.save(state, folder / "model.pt")
