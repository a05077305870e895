"""What a training step launches besides the network and DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.training.engines import Engine
from mixflow_fast.training.trainer import Trainer
from tests.support.latents import training_on, write_store
from tests.support.launches import Launches
from tests.support.runs import Prefetched, first_positions, tiny


class OutsideTheEngine:
    """The engine, whose own work is not counted; the loss' backward pass is.

    `after` are the launches so far after each micro-batch.
    """

    def __init__(self, engine: Engine, launches: Launches) -> None:
        self._engine, self._launches = engine, launches
        self.after: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def __call__(self, *args: Tensor) -> Tensor:
        with self._launches.paused():
            self._pred = self._engine(*args)
            self._leaf = self._pred.detach().requires_grad_()
        return self._leaf

    def backward(self, loss: Tensor) -> None:
        """Down to the prediction under the count, and from there by the engine."""
        loss.backward()
        with self._launches.paused():
            self._engine.backward((self._pred * self._leaf.grad).sum())

    def step(self) -> None:
        with self._launches.paused():
            self._engine.step()
        self.after.append(self._launches.total)

    def grad_norm(self) -> Tensor | float | None:
        with self._launches.paused():
            return self._engine.grad_norm()


@pytest.mark.skipif(not runtime.interpreting(), reason="counted in Triton's interpreter")
@pytest.mark.parametrize("data", ["photos", "moments"])
def test_a_step_launches_little_besides_network_and_engine(tmp_path: Path, data: str) -> None:
    """Moments are one copy, and neither they nor the cast to bf16 take a launch of their own."""
    more = ["train.microbatch_size=4", "objective.impl=triton"]
    if data == "moments":
        more += training_on(write_store(tmp_path / "set", torch.rand(10, 6, 16, 16)))
    config = tiny(tmp_path / "run", "train.zero_stage=2", "train.precision=bf16", *more)
    trainer = Trainer(config, quiet=True)
    with trainer.loader() as loader:
        batches = Prefetched(loader, 4)
        trainer.train_step(batches)  # seeds and counters are made once
        launches = Launches()
        trainer.engine = engine = OutsideTheEngine(trainer.engine, launches)
        with launches:
            trainer.train_step(batches)
    trainer.close()
    first, second = engine.after
    # A batch goes from host memory to the device, where it already is here.
    batch = trainer.examples.get(*first_positions(trainer), 0)
    copies = len(batch.buffers())
    each, step = second - first, launches.total - second
    assert first == each, "nothing is launched before a step's first micro-batch"
    each += copies
    print(f"a micro-batch {each}, besides {step} a step", dict(launches.counts), copies)
    assert each + step <= 60
    assert (each, step) == (11, 3)
