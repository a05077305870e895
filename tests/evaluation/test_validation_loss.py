"""Validation losses against closed forms, on any number of ranks."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.evaluation.validation_loss import (
    GRID,
    SEED,
    TIMES,
    Losses,
    ValidationLoss,
    bin_centers,
)
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.training.build import (
    ValidationData,
    build_data,
    build_objective,
    build_validation,
)

CPU = torch.device("cpu")


def small(*overrides: str) -> Config:
    return load_config("photos", ["train.microbatch_size=4", "train.validate_examples=10",
                                  "data.flip=true", *overrides])  # fmt: skip


def validation(config: Config) -> ValidationData:
    dataset = build_data(config.data, config.model)
    return build_validation(config.data, config.model, dataset)


def losses_of(config: Config, net: Any, clock: str = "data_at_1", **parts: Any) -> Losses:
    mix = build_objective(config.objective, clock, config.train.seed)
    sizes = {
        "examples": config.train.validate_examples,
        "batch_size": config.train.microbatch_size,
    }
    return ValidationLoss(validation(config), mix, CPU, **sizes, **parts)(net)


def examples(config: Config, count: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """(x1, x0, y) of the validation, drawn here."""
    dataset = validation(config).dataset
    place = torch.arange(count)
    batch = dataset.get(place * len(dataset) // count, place, SEED)
    x0 = philox.normal(SEED, Stream.VALIDATION_NOISE, place, batch.x[0].numel())
    return batch.x, x0.view_as(batch.x), batch.y


def test_losses_are_those_of_the_formula() -> None:
    """A network that answers with its input, its label and its time shows where each came from."""
    config = small("objective.gamma=0.5")
    x1, x0, y = (value.double() for value in examples(config))

    def net(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x * t[:, None, None, None] + labels[:, None, None, None]

    def truth(t: float, m: float) -> float:
        answer = (m * x1 + (1 - m) * x0) * t + y[:, None, None, None]
        return float((answer - (x1 - x0)).square().mean())

    found = losses_of(config, net)
    expected = [truth(t, t) for t in bin_centers(TIMES)]
    assert found.loss_by_t == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(sum(expected) / TIMES, rel=1e-5)
    assert len(set(expected)) == TIMES
    times = bin_centers(GRID)
    for row, m in enumerate(times):
        for column, t in enumerate(times):
            value = found.grid[row][column]
            assert value == (pytest.approx(truth(t, m), rel=1e-5) if m <= t else None)
    assert losses_of(config, net) == found
    full = losses_of(small("objective.interval=full"), net).grid
    assert full[7][0] == pytest.approx(truth(times[0], times[7]), rel=1e-5)


def test_the_other_clock_gives_the_same_numbers() -> None:
    config = small()

    def forward(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x * t[:, None, None, None]

    def backward(x: Tensor, s: Tensor, y: Tensor) -> tuple[Tensor, str]:
        return -forward(x, 1 - s, y), "projections of REPA's SiT"

    there, back = losses_of(config, forward), losses_of(config, backward, "noise_at_1")
    assert back.loss_by_t == pytest.approx(there.loss_by_t, rel=1e-5)
    assert back.grid[2][5] == pytest.approx(there.grid[2][5], rel=1e-5)


def test_ranks_share_the_work_and_have_the_same_numbers() -> None:
    config, calls = small(), [0, 0, 0]
    parts: list[Any] = [None] * 3
    barrier = threading.Barrier(3, timeout=60)
    found: list[Any] = [None] * 3

    def work(rank: int) -> None:
        def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            calls[rank] += 1
            return x

        def share(mine: Any) -> list[Any]:
            parts[rank] = mine
            barrier.wait()
            return list(parts)

        found[rank] = losses_of(config, net, rank=rank, ranks=3, all_gather=share)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(calls) - min(calls) <= 1 and sum(calls) == 3 * (TIMES + GRID * (GRID + 1) // 2)
    assert found[0] == found[1] == found[2] == losses_of(config, lambda x, t, y: x)


def test_what_is_validated_on(tmp_path: Path) -> None:
    found = validation(small())
    assert found.dataset.name == "photos-16-heldout" and found.description == "held-out examples"
    # The held-out bands are 20 columns wide.
    found = validation(small("data.size=24", "model.input_size=24"))
    dataset = found.dataset
    assert dataset.name == "photos-24-train" and found.description == "training examples"
    place = torch.arange(8)
    same = [dataset.get(place, place + start, SEED).x for start in (0, 1000)]
    assert torch.equal(*same)  # no flips
