"""Continues runs on the ranks it is started on, and keeps what they were at the start.

torchrun ... -m tests.support.resume_ranks CONFIG.yaml ...

Per configuration: the run is taken up, saved at once (into OUT.taken_up, before any step), and run
to its end; what its steps saw goes to OUT.seen_RANK.
"""

import shutil
import sys

import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.distributed import process_group
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer


def recording(trainer: Trainer) -> dict[int, tuple[float, float, float]]:
    """Filled while the trainer runs: position -> (t, slowed t, sum of the network's input)."""
    seen: dict[int, tuple[float, float, float]] = {}

    def write_down(step: int, outputs: list[StepOutput], means: torch.Tensor) -> None:
        for it in (made.it for made in outputs):
            sums = it.x.double().flatten(1).sum(1)
            for position, *values in zip(
                it.ids.tolist(), it.t.tolist(), it.slowed_t.tolist(), sums.tolist(), strict=True
            ):
                assert position not in seen, "the same position twice"
                seen[position] = tuple(values)

    trainer.on_step = write_down
    return seen


def main() -> None:
    torch.set_num_threads(1)
    for recipe in sys.argv[1:]:
        trainer = Trainer(load_config(recipe), quiet=True)
        folder = trainer.save()
        if process_group.rank() == 0:
            shutil.copytree(folder, f"{trainer.out}.taken_up")
        torch.distributed.barrier()
        seen = recording(trainer)
        trainer.run()
        torch.save(seen, f"{trainer.out}.seen_{process_group.rank()}")


if __name__ == "__main__":
    main()
