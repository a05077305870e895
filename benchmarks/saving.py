"""What a checkpoint costs, and for how much of it training stands still.

    python -m benchmarks.saving [--mib 1024] [--rounds 3] [--folder FOLDER]

A state as ZeRO 1 and 2 shard it (flat float32 partitions: master weights, two moments, an EMA) is
saved in turns by two ways; a row has seconds, and seconds of the processor, per GB:

    waiting     torch.save, flush to the disk, read again for the checksum, while training waits
    beside      what a run does: a copy in host memory while training waits ("stands still"), then
                torch.save and flush with the checksum taken on the way, which a thread does
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.checkpoints.manifest import entry
from mixflow_fast.checkpoints.run_folder import RunState
from mixflow_fast.checkpoints.writing import CheckpointWriter
from mixflow_fast.cli.errors import quiet_without_reader
from mixflow_fast.distributed.host_group import HostGroup

STATE = ("weight", "exp_avg", "exp_avg_sq", "ema")
State = dict[str, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Ways: beside copies the state and writes it beside training, as runs do; waiting "
        "writes it while training waits, as former releases did. Medians come last, in seconds and "
        "seconds of processor time per GB.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument(
        "--folder", default=tempfile.gettempdir(), help="where to write: on the disk of out="
    )
    options = parser.parse_args(argv)
    state = {name: torch.randn(options.mib * 2**18 // len(STATE)) for name in STATE}
    gigabytes = sum(tensor.nbytes for tensor in state.values()) / 1e9
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                parts = WAYS[way](state, Path(folder))
            for what, (wall, cpu) in parts.items():
                row = {"way": way, "what": what, "round": number, "gb": round(gigabytes, 3)}
                times = {"s_per_gb": wall / gigabytes, "cpu_s_per_gb": cpu / gigabytes}
                print(json.dumps(row | {k: round(v, 3) for k, v in times.items()}), flush=True)
                for unit, value in times.items():
                    found.setdefault(f"{way}, {what}: {unit}", []).append(value)
    for what, values in found.items():
        print(f"{what} {statistics.median(values):.2f}")
    return 0


def waiting(state: State, folder: Path) -> dict[str, tuple[float, float]]:
    """{"stands still": (seconds, seconds of the processor)}: everything."""

    def save() -> None:
        path = folder / "state.pt"
        with path.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        entry(path)

    return {"stands still": timed(save)}


def beside(state: State, folder: Path) -> dict[str, tuple[float, float]]:
    """The same for the copy ("stands still"), and for what a thread does ("written")."""
    writer = CheckpointWriter(folder, 1, HostGroup.alone())
    stands_still = timed(lambda: writer.write(state, writer.folder / "state.pt"))
    run = RunState({}, step=1, images_seen=1, world_size=1)
    return {"stands still": stands_still, "written": timed(lambda: writer.commit(run, 1))}


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and seconds of the processor, that an action takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - cpu


WAYS: dict[str, Callable[[State, Path], dict[str, tuple[float, float]]]] = {
    "waiting": waiting,
    "beside": beside,
}

if __name__ == "__main__":
    raise SystemExit(quiet_without_reader(main))
