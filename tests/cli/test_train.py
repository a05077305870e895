"""`mixflow-fast train`: the resolved configuration, a run, and a post-training from it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.command_line import run
from tests.support.train_ranks import TINY


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


def test_train_sample_and_post_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, post = tmp_path / "base", tmp_path / "post"
    code, out, err = run("train", "photos", *TINY, "train.images=32", f"out={base}", capsys=capsys)
    assert code == 0 and "32 images, step 4" in out and "base: 32 of 32 images  loss" in err
    assert "\nstart: random weights\n" in err
    assert (base / "config.yaml").is_file() and (base / "metrics.jsonl").is_file()
    code, _, err = run("train", "photos", *TINY, "train.images=32", f"out={base}", capsys=capsys)
    assert code == 0  # finished: nothing to do, nothing lost
    overrides = [*TINY, "train.images=16", f"train.init={base}", f"out={post}"]
    code, _, err = run("train", "photos", *overrides, capsys=capsys)
    assert code == 0 and f"\nstart: the EMA weights of {base}\n" in err

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
    again = ["--out", npz, "--force", *arguments, *heun]
    assert run("sample", post / "weights.pt", *again, capsys=capsys)[0] == 0
    assert np.array_equal(np.load(npz)["x"], arrays["x"])


def test_a_run_without_weights_says_how_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*TINY, "train.images=8", "out=here", "train.save_weights=never"]
    code, out, _ = run("train", "photos", *options, capsys=capsys)
    assert code == 0 and out.startswith("here: 8 images, step 1; weights: mixflow-fast ")
    command = out.strip().partition("mixflow-fast ")[2].split()
    assert run(*command, capsys=capsys)[0] == 0
    assert (tmp_path / "FILE.pt").is_file()
