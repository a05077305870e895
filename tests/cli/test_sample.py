"""`mixflow-fast sample` from official files and from our own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.cli.sample import save
from mixflow_fast.models import build, save_weights
from mixflow_fast.sampling.samples import SampleResult
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
    assert code == 2 and "latents" in err and "x / 0.18215" in err
    out = tmp_path / "x.npz"
    code, said, _ = run("sample", tmp_path / "official.pt", "--out", out, *arguments, capsys=capsys)
    assert code == 0 and "undo data.scale before the decoder" in said
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
    again = ["--num", "2", "--steps", "2", "--batch-size", "2", "--out", tmp_path / "again.npz"]
    path = tmp_path / "noise_at_1.pt"
    code, _, err = run("sample", path, *again, "--clock", "data_at_1", capsys=capsys)
    assert code == 2 and "records the clock noise_at_1, and --clock says data_at_1" in err
    code, _, _ = run("sample", path, *again, "--clock", "noise_at_1", capsys=capsys)
    assert code == 0 and np.array_equal(np.load(again[-1])["x"], arrays["noise_at_1"])
    # A file that does not say it takes the option's, and a guide that says it keeps its own.
    torch.save(model.state_dict(), tmp_path / "silent.pt")
    silent = [tmp_path / "silent.pt", "--clock", "noise_at_1"]
    guided = [*silent, "--guide", tmp_path / "data_at_1.pt", "--cfg-scale", "2"]
    found = []
    for line in ([tmp_path / "data_at_1.pt"], silent, guided):
        code, _, err = run("sample", *line, *again, "--steps", "1", "--force", capsys=capsys)
        assert code == 0, err
        found.append(np.load(again[-1])["x"])
    assert np.allclose(found[2], 2 * found[1] - found[0], atol=1e-4)


def test_samples_that_are_not_finite_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Finite weights that overflow for one class: every format is refused, the ids are named."""
    model = build("SiT-S/8", input_size=8, in_channels=3, depth=1, num_classes=3)
    state = model.state_dict()
    state["y_embedder.embedding_table.weight"][1] = 3e38
    for name in ("final_layer.adaLN_modulation.1.weight", "final_layer.linear.weight"):
        state[name].fill_(1.0)
    torch.save(state, tmp_path / "x.pt")
    arguments = ["--num", "5", "--steps", "1", "--out"]
    for name in ("x.png", "x.npz"):
        out = tmp_path / name
        code, _, err = run("sample", tmp_path / "x.pt", *arguments, out, capsys=capsys)
        assert code == 2 and not out.exists()
        assert "2 of 5 samples are not finite (the first has id 1), and nothing was written" in err


def test_a_network_without_classes_has_no_labels(tmp_path: Path) -> None:
    """No network of this engine is one, but what `sample` returns may have none."""
    save(tmp_path / "x.npz", SampleResult(x=torch.zeros(2, 4, 3, 3), labels=None, nfe=1))
    assert list(np.load(tmp_path / "x.npz")) == ["x"]


def test_a_home_folder_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--out=~/x` and `train.init=~/x` reach a program as they are: no shell expands them."""
    monkeypatch.setenv("HOME", str(tmp_path))
    state = build("SiT-S/8", input_size=8, depth=1, num_classes=3).state_dict()
    torch.save(state, tmp_path / "x.pt")
    arguments = ["--num", "1", "--steps", "1", "--out", "~/x.npz"]
    assert run("sample", "~/x.pt", *arguments, capsys=capsys)[0] == 0
    assert (tmp_path / "x.npz").is_file()
    for command in (
        ["sample", "~/y.pt"],
        ["inspect", "~/y.pt"],
        ["export", "~/y.pt", "--to", "ema", "--out", "~/y.safetensors"],
        ["consolidate", "~/y.pt", "--out", "~/z.pt"],
        ["ema", "~/y.pt"],
        ["report", "~/y.pt"],
    ):
        code, _, err = run(*command, capsys=capsys)
        assert code == 2 and f"{tmp_path / 'y.pt'} does not exist" in err, command


def test_latents_of_three_channels_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A VQ-f4 latent looks like a picture by its shape; the run's record says what it is."""
    model = build("SiT-S/8", input_size=8, in_channels=3, depth=1, num_classes=3)
    state = model.state_dict()
    for kind, said in (("latents", True), ("photos", False)):
        config = {"data": {"kind": kind}, "encoder": {"kind": "none"}}
        args = {"model": json.dumps(model.config), "config": json.dumps(config)}
        save_weights(tmp_path / "x.pt", state, state, {**args, "clock": "data_at_1"})
        for name in ("x.png", "x.npz"):
            line = ["--num", "1", "--steps", "1", "--out", tmp_path / name, "--force"]
            code, _, err = run("sample", tmp_path / "x.pt", *line, capsys=capsys)
            assert code == 0
            note = "was trained on latents of 3 channels, which are taken for pictures" in err
            assert note == (said and name == "x.png")


def test_precision_and_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 is told, changes the samples a little and the protocol; graphs need a GPU."""
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=8, in_channels=3, depth=1, num_classes=3)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    arguments = [tmp_path / "x.pt", "--num", "2", "--steps", "2", "--batch-size", "2", "--out"]
    found, recorded = {}, {}
    for precision, name in (("fp32", "float32"), ("bf16", "bfloat16")):
        out = tmp_path / f"{precision}.npz"
        command = ["sample", *arguments, out, "--precision", precision]
        code, said, _ = run(*command, capsys=capsys)
        assert code == 0 and f"network: {name}, eager; float32 state" in said
        found[precision] = np.load(out)["x"]
        command = ["sample", *arguments, tmp_path / f"set_{precision}", "--precision", precision]
        assert run(*command, capsys=capsys)[0] == 0
        recorded[precision] = json.loads((tmp_path / f"set_{precision}/set.json").read_text())
        assert recorded[precision]["protocol"]["precision"]["network"] == name
    difference = np.abs(found["bf16"] - found["fp32"]).max()
    assert 1e-6 < difference < 0.1
    origins = [record["origin"]["weights_sha256"] for record in recorded.values()]
    assert origins[0] == origins[1] and recorded["fp32"]["hash"] != recorded["bf16"]["hash"]
    command = ["sample", *arguments, tmp_path / "y.npz", "--mode", "graph"]
    code, _, err = run(*command, capsys=capsys)
    assert code == 2 and "CUDA graphs, and the device is cpu" in err
