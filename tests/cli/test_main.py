"""The command line as a user meets it: exit codes, one clear line per error, files it leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.cli.main import main
from mixflow_fast.models import build, save_weights
from tests.support.train_ranks import TINY


def run(*argv: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_dry_run_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    code, out, _ = run("train", "photos", "optim.lr=3e-4", "--dry-run", capsys=capsys)
    assert code == 0 and yaml.safe_load(out)["optim"]["lr"] == 3e-4
    both_sides = "optim.lr=1e-4", "--dry-run", "optim.lr=3e-4", "optim.beta2=0.95"
    assert "beta2: 0.95" in run("train", "photos", *both_sides, capsys=capsys)[1]
    assert run("train", "photos", "--dry-run", "optim.lr=3e-4", capsys=capsys)[1] == out
    with pytest.raises(SystemExit, match="2"):
        run("train", "photos", "--dry-run", "optim.lr=3e-4", "--fast", capsys=capsys)
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
    code, _, err = run("train", "sit-xl2-256", "--dry-run", capsys=capsys)
    assert code == 2 and "must be given" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "photo"], "did you mean 'photos'"),
        (["train", "photos", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["train", "photos", "train.init=missing.pt", "out=OUT"], "missing.pt does not exist"),
        (["train", "photos", "train.microbatch_size=0"], "microbatch_size"),
        (["train", "photos", "out=FILE"], "FILE"),
        (["train", "photos", "objective.gamma=2", "--dry-run"], "gamma"),
        (["train", "photos", "model.name=SiT-M/9", "--dry-run"], "SiT-"),
        (["demo", "--gamma", "2", "--out", "OUT"], "gamma"),
        (["demo", "--samples", "1", "--out", "OUT"], "samples"),
        (["demo", "--size", "99", "--out", "OUT"], "size"),
        (["sample", "missing.pt"], "missing.pt does not exist"),
        (["sample", "x.pt", "--num", "0"], "--num"),
        (["sample", "x.pt", "--out", "x.jpg"], ".png"),
        (["demo", "--seeds", "0"], "--seeds"),
    ],
)
def test_refusals_exit_with_2_and_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("mine")
    argv = [a.replace("FILE", str(tmp_path / "FILE")) for a in argv]
    argv = [a.replace("OUT", str(tmp_path / "run")) for a in argv]
    code, out, err = run(*argv, capsys=capsys)
    assert code == 2 and out == ""
    assert message in err and err.startswith("mixflow-fast: error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_train_sample_and_post_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, post = tmp_path / "base", tmp_path / "post"
    code, out, err = run("train", "photos", *TINY, "train.images=32", f"out={base}", capsys=capsys)
    assert code == 0 and "32 images, step 4" in out and "base: step 4/4 loss" in err
    assert (base / "config.yaml").is_file() and (base / "metrics.jsonl").is_file()
    code, _, err = run("train", "photos", *TINY, "train.images=32", f"out={base}", capsys=capsys)
    assert code == 0  # finished: nothing to do, nothing lost
    overrides = [*TINY, "train.images=16", f"train.init={base}", f"out={post}"]
    assert run("train", "photos", *overrides, capsys=capsys)[0] == 0

    png, npz = tmp_path / "grid.png", tmp_path / "set.npz"
    arguments = ["--num", "10", "--steps", "3", "--batch-size", "10"]
    code, out, _ = run("sample", post, "--out", png, *arguments, capsys=capsys)
    assert code == 0 and "3 network evaluations" in out
    assert Image.open(png).size[0] > Image.open(png).size[1]
    heun = ["--method", "heun", "--cfg-scale", "1.5", "--label", "1", "0"]
    code, out, _ = run("sample", post, "--out", npz, *arguments, *heun, capsys=capsys)
    assert code == 0 and "6 network evaluations" in out
    arrays = np.load(npz)
    assert arrays["x"].shape == (10, 3, 16, 16) and arrays["y"].tolist() == [1, 0] * 5
    run("sample", post / "weights.pt", "--out", npz, *arguments, *heun, capsys=capsys)
    assert np.array_equal(np.load(npz)["x"], arrays["x"])


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
