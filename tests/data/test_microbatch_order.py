"""The order of a rank's micro-batches: the formula, random access, and what is refused."""

import pytest
import torch

from mixflow_fast.data import sample_index
from mixflow_fast.data.microbatch_order import MicrobatchOrder

COMMON = {"seed": 5, "global_batch_size": 24, "microbatch_size": 3, "world_size": 2}


@pytest.mark.parametrize("rank", [0, 1])
def test_the_formula(rank: int) -> None:
    order = MicrobatchOrder(100, rank=rank, **COMMON)
    assert order.microsteps == 4
    first = order.microstep_at(48)
    for micro in range(4):
        indices, positions = order(first + micro)
        assert positions.tolist() == [48 + (micro * 2 + rank) * 3 + i for i in range(3)]
        assert torch.equal(indices, sample_index(positions, 100, 5))
        assert order.step_position(first + micro) == 48


def test_any_access_gives_what_walking_gives() -> None:
    walked, jumping = MicrobatchOrder(1000, **COMMON), MicrobatchOrder(1000, **COMMON)
    rows = [walked(step) for step in range(6000)]  # more than one block
    for step in (5999, 0, 2731, 2730, 5998):
        assert all(torch.equal(a, b) for a, b in zip(jumping(step), rows[step], strict=True))


def test_a_kept_micro_batch_does_not_keep_its_block() -> None:
    indices, positions = MicrobatchOrder(100, **COMMON)(7)
    assert indices.untyped_storage().nbytes() == positions.untyped_storage().nbytes() == 3 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 2}, "rank must be below world_size = 2, got 2"),
        ({"global_batch_size": 20}, "multiple of microbatch_size"),
        ({"microbatch_size": 0}, "microbatch_size must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer"),
    ],
)
def test_refusals(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MicrobatchOrder(100, **COMMON | change)
    with pytest.raises(ValueError, match="at least one sample"):
        MicrobatchOrder(0, **COMMON)
    with pytest.raises(ValueError, match="starts at 24"):
        MicrobatchOrder(100, **COMMON).microstep_at(25)
