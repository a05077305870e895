"""`mixflow-fast slowflow` on a small run, with a pilot, and on wrong input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.models import build, load_model, save_weights
from mixflow_fast.models.weights.digest import weights_sha256
from mixflow_fast.training.trainer import train
from tests.support.command_line import run
from tests.support.pages import assert_loads_nothing

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
SMALL = ["--steps", "2,4", "--states", "100", "--fine", "8", "--batch-size", "50", "--grid", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("slow") / "base"
    settings = ["model.depth=1", "model.hidden_size=32", "train.images=32", "data.size=8",
                "train.global_batch_size=16", "train.microbatch_size=16", "model.input_size=8",
                "train.validate_examples=8", f"out={out}"]  # fmt: skip
    train(load_config("photos", settings), quiet=True)
    return out


def test_before_after_and_pilot(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run folder and the weights file alone name the same data; arms are kept."""
    out = tmp_path / "slow.html"
    pilot = ["--pilot", "--pilot-images", "16", "--pilot-steps", "4"]
    arguments = ["slowflow", base, "--after", base / "weights.pt", *SMALL, *pilot, "--out", out]
    code, said, err = run(*arguments, capsys=capsys)
    assert code == 0, err
    assert "before, 2 steps: gamma by the rule" in said and "pilot at 4 steps: gamma" in said
    assert "It is a lead, not a law" in said and "pilot, arm 1" in err
    # One optimizer step tells nothing.
    assert "pilot at 4 steps: gamma cannot be told: each arm took 1 optimizer steps" in said
    page = assert_loads_nothing(out.read_text())
    assert "Pilot: gamma cannot be told" in page.words
    found = json.loads(out.with_suffix(".json").read_text())
    before, after = found["networks"]
    # The same weights by another path, so the same numbers to rounding.
    assert before["slow_flow"]["settings"] == after["slow_flow"]["settings"]
    for one, two in zip(before["slow_flow"]["steps"], after["slow_flow"]["steps"], strict=True):
        assert one["deficit"] == pytest.approx(two["deficit"], abs=1e-4)
    assert before["losses"]["cuts"]["1"] == pytest.approx(after["losses"]["cuts"]["1"])
    arms = [arm["gamma"] for arm in found["pilot"]["choice"]["arms"]]
    assert arms[0] == 0.0 and 0.8 in arms
    trained = {path.name for path in (tmp_path / "slow_pilot").glob("gamma_*")}
    assert trained == {f"gamma_{gamma:g}" for gamma in arms}
    assert (tmp_path / "slow_pilot" / "gamma_0.8" / "features.npy").exists()
    # Again: nothing is trained, the numbers are the same.
    code, _, err = run(*arguments, "--force", capsys=capsys)
    assert code == 0 and "images/s" not in err
    assert json.loads(out.with_suffix(".json").read_text())["pilot"] == found["pilot"]
    code, _, err = run(*arguments[:-2], "--states", "101", "--out", out, "--force", capsys=capsys)
    assert code == 2 and "holds a pilot of" in err
    # The arms know the weights, not where they lie.
    moved = tmp_path / "elsewhere.pt"
    shutil.copy(base / "weights.pt", moved)
    code, _, err = run("slowflow", moved, *arguments[2:], "--force", capsys=capsys)
    assert code == 0 and "images/s" not in err, err
    assert json.loads(out.with_suffix(".json").read_text())["pilot"] == found["pilot"]
    mark = json.loads((tmp_path / "slow_pilot" / "pilot.json").read_text())
    network = load_model(moved, "ema")
    assert mark["weights_sha256"] == weights_sha256(network) and "checkpoint" not in mark


def test_wrong_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=8, in_channels=3, depth=1, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    state = build("SiT-S/2", input_size=16, in_channels=3, depth=1, num_classes=2).state_dict()
    save_weights(tmp_path / "other.pt", state, state, {})
    config = load_config(str(base / "config.yaml"))
    for name, change in (("deeper", {"depth": 2}), ("more", {"num_classes": 5})):
        kwargs = {"input_size": 8, "in_channels": 3, "depth": 1, "num_classes": 2, **change}
        kwargs |= {"hidden_size": config.model.hidden_size, "num_heads": 1}
        other = build("SiT-S/2", **kwargs)
        args = {"clock": "data_at_1", "model": json.dumps(other.config)}
        save_weights(tmp_path / f"{name}.pt", other.state_dict(), other.state_dict(), args)
    out = tmp_path / "slow.html"
    taken = tmp_path / "taken.html"
    taken.write_text("mine")
    for arguments, text in (
        ([base, "--out", tmp_path / "slow.json"], "--out must end in .html"),
        ([base, "--out", taken], "taken.html exists: choose another --out"),
        ([base, "--steps", "5,0"], "steps must be different integers >= 1, got [5, 0]"),
        ([base, "--steps", "5", "--fine", "4"], "fine must be at least the most steps, 5"),
        ([base, "--states", "10"], "states must be >= 100"),
        ([base, "--grid", "1"], "--grid must be 0 or >= 2, got 1"),
        ([base, "--pilot-images", "5"], "--pilot-images has no meaning without --pilot"),
        ([base, "--pilot", "--weights", "model"], "--pilot starts its arms from the EMA weights"),
        ([base, "--pilot", "--pilot-steps", "7"], "--pilot-steps must be one of --steps 5,10"),
        ([tmp_path / "nothing"], "does not exist"),
        ([tmp_path / "official.pt"], "does not say which data it was trained on: name a recipe"),
        ([base, "data.sise=8"], "data.sise"),
        ([base, "--after", tmp_path / "other.pt"], "takes (3, 16, 16), the data give (3, 8, 8)"),
        ([base, "--after", tmp_path / "deeper.pt"], "deeper.pt is another network than"),
        ([base, "--after", tmp_path / "more.pt"], "classes against 5), and not the same one"),
    ):
        options = [] if "--out" in arguments else ["--out", out]
        code, _, err = run("slowflow", *arguments, *options, capsys=capsys)
        assert code == 2 and text in err, (arguments, err)
    assert not out.exists() and taken.read_text() == "mine"
    with pytest.raises(SystemExit):
        run("slowflow", base, "--steps", "5;10", capsys=capsys)
    assert "is not a list of whole numbers such as 5,10,20,50" in capsys.readouterr().err


def test_a_recipe_names_the_data_of_foreign_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = build("SiT-S/4", input_size=8, in_channels=3, depth=1, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "official.pt")
    out = tmp_path / "slow.html"
    data = ["--recipe", "photos", "data.size=8", "model.input_size=8"]
    code, said, err = run(
        "slowflow", tmp_path / "official.pt", *data, *SMALL, "--grid", "0", "--out", out,
        capsys=capsys,
    )  # fmt: skip
    assert code == 0, err
    assert "Loss of slowed inputs" not in out.read_text()
