"""Power-function EMAs of a run: snapshots, and averages that are made of them afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow_fast.checkpoints import run_folder
from mixflow_fast.checkpoints.ema_snapshots import extract, reconstruct, snapshots
from mixflow_fast.checkpoints.run_folder import RunState
from mixflow_fast.cli.main import main
from mixflow_fast.models import load_model, load_weights
from mixflow_fast.training.ema_writer import describe_averages
from mixflow_fast.training.trainer import train
from tests.support.runs import tiny

STEPS = 24
OPTIONS = (
    *(f"train.images={8 * STEPS}", "train.save_every=12", "optim.lr=3e-3"),
    *("optim.snapshot_every=3", "optim.ema_decays=[0.995,0.5,0.9]"),
)


def difference(a: dict[str, Tensor], b: dict[str, Tensor], names: list[str]) -> float:
    """RMS over all parameters."""
    square = sum((a[n].double() - b[n].double()).square().sum().item() for n in names)
    return (square / sum(a[n].numel() for n in names)) ** 0.5


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(tiny(out, *OPTIONS, "optim.ema_sigma_rel=[0.1,0.2]"), quiet=True)
    return out


def test_snapshots_have_what_was_tracked(run: Path) -> None:
    found = snapshots(run)
    assert [snapshot.step for snapshot in found] == list(range(3, STEPS + 1, 3))
    assert all(snapshot.sigma_rel == (0.1, 0.2) for snapshot in found)
    names = set(load_weights(run / "weights.pt", "model"))
    kept = {key.partition("/")[2] for key in load_file(found[0].path)}
    assert kept == names


def test_a_width_that_was_not_tracked(run: Path, tmp_path: Path) -> None:
    """Against a run that did track it; the training is the same to the bit."""
    truth = tmp_path / "truth"
    train(tiny(truth, *OPTIONS, "optim.ema_sigma_rel=[0.15]"), quiet=True)
    live = load_weights(run / "weights.pt", "model")
    trained = [key.removeprefix("0/") for key in load_file(snapshots(truth)[0].path) if "0/" in key]
    wanted = {k[2:]: v for k, v in load_file(snapshots(truth)[-1].path).items() if k[:2] == "0/"}
    assert all(
        torch.equal(v, load_weights(truth / "weights.pt", "model")[k]) for k, v in live.items()
    )
    made = reconstruct(run, 0.15, tmp_path / "made.pt")
    found = load_weights(tmp_path / "made.pt", "ema")
    scale = difference(live, wanted, trained)
    assert made.step == STEPS and made.error < 0.02
    assert difference(found, wanted, trained) < 0.02 * scale
    # The tracked ones alone are not it.
    last = load_file(snapshots(run)[-1].path)
    for number in "01":
        tracked = {k[2:]: v for k, v in last.items() if k.startswith(f"{number}/")}
        assert difference(tracked, wanted, trained) > 0.1 * scale
    # A tracked width comes back as it was, at an earlier step too; the file is a network's.
    middle = snapshots(run)[3]
    assert reconstruct(run, 0.2, tmp_path / "middle.pt", middle.step).error < 1e-6
    again, tensors = load_weights(tmp_path / "middle.pt", "ema"), load_file(middle.path)
    assert (
        difference(again, {k[2:]: v for k, v in tensors.items() if k[:2] == "1/"}, trained) < 1e-7
    )
    assert set(again) == set(live)
    load_model(tmp_path / "middle.pt", "ema")


def test_an_interrupted_run_has_the_same_snapshots(run: Path, tmp_path: Path) -> None:
    options = [option for option in OPTIONS if not option.startswith("train.images")]
    options += ["optim.ema_sigma_rel=[0.1,0.2]", "train.zero_stage=1"]
    train(tiny(tmp_path, *options, f"train.images={8 * STEPS // 2}"), quiet=True)
    shutil.rmtree(tmp_path / "ema")
    train(tiny(tmp_path, *options, f"train.images={8 * STEPS}"), quiet=True)
    ours, whole = snapshots(tmp_path), snapshots(run)
    assert [s.step for s in ours] == [s.step for s in whole if s.step > STEPS // 2]
    a, b = load_file(ours[-1].path), load_file(whole[-1].path)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def ema(*arguments: object) -> tuple[int, str, str]:
        code = main(["ema", *map(str, arguments)])
        return code, *capsys.readouterr()

    out = tmp_path / "made.pt"
    code, text, _ = ema(run)
    assert code == 0 and "24            0.1, 0.2" in text
    code, text, _ = ema(run, "--sigma-rel", 0.15, "--out", out)
    assert code == 0 and "relative width 0.15 after step 24" in text and "warning" not in text
    code, text, _ = ema(run, "--sigma-rel", 0.02, "--out", tmp_path / "narrow.pt")
    assert code == 0 and "warning: more snapshots" in text
    for arguments, message in (
        (["--sigma-rel", 0.15, "--out", out], "exists: choose another --out"),
        (["--sigma-rel", 0.15], "--out must be given"),
        (["--sigma-rel", 0.5, "--out", tmp_path / "x.pt"], "sigma_rel must be in"),
        (["--sigma-rel", 0.1, "--step", 4, "--out", tmp_path / "x.pt"], "one of the snapshots'"),
        (["--decay", 0.7, "--out", tmp_path / "x.pt"], "one of the run's ([0.995, 0.5, 0.9])"),
    ):
        code, _, error = ema(run, *arguments)
        assert code == 2 and message in error, error
        assert not (tmp_path / "x.pt").exists()
    code, _, error = ema(tmp_path, "--sigma-rel", 0.1, "--out", tmp_path / "x.pt")
    assert code == 2 and "optim.ema_sigma_rel=[0.05,0.1]" in error


def test_further_fixed_decays(run: Path, tmp_path: Path) -> None:
    live = load_weights(run / "weights.pt", "model")
    trained = [k[2:] for k in load_file(snapshots(run)[0].path) if k.startswith("0/")]
    away = []
    for decay in (0.5, 0.9, 0.995):
        out = tmp_path / f"{decay}.pt"
        assert main(["ema", str(run), "--decay", str(decay), "--out", str(out)]) == 0
        away.append(difference(live, load_weights(out, "ema"), trained))
        assert all(torch.equal(v, live[k]) for k, v in load_weights(out, "model").items())
    assert 0 < away[0] < away[1] < away[2]
    ema = load_weights(run / "weights.pt", "ema")
    assert all(torch.equal(v, ema[k]) for k, v in load_weights(out, "ema").items())


def test_checkpoints_that_hold_the_former_names_of_the_decays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_state = run_folder.read_state

    def former(folder: Path) -> RunState:
        state = read_state(folder)
        config = json.loads(state.metadata["config"])
        first, *more = config["optim"].pop("ema_decays")
        config["optim"] |= {"ema_decay": first, "ema_more_decays": more}
        return replace(state, metadata={**state.metadata, "config": json.dumps(config)})

    extract(run, 0.9, tmp_path / "now.pt")
    monkeypatch.setattr(run_folder, "read_state", former)
    extract(run, 0.9, tmp_path / "former.pt")
    now = load_weights(tmp_path / "now.pt", "ema")
    for name, weight in load_weights(tmp_path / "former.pt", "ema").items():
        assert torch.equal(weight, now[name])


def test_damaged_checkpoint(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").glob("step_*"))
    shard = next(newest.glob("*model_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 64
    shard.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged .*another checksum"):
        extract(tmp_path / "run", 0.5, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_damaged_snapshot(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "ema", tmp_path / "ema")
    path = snapshots(tmp_path)[0].path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read .*: move it away"):
        snapshots(tmp_path)


def test_a_snapshot_that_is_not_finite(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "ema", tmp_path / "ema")
    path = snapshots(tmp_path)[1].path
    with safe_open(path, "pt") as file:
        header = file.metadata()
    state = load_file(path)
    state["0/x_embedder.proj.bias"][2] = torch.inf
    save_file(state, path, header)
    words = f"{path.name}: x_embedder.proj.bias has 1 value that is not finite: move this snapshot"
    with pytest.raises(ValueError, match=words):
        reconstruct(tmp_path, 0.15, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_windows_in_words(tmp_path: Path) -> None:
    config = tiny(tmp_path, *OPTIONS, "optim.ema_sigma_rel=[0.1]")
    words = describe_averages(config.optim, config.steps)
    assert "decay 0.995 (window 200 steps), longer than the run's 24" in words
    assert "decay 0.5 (window 2 steps); decay 0.9 (window 10 steps)" in words
    assert "power functions of width 0.1" in words


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.ema_sigma_rel=[0.4]", "optim.ema_sigma_rel must be in"),
        ("optim.snapshot_every=5", "no meaning without optim.ema_sigma_rel"),
        ("optim.ema_decays=[0.9,1.0]", r"optim.ema_decays must be in \[0, 1\)"),
        ("optim.impl=fast", "optim.impl"),
    ],
)
def test_impossible(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(tmp_path, override), quiet=True)
