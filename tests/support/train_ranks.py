"""A training run that writes down every batch it prepares: started alone or under torchrun.

python -m tests.support.train_ranks DUMP_FOLDER section.field=value ...
"""

import sys
from pathlib import Path

import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.objective.mixflow import Interpolation
from mixflow_fast.training.trainer import Trainer

TINY = [
    "model.depth=1",
    "model.hidden_size=32",
    "model.num_heads=2",
    "train.global_batch_size=8",
    "train.microbatch_size=8",
    "train.log_every=1",
    "train.save_every=0",
    "objective.gamma=0.5",
    "objective.timesteps=beta21",
    "data.flip=true",
]


def main() -> None:
    dump = Path(sys.argv[1])
    torch.set_num_threads(1)
    trainer = Trainer(load_config("photos", [*TINY, *sys.argv[2:]]), quiet=True)
    rows: list[Interpolation] = []
    trainer.on_step = lambda step, outputs, means: rows.extend(made.it for made in outputs)
    trainer.run()
    stream = {
        "ids": torch.cat([row.ids for row in rows]),
        "t": torch.cat([row.t for row in rows]),
        "slowed_t": torch.cat([row.slowed_t for row in rows]),
        "x0": torch.cat([row.x0().detach() for row in rows]),
        "x1": torch.cat([row.x1 for row in rows]),
    }
    if rows[0].source is not None:
        stream["w"] = torch.cat([row.source.w for row in rows])
    torch.save(stream, dump / f"rank_{torch.distributed.get_rank()}.pt")


if __name__ == "__main__":
    main()
