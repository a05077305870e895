"""Small training runs, and what tests look at in them."""

from __future__ import annotations

import operator
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.checkpoints.shards import ParameterState
from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.data import Batch, BatchLoader, sample_index
from mixflow_fast.metrics.metrics_file import read_metrics
from mixflow_fast.training.trainer import Trainer
from tests.support.train_ranks import TINY

# A mixed source on top of TINY: the paper trains it without slowing.
MIXED = ["source.kind=mixed", "source.lam=0.3", "source.widths=[16]", "source.groups=8"]
MIXED += ["source.layers=1", "objective.gamma=0", "objective.timesteps=uniform"]


def training_row(step: int, **values: object) -> dict:
    return {"step": step, "loss": 0.5, "lr": 1e-4, "images_per_s": 10.0} | values


ROOT = Path(__file__).resolve().parents[2]
# The head's SwiGLU is 117 wide: its biases of 234 and 117 elements shift what comes after them.
ODD = ["model.name=DiTDH-S", "model.learn_sigma=null", "model.depth=[1,2]"]
ODD += ["model.hidden_size=[32,44]", "model.num_heads=[2,1]", "model.input_size=4", "data.size=4"]


def tiny(out: Path, *overrides: str) -> Config:
    return load_config("photos", [*TINY, "train.images=48", f"out={out}", *overrides])


def settings(precision: str, stage: int) -> list[str]:
    return [f"train.precision={precision}", f"train.zero_stage={stage}"]


def tensors(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every leaf of nested dicts and lists."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for key, item in enumerate(value):
            yield from tensors(item, f"{path}/{key}")
    elif isinstance(value, (torch.Tensor, int, float, str)):
        yield path, value


def checkpoint_leaves(out: Path) -> dict[str, object]:
    """All that a run's newest checkpoint holds: weights, master weights, moments, EMA, counters."""
    (folder,) = (out / "checkpoints").glob("step_*")
    leaves = {}
    for file in sorted(folder.rglob("*.pt")):
        content = torch.load(file, weights_only=False)
        leaves |= {f"{file.name}{path}": leaf for path, leaf in tensors(content)}
    settings = ("args/config", "ds_version", "ds_config")
    return {k: v for k, v in leaves.items() if not any(name in k for name in settings)}


def assert_same_bits(a: Path, b: Path, but: tuple[str, ...] = ()) -> None:
    """The newest checkpoints of two runs hold the same, in all files but those."""
    first, second = (
        {key: leaf for key, leaf in checkpoint_leaves(out).items() if not key.startswith(but)}
        if but
        else checkpoint_leaves(out)
        for out in (a, b)
    )
    assert first.keys() == second.keys()
    assert any("exp_avg_sq" in key for key in first) and any("ema" in key for key in first)
    for key, leaf in first.items():
        same = torch.equal if isinstance(leaf, torch.Tensor) else operator.eq
        assert same(leaf, second[key]), key


def assert_same_states(a: dict[str, ParameterState], b: dict[str, ParameterState]) -> None:
    """Weights, moments, EMAs and step counts of all parameters, bit for bit."""
    assert list(a) == list(b)
    for name, values in a.items():
        assert values.keys() == b[name].keys(), name
        for key, value in values.items():
            other = b[name][key]
            same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
            assert same, (name, key)


def run_ranks(ranks: int, dump: Path, out: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """The stream of a run on `ranks` processes, sorted by global position."""
    dump.mkdir()
    command = [sys.executable, "-m", "tests.support.train_ranks"]
    if ranks > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        [*command, str(dump), f"out={out}", *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    parts = [torch.load(file) for file in sorted(dump.glob("rank_*.pt"))]
    assert len(parts) == ranks
    stream = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = stream["ids"].argsort()
    return {key: value[order] for key, value in stream.items()}


class CountReads(TorchDispatchMode):
    """Counts reads of a device value on the host: each would stall a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Prefetched:
    """Micro-batches that are made already: what the loader reads, it reads in host memory."""

    def __init__(self, loader: BatchLoader, count: int) -> None:
        self.microsteps = loader.microsteps
        # Clones: a loader may give a batch's memory to the next one.
        self._batches = iter([next(loader).map(torch.clone) for _ in range(count)])

    def __next__(self) -> Batch:
        return next(self._batches)


def first_positions(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(trainer.config.train.global_batch_size)
    return sample_index(positions, len(trainer.dataset), trainer.config.train.seed), positions


def start_cli(out: Path, *overrides: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "mixflow_fast.cli", "train", "photos", *TINY, f"out={out}"]
        + list(overrides),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        rows = read_metrics(out / "metrics.jsonl")
        if rows and rows[-1]["step"] >= step:
            return
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1][-3000:])
        time.sleep(0.02)
    raise AssertionError("no progress in 120 s")


def tiny_mixed(out: Path, *overrides: str) -> Config:
    """`tiny` with a mixed source of 6,166 parameters."""
    return tiny(out, *MIXED, *overrides)
