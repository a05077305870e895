"""DeepSpeed around a network: what is read from a checkpoint, and how."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints import manifest
from mixflow_fast.checkpoints.run_folder import newest_checkpoint
from mixflow_fast.training.trainer import Trainer, train
from tests.support.runs import settings, tiny


class Harmful:
    """Runs code when an ordinary unpickler meets it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return (os.mkdir, (str(self.target),))


def plant(shard: Path, target: Path) -> None:
    """Put what runs code into a file of a checkpoint, and let the manifest agree."""
    content = torch.load(shard, weights_only=False)  # this run's own
    torch.save(content | {"extra": Harmful(target)}, shard)
    folder = shard.parent
    files = {p.name: manifest.entry(p) for p in folder.iterdir() if p.name != manifest.NAME}
    manifest.write(folder, files)


SHARDS = [("bf16", 2, "mp_rank_00_model_states.pt"), ("bf16", 2, "*_optim_states.pt")]
SHARDS += [("fp32", 0, "mp_rank_00_model_states.pt"), ("fp32", 3, "*_optim_states.pt")]


@pytest.mark.parametrize(("precision", "stage", "name"), SHARDS)
def test_resuming_executes_nothing_of_a_checkpoint(
    tmp_path: Path, precision: str, stage: int, name: str
) -> None:
    out, target = tmp_path / "run", tmp_path / "ran"
    train(tiny(out, *settings(precision, stage), "train.images=8"), quiet=True)
    (shard,) = newest_checkpoint(out).glob(name)
    plant(shard, target)
    with pytest.raises(ValueError, match=rf"{shard.name} cannot be read \(it holds .*mkdir"):
        train(tiny(out, *settings(precision, stage), "train.images=16"), quiet=True)
    assert not target.exists()
    torch.load(shard, weights_only=False)
    assert target.exists()  # it would have


def test_going_back_executes_nothing_of_a_checkpoint(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    trainer = Trainer(tiny(tmp_path / "run", *settings("bf16", 2), "train.images=8"), quiet=True)
    folder = trainer.run().out / "checkpoints" / "step_00000001"
    sound = shutil.copytree(folder, tmp_path / "step_00000001")
    (shard,) = folder.glob("*_optim_states.pt")
    plant(shard, target)
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read"):
        trainer.engine.load(folder)
    assert not target.exists()
    assert trainer.engine.load(sound)
