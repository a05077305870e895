"""The order of batches of several shapes."""

from collections import Counter

import pytest
import torch

from mixflow_fast.data.bucket_order import CYCLE, BucketOrder
from mixflow_fast.data.microbatch_order import MicrobatchOrder
from mixflow_fast.data.order import sample_index

SIZES, BATCH = [700, 250, 50], 8


def bucket_of(indices: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.tensor([700, 950, 1000]), indices, right=True)


def order(sizes: list[int] = SIZES, seed: int = 3, batch: int = BATCH) -> BucketOrder:
    return BucketOrder(sizes, seed=seed, global_batch_size=batch)


def test_one_bucket_is_the_plain_order() -> None:
    positions = torch.arange(0, 5000, 7)
    assert torch.equal(order([1000])(positions), sample_index(positions, 1000, 3))


def test_a_step_is_of_one_bucket_and_shares_are_exact() -> None:
    positions = torch.arange(2 * CYCLE * BATCH)
    buckets = bucket_of(order()(positions)).view(-1, BATCH)
    assert (buckets == buckets[:, :1]).all()
    for cycle in buckets[:, 0].view(2, CYCLE):
        assert Counter(cycle.tolist()) == {0: 2867, 1: 1024, 2: 205}


def test_a_bucket_is_gone_through_before_it_begins_again() -> None:
    indices = order()(torch.arange(CYCLE * BATCH))
    for number, (start, size) in enumerate(((0, 700), (700, 250), (950, 50))):
        own = indices[bucket_of(indices) == number]
        assert len(own) > 2 * size
        for epoch in own[: len(own) // size * size].view(-1, size):
            assert torch.equal(epoch.sort().values, torch.arange(start, start + size))
        assert not torch.equal(own[:size], own[size : 2 * size])


def test_a_bucket_has_its_own_order_whatever_is_between() -> None:
    """Its samples, one step after the other over two cycles, are those of the order alone."""
    indices = order()(torch.arange(2 * CYCLE * BATCH))
    buckets = bucket_of(indices)
    for number, (first, size) in enumerate(((0, 700), (700, 250), (950, 50))):
        own = indices[buckets == number]
        assert torch.equal(own, first + sample_index(torch.arange(len(own)), size, 3))


def test_shares_of_a_cycle_are_the_largest_remainders() -> None:
    """Against fractions: 4096 x 5 / 12, x 4 / 12, x 3 / 12 = 1706 2/3, 1365 1/3, 1024."""
    indices = order([5, 4, 3])(torch.arange(CYCLE) * BATCH)
    found = torch.bincount(torch.searchsorted(torch.tensor([5, 9, 12]), indices, right=True))
    assert found.tolist() == [1707, 1365, 1024]


def test_cycles_and_seeds_have_other_orders() -> None:
    positions = torch.arange(2 * CYCLE) * BATCH
    one, other = bucket_of(order()(positions)).view(2, CYCLE)
    assert not torch.equal(one, other)
    assert not torch.equal(one, bucket_of(order(seed=4)(positions))[:CYCLE])
    # Steps of a bucket are spread: no two runs of the same order next to each other by chance.
    assert (one[1:] != one[:-1]).float().mean() == pytest.approx(
        1 - 0.49 - 0.0625 - 0.0025, abs=0.03
    )


@pytest.mark.parametrize(("ranks", "micro"), [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_the_stream_does_not_depend_on_ranks_and_micro_batches(ranks: int, micro: int) -> None:
    positions = torch.arange(40 * BATCH)
    expected = order()(positions)
    found = torch.empty_like(expected)
    for rank in range(ranks):
        one = MicrobatchOrder(
            SIZES, seed=3, global_batch_size=BATCH, microbatch_size=micro, rank=rank,
            world_size=ranks,
        )  # fmt: skip
        # From the middle on first, as after a resume.
        steps = list(range(20 * one.microsteps, 40 * one.microsteps)) + list(
            range(20 * one.microsteps)
        )
        for number in steps:
            indices, at = one(number)
            found[at] = indices
    assert torch.equal(found, expected)


def test_a_small_bucket_has_its_step() -> None:
    sizes = [10_000_000, 1, 2]
    indices = order(sizes)(torch.arange(CYCLE) * BATCH)
    assert (indices == 10_000_000).sum() == 1
    assert (indices > 10_000_000).sum() == 1


def test_far_steps_are_as_near_ones() -> None:
    far = CYCLE * 10**9
    steps = torch.arange(far, far + CYCLE)
    buckets = bucket_of(order()(steps * BATCH))
    assert Counter(buckets.tolist()) == {0: 2867, 1: 1024, 2: 205}
    assert order().bucket_of(699) == 0 and order().bucket_of(700) == 1


@pytest.mark.parametrize("sizes", [[], [5, 0], [1] * (CYCLE + 1)])
def test_buckets_that_cannot_be(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        order(sizes)
