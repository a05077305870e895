"""Checkpoints are written while training goes on."""

import threading
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.run_folder import RunState, checkpoint_folders
from mixflow_fast.checkpoints.writing import CheckpointWriter, SaveError, SaveInProgress
from mixflow_fast.config.schema import TrainConfig
from mixflow_fast.distributed.host_group import HostGroup
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training import saving
from mixflow_fast.training.duty import RunContext, Timetable
from mixflow_fast.training.run_log import RunLog
from mixflow_fast.training.trainer import Trainer, train
from tests.support.runs import assert_same_bits, tiny


def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The first checkpoint is not written before this event."""
    event, plain, first = threading.Event(), CheckpointWriter.commit, []

    def commit(self: CheckpointWriter, *args: object, **kwargs: object) -> Path:
        first.append(self.step)
        if self.step == first[0]:
            assert event.wait(60)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(CheckpointWriter, "commit", commit)
    return event


def test_training_goes_on_and_the_checkpoint_holds_its_own_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["train.save_every=2", "train.keep_last=9"]
    event = held(monkeypatch)
    trainer = Trainer(tiny(tmp_path / "held", "train.images=24", *options), quiet=True)
    seen: list[list[Path]] = []

    def look(step: int, *_: object) -> None:
        seen.append(checkpoint_folders(trainer.out))
        if step == 3:
            event.set()

    trainer.on_step = look
    trainer.run()
    assert seen[2] == [], "step 3 was made before the checkpoint of step 2 was there"
    names = [folder.name for folder in checkpoint_folders(trainer.out)]
    assert names == ["step_00000002", "step_00000003"]
    monkeypatch.undo()
    # The state of step 2 went into it, though step 3 was made before it was written.
    train(tiny(tmp_path / "plain", "train.images=16", *options), quiet=True)
    (last,) = (f for f in checkpoint_folders(trainer.out) if f.name == "step_00000003")
    last.rename(tmp_path / "aside")
    assert_same_bits(trainer.out, tmp_path / "plain", but=("weights.pt",))


def test_a_row_says_what_a_checkpoint_took(tmp_path: Path) -> None:
    train(tiny(tmp_path, "train.images=16", "train.save_every=1"), quiet=True)
    first, last = read_metrics(tmp_path / "metrics.jsonl", kind="checkpoint")
    assert (first["step"], last["step"]) == (1, 2)
    (folder,) = (f for f in checkpoint_folders(tmp_path) if f.name == "step_00000002")
    assert last["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    assert last["written_s"] > 0 and last["stood_still_s"] > 0


def test_a_run_that_ends_with_an_error_keeps_what_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = held(monkeypatch)
    plain = saving.Checkpoints.finish

    def finish(self: saving.Checkpoints, limit_s: float | None = None) -> None:
        if limit_s == saving.RESCUE_S:
            event.set()
        plain(self, limit_s)

    monkeypatch.setattr(saving.Checkpoints, "finish", finish)
    trainer = Trainer(tiny(tmp_path, "train.save_every=1"), quiet=True)

    def fail(step: int, *_: object) -> None:
        if step == 2:
            assert checkpoint_folders(tmp_path) == []
            raise ValueError("bad data")

    trainer.on_step = fail
    with pytest.raises(ValueError, match="bad data"):
        trainer.run()
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["step_00000001"]


def test_only_the_last_checkpoint_must_succeed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveError, match="step 3 could not be written.*No space left"):
        train(tiny(tmp_path, "train.images=24", "train.save_every=1"))
    said = capsys.readouterr().err
    for step in (1, 2):
        assert f"warning: checkpoint of step {step} could not be written" in said
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_going_back_without_a_first_checkpoint_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SaveError, match="step 0 could not be written"):
        train(tiny(tmp_path, "train.on_nonfinite=rollback"), quiet=True)


def test_a_rank_that_does_not_write_weights_copies_none(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path), quiet=True)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    for kept in (True, False):
        for state in trainer.engine.full_states(stepped=False, keep=kept):
            assert {n for n in trained if state[n] is not None} == (trained if kept else set())
    trainer.close()


def test_a_rank_that_does_not_see_the_new_name_goes_on(tmp_path: Path) -> None:
    """As on a network file system, whose clients remember what was there: rank 0 alone looks."""
    group = HostGroup.alone()
    group.rank = 1
    log = RunLog(tmp_path, 0, 1, section=TrainConfig(), config={}, writes=False, quiet=True)
    context = RunContext(tmp_path, None, group, None, log)
    checkpoints = saving.Checkpoints(context, Timetable(1, 1, 0), lambda: None, lambda: None)
    checkpoints._saving = SaveInProgress(1, lambda: tmp_path / "not_seen")
    checkpoints.finish()


def test_a_rank_without_memory_is_heard_by_all(tmp_path: Path) -> None:
    """At the commit, where the others would wait for it."""

    def none_left() -> None:
        raise MemoryError

    writer = CheckpointWriter(tmp_path, 1, HostGroup.alone())
    writer.later(none_left)
    with pytest.raises(SaveError, match="step 1 could not be written.*MemoryError"):
        writer.commit(RunState({}, 1, 8, 1), keep_last=1)
