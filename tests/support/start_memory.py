"""Host memory of a run's start, in multiples of its network in float32.

python -m tests.support.start_memory FOLDER fresh|resume SIZES...

`fresh` starts from a weights file in FOLDER (made first, in another process), `resume` from a
checkpoint of such a run. Prints the most and the last of the whole start, where what DeepSpeed
would have on the GPU is in this memory too, and the most of what comes before DeepSpeed, which is
in host memory whatever the device (but for the watched copy, half a network).
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import torch

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.models import save_weights
from mixflow_fast.training.build import build_model
from mixflow_fast.training.engine import DeepSpeedEngine, import_deepspeed
from mixflow_fast.training.trainer import Trainer

COMMON = ["train.device=cpu", "train.precision=bf16", "train.zero_stage=2", "model.mode=eager"]
COMMON += ["train.global_batch_size=1", "train.microbatch_size=1", "train.save_weights=never"]
COMMON += ["train.preview_every=0", "train.validate_every=1000", "train.validate_examples=1"]
COMMON += ["data={kind: photos, size: 16}", "model.input_size=16", "model.in_channels=3"]
COMMON += ["train.images=1"]


class Peak:
    """The most private memory that this process had while it was open, above that at its start."""

    def __enter__(self) -> Peak:
        self._first, self._most, self._done = private_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self._most = max(self._most, private_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.steady = private_bytes() - self._first
        self.peak = max(self._most - self._first, self.steady)


def private_bytes() -> int:
    """Resident memory that is not pages of files, which the system may drop at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def config_of(folder: Path, sizes: list[str], *more: str) -> Config:
    files = [f"train.init={folder / 'weights.pt'}", f"out={folder / 'run'}"]
    return load_config("photos", [*COMMON, *sizes, *files, *more])


def main() -> None:
    folder, mode, sizes = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    config = config_of(folder, sizes, *(["train.images=2"] if mode == "resume" else []))
    if mode == "make":
        state = build_model(config.model).state_dict()
        save_weights(folder / "weights.pt", state, state, {})
        return
    import_deepspeed()
    before = Peak().__enter__()
    start = DeepSpeedEngine.start

    def ending(*args: object, **options: object) -> None:
        before.__exit__()
        start(*args, **options)

    DeepSpeedEngine.start = ending
    with Peak() as memory:
        trainer = Trainer(config, quiet=True)
    network = 4 * sum(torch.Size(s).numel() for s in trainer.engine.shapes.values())
    found = {"before": before.peak, "peak": memory.peak, "steady": memory.steady}
    found = {name: round(value / network, 2) for name, value in found.items()}
    print(json.dumps(found | {"network_mib": network / 2**20}))
    if mode == "fresh":
        trainer.run()


if __name__ == "__main__":
    main()
