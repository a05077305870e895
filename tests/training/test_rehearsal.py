"""`train --dry-run`: it finds what the run would find, fails as it would, and leaves no trace."""

import re
import shutil
from pathlib import Path

import pytest

from mixflow_fast.folder_lock import FolderLock
from mixflow_fast.training.build import build_model
from mixflow_fast.training.rehearsal import checkpoint_bytes, rehearse
from mixflow_fast.training.trainer import train
from tests.support.command_line import run
from tests.support.datasets import write_classes
from tests.support.runs import settings, tiny, tiny_mixed
from tests.support.train_ranks import TINY


def files(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


def test_a_rehearsal_says_what_it_found_and_leaves_no_trace(tmp_path: Path) -> None:
    text = "\n".join(rehearse(tiny(tmp_path / "run")))
    assert re.search(r"data: [\d,]+ images, 2 classes, 3 x 16 x 16 \(photos\)", text)
    assert "model: SiT-S/4, " in text and "parameters, 16 tokens of an input 3 x 16 x 16" in text
    assert "48 images, 6 steps of 8 (1 rank x " in text and "24 hours" not in text
    longer = "\n".join(rehearse(tiny(tmp_path / "run", "train.images=128_000_000")))
    assert "micro-batch); 1,481 images/s would end it in 24 hours" in longer
    assert "start: random weights" in text and " free at " in text and "memory per rank" in text
    text = "\n".join(rehearse(tiny(tmp_path / "run", "train.images=50")))
    assert "50 images (whole steps: 56), 7 steps of 8" in text
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_of_a_run_that_goes_on(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", "train.images=16"), quiet=True)
    unfinished = tmp_path / "run/checkpoints/.writing_step_00000003"
    unfinished.mkdir()
    before = files(tmp_path)
    text = "\n".join(rehearse(tiny(tmp_path / "run")))
    assert "resumed after step 2 of 6" in text and files(tmp_path) == before
    with FolderLock(tmp_path / "run"), pytest.raises(ValueError, match="is in use by another run"):
        rehearse(tiny(tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        rehearse(tiny(tmp_path / "run"), resume="never")


def test_a_rehearsal_looks_into_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train(tiny("~/run", "train.images=16"), quiet=True)
    assert "resumed after step 2 of 6" in "\n".join(rehearse(tiny("~/run")))


def test_a_rehearsal_sees_other_data(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "set", 16, cat=2)
    data = f"data={{kind: folder, path: {folder}, size: 16}}"
    train(tiny(tmp_path / "run", data, "train.images=16"), quiet=True)
    write_classes(folder, 16, dog=1)
    with pytest.raises(ValueError, match="holds a run on other data .* classes added: dog"):
        rehearse(tiny(tmp_path / "run", data))
    text = "\n".join(rehearse(tiny(tmp_path / "run", data), allow_data_change=True))
    assert "data: 3 images, 2 classes" in text and "goes on with other data" in text


def test_a_rehearsal_fails_as_the_run_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for setting, message in (
        (f"train.init={tmp_path}/no.pt", "no.pt does not exist"),
        (f"data={{kind: folder, path: {tmp_path}/no}}", "does not exist"),
        (f"out={tmp_path}/file", "file is not a folder: choose another out="),
        (f"out={tmp_path}/file/run", "run cannot be made, because "),
        (f"out={tmp_path}/run", ""),
    ):
        command = ("train", "photos", *TINY, "train.images=8", f"out={tmp_path}/run", setting)
        codes = [run(*command, *dry, capsys=capsys) for dry in (["--dry-run"], [])]
        assert {code for code, _, _ in codes} == {2 if message else 0}
        assert all(message in err for _, _, err in codes)
        assert not message or codes[0][2] == codes[1][2]  # the same line
        assert (tmp_path / "run").exists() == (not message)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("fp32", 2), ("bf16", 2)])
@pytest.mark.parametrize("weights", ["always", "end", "never"])
def test_the_size_of_a_checkpoint(tmp_path: Path, precision: str, stage: int, weights: str) -> None:
    config = tiny(
        tmp_path,
        *settings(precision, stage),
        *("model.hidden_size=192", "train.images=8", f"train.save_weights={weights}"),
        "optim.ema_decays=[0.9,0.99]",
    )
    train(config, quiet=True)
    found = sum(p.stat().st_size for p in (tmp_path / "checkpoints").rglob("*") if p.is_file())
    model = build_model(config.model, "meta")
    told = checkpoint_bytes(model, config.train, config.optim)
    assert told == pytest.approx(found, rel=0.02)
    before = checkpoint_bytes(model, config.train, config.optim, last=False)
    own = 8 * sum(p.numel() for p in model.parameters())
    assert told - before == (own if weights == "end" else 0)


def test_too_little_room_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = type("Usage", (), {"free": 20 << 20})
    monkeypatch.setattr("mixflow_fast.training.rehearsal.shutil.disk_usage", lambda path: few)
    text = "\n".join(rehearse(tiny(tmp_path / "run", "model.hidden_size=192")))
    assert f"warning: {tmp_path} has not enough room for the checkpoints" in text
    # Two checkpoints that are there already leave room for a third.
    train(tiny(tmp_path / "run", "model.hidden_size=192", "train.images=16"), quiet=True)
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000001")
    assert "warning" not in "\n".join(rehearse(tiny(tmp_path / "run", "model.hidden_size=192")))


def test_a_mixed_source_is_told_and_opened(tmp_path: Path) -> None:
    lines = rehearse(tiny_mixed(tmp_path / "new"))
    (said,) = (line for line in lines if line.startswith("source: "))
    assert "lambda 0.3 per dimension, beta 0.000390625 of the sum" in said and "(D = 768)" in said
    (model,) = (line for line in lines if line.startswith("model: "))
    (plain,) = (line for line in rehearse(tiny(tmp_path / "new")) if line.startswith("model: "))
    assert model == plain  # the network's own parameters
    assert not (tmp_path / "new").exists()
