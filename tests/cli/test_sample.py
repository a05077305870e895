"""`mixflow-fast sample` from official files and from our own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.models import build, save_weights
from tests.support.command_line import run


def test_sample_from_an_official_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bare state dict: the network is read off its shapes; latents are no picture."""
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=16, depth=1, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    arguments = ["--num", "2", "--steps", "2", "--batch-size", "2"]
    code, _, err = run(
        "sample", tmp_path / "official.pt", "--out", tmp_path / "x.png", *arguments, capsys=capsys
    )
    assert code == 2 and "latents" in err
    out = tmp_path / "x.npz"
    assert run("sample", tmp_path / "official.pt", "--out", out, *arguments, capsys=capsys)[0] == 0
    assert np.load(out)["x"].shape == (2, 4, 16, 16)


def test_recorded_clock_is_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=8, depth=1, num_classes=3, learn_sigma=False)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    arrays = {}
    for clock in ("data_at_1", "noise_at_1"):
        state = model.state_dict()
        args = {"clock": clock, "model": json.dumps(model.config | {"clock": clock})}
        save_weights(tmp_path / f"{clock}.pt", state, state, args)
        out = tmp_path / f"{clock}.npz"
        arguments = ["--num", "2", "--steps", "2", "--batch-size", "2", "--out", out]
        assert run("sample", tmp_path / f"{clock}.pt", *arguments, capsys=capsys)[0] == 0
        arrays[clock] = np.load(out)["x"]
    assert not np.allclose(arrays["data_at_1"], arrays["noise_at_1"])
