"""The order of samples: exact permutations, random access, and orders that look uniform.

Thresholds are closed forms: a chi-square sum with d degrees of freedom has mean d and standard
deviation sqrt(2 d); a statistic passes within 5 standard deviations of its mean.
"""

import itertools
import math

import pytest
import torch

from mixflow_fast.data.order import sample_index

SIZES = (1, 2, 3, 5, 64, 1000, 4097)


def epochs_of(size: int, count: int, seed: int = 0, first: int = 0) -> torch.Tensor:
    positions = torch.arange(first * size, (first + count) * size)
    return sample_index(positions, size, seed).view(count, size)


def chi_square_z(counts: torch.Tensor, expected: float) -> float:
    freedom = counts.numel() - 1
    total = float(((counts.double() - expected) ** 2 / expected).sum())
    return (total - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", [0, 7, (1 << 40) + 3])
def test_every_epoch_is_an_exact_permutation(size, first):
    orders = epochs_of(size, 3, seed=(1 << 63) + 5, first=first)
    assert torch.equal(orders.sort(dim=1).values, torch.arange(size).expand(3, -1))


@pytest.mark.parametrize("size", [64, 1000, 4097])
def test_epochs_and_seeds_have_different_orders(size):
    # Two independent random permutations agree in about Poisson(1) places.
    orders = [
        epochs_of(size, 1)[0],
        epochs_of(size, 1, first=1)[0],
        epochs_of(size, 1, first=1 << 32)[0],  # epoch 0 in the low word, 1 in the high one
        epochs_of(size, 1, seed=1)[0],
        epochs_of(size, 1, seed=1 << 32)[0],
        torch.arange(size),
    ]
    for one, other in itertools.combinations(orders, 2):
        assert int((one == other).sum()) <= 8


@pytest.mark.parametrize("size", [3, 64, 1000])
def test_random_access_equals_sequential(size):
    sequential = epochs_of(size, 4, seed=9).flatten()
    scattered = torch.tensor([3 * size + 2, 0, size - 1, size, 2 * size + 1, 0, 4 * size - 1])
    assert torch.equal(sample_index(scattered, size, 9), sequential[scattered])
    for position in (0, size, 4 * size - 1):
        alone = sample_index(torch.tensor([position]), size, 9)
        assert alone.item() == sequential[position].item()


def test_the_ends_of_the_range():
    size = 1 << 40
    positions = torch.tensor([0, 1, size - 1, size, (1 << 62) - 1, 1 << 62])
    index = sample_index(positions, size, (1 << 64) - 1)
    assert index.dtype == torch.int64 and len(set(index.tolist())) == len(positions)
    assert int(index.min()) >= 0 and int(index.max()) < size
    assert torch.equal(sample_index(positions, 1, 0), torch.zeros(6, dtype=torch.int64))
    assert sample_index(positions[:0], 5, 0).shape == (0,)


def test_without_shuffle_the_order_is_the_stored_one():
    assert sample_index(torch.arange(7), 3, 0, shuffle=False).tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_an_item_lands_everywhere_equally_often_across_seeds():
    size, seeds = 64, 800
    first = torch.stack([sample_index(torch.tensor([0, 5]), size, seed) for seed in range(seeds)])
    for column in first.unbind(1):
        assert abs(chi_square_z(torch.bincount(column, minlength=size), seeds / size)) < 5


@pytest.mark.parametrize("size", [2, 3, 5, 33])
def test_an_item_lands_everywhere_equally_often_across_epochs(size):
    orders = epochs_of(size, 1500, seed=3)
    for place in range(size):
        counts = torch.bincount(orders[:, place], minlength=size)
        assert abs(chi_square_z(counts, 1500 / size)) < 5


def test_all_orders_of_a_small_set_are_equally_likely():
    size, epochs = 5, 6000
    codes = (epochs_of(size, epochs) * size ** torch.arange(size)).sum(dim=1)
    seen, counts = codes.unique(return_counts=True)
    assert len(seen) == math.factorial(size)
    assert abs(chi_square_z(counts, epochs / math.factorial(size))) < 5


def test_pairs_of_places_are_independent():
    size, epochs = 12, 3000
    orders = epochs_of(size, epochs, seed=1)
    for one, other in ((0, 1), (0, 6), (2, 5)):
        pairs = torch.bincount(orders[:, one] * size + orders[:, other], minlength=size**2)
        off_diagonal = pairs.view(size, size)[~torch.eye(size, dtype=torch.bool)]
        assert abs(chi_square_z(off_diagonal, epochs / (size * (size - 1)))) < 5


@pytest.mark.parametrize("size", [1000, 4096, 4097])
def test_neighbours_are_uncorrelated(size):
    order = epochs_of(size, 1, seed=4)[0].double()
    for lag in (1, 2, 64):
        correlation = torch.corrcoef(torch.stack([order[:-lag], order[lag:]]))[0, 1]
        assert abs(float(correlation)) < 5 / math.sqrt(size)
    following = int((order.diff() == 1).sum())  # about Poisson(1)
    assert following <= 8


@pytest.mark.parametrize(
    ("positions", "size", "seed", "name"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), 5, 0, "positions"),
        (torch.zeros(2), 5, 0, "positions"),
        ([0, 1], 5, 0, "positions"),
        (torch.tensor([-1]), 5, 0, "positions"),
        (torch.tensor([(1 << 62) + 1]), 5, 0, "positions"),
        (torch.tensor([0]), 0, 0, "size"),
        (torch.tensor([0]), (1 << 40) + 1, 0, "size"),
        (torch.tensor([0]), 5, -1, "seed"),
        (torch.tensor([0]), 5, 1 << 64, "seed"),
    ],
)
def test_bad_arguments_are_named(positions, size, seed, name):
    with pytest.raises(ValueError, match=f"^{name} must"):
        sample_index(positions, size, seed)
