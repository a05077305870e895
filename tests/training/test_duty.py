"""When duties are due, and what a hook sees of a step."""

from pathlib import Path

import pytest
import torch

from mixflow_fast.training.duty import Timetable
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer
from tests.support.runs import tiny


@pytest.mark.parametrize(
    ("every", "last", "expected"),
    [
        (2, 0, [2, 4, 6, 7]),  # begun at step 0, which has nothing to tell yet
        (2, -1, [0, 2, 4, 6, 7]),  # a picture of the first weights too
        (2, 4, [6, 7]),  # resumed at a step where it was done before
        (0, 0, [7]),  # only at the end
        (0, 7, []),  # resumed at the end
        (7, 0, [7]),  # both reasons at one step are one
    ],
)
def test_a_timetable(every: int, last: int, expected: list[int]) -> None:
    timetable = Timetable(every, total=7, last=last)
    done = []
    for step in range(max(last, 0), 8):
        for _ in range(2):  # asked twice at a step, it is due once
            if timetable.due(step):
                timetable.done(step)
                done.append(step)
    assert done == expected


def test_the_hook_sees_every_step_and_changes_nothing(tmp_path: Path) -> None:
    common = ["train.images=24", "train.microbatch_size=4"]
    seen: list[tuple[int, list[int], float]] = []

    def note(step: int, outputs: list[StepOutput], means: torch.Tensor) -> None:
        ids = [position for made in outputs for position in made.it.ids.tolist()]
        assert len(outputs) == 2 and all(made.pred.shape == made.it.x.shape for made in outputs)
        losses = torch.stack([made.loss for made in outputs])
        assert torch.equal(losses.mean().detach(), means[0])
        seen.append((step, ids, float(means[0])))

    trainer = Trainer(tiny(tmp_path / "hooked", *common), quiet=True)
    trainer.on_step = note
    hooked = trainer.run()
    plain = Trainer(tiny(tmp_path / "plain", *common), quiet=True).run()
    assert [step for step, *_ in seen] == [1, 2, 3]
    assert [position for _, ids, _ in seen for position in ids] == list(range(24))
    a, b = (torch.load(run.weights, weights_only=True)["ema"] for run in (hooked, plain))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_step_can_be_made_by_hand(tmp_path: Path) -> None:
    """`train_step` alone is what `run` does between its duties."""
    whole = Trainer(tiny(tmp_path / "whole", "train.images=16"), quiet=True).run()
    trainer = Trainer(tiny(tmp_path / "steps", "train.images=16"), quiet=True)
    with trainer.loader() as loader:
        means = [trainer.train_step(loader) for _ in range(2)]
    assert trainer.step == 2 and all(m.shape == (2,) and m.isfinite().all() for m in means)
    folder = trainer.save()
    trainer.close()
    ema = torch.load(whole.weights, weights_only=True)["ema"]
    for name, value in torch.load(folder / "weights.pt", weights_only=True)["ema"].items():
        assert torch.equal(value, ema[name]), name
