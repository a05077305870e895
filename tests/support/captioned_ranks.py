"""A run that writes down what the network was fed and told: started alone or under torchrun.

python -m tests.support.captioned_ranks RECIPE.yaml DUMP_FOLDER
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.distributed import process_group
from mixflow_fast.training.step_record import StepOutput
from mixflow_fast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# By position: what the network was fed and told there.
Stream = dict[int, dict[str, Tensor]]


def run_ranks(ranks: int, config: Config, dump: Path) -> Stream:
    """The stream of a run on `ranks` processes."""
    dump.mkdir()
    recipe = dump / "run.yaml"
    recipe.write_text(config.to_yaml())
    command = [sys.executable, "-m", "tests.support.captioned_ranks", str(recipe), str(dump)]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    parts = [torch.load(file) for file in sorted(dump.glob("rank_*.pt"))]
    assert len(parts) == ranks
    found: Stream = {}
    for part in parts:
        assert not found.keys() & part.keys(), "the same position on two ranks"
        found |= part
    return dict(sorted(found.items()))


def main() -> None:
    torch.set_num_threads(1)
    trainer = Trainer(load_config(sys.argv[1]), quiet=True)
    seen: Stream = {}

    def write_down(step: int, outputs: list[StepOutput], means: Tensor) -> None:
        for made in outputs:
            values = {"x": made.it.x, "t": made.it.t, "m": made.it.slowed_t} | made.cond
            for place, position in enumerate(made.it.ids.tolist()):
                assert position not in seen, "the same position twice"
                seen[position] = {name: value[place].clone() for name, value in values.items()}

    trainer.on_step = write_down
    assert trainer.run().finished
    torch.save(seen, Path(sys.argv[2]) / f"rank_{process_group.rank()}.pt")


if __name__ == "__main__":
    main()
