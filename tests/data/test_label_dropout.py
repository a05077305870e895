"""Labels that give way to the null class, in the loader."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.data import BatchLoader, Digits
from mixflow_fast.data.label_dropout import LabelDropout, drop_labels
from mixflow_fast.kernels.philox import Stream, uniform

# Of labels 0 to 15 at positions 1000 to 1015, seed 7, probability 1/4, null class -1.
KNOWN = [0, 1, 2, 3, 4, -1, 6, 7, 8, -1, 10, -1, -1, 13, 14, -1]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_the_loader_have_the_draws_of_their_positions(workers: int) -> None:
    dataset, seed, p, null = Digits(8), 2**40 + 3, 0.3, 10
    options = dict(seed=seed, global_batch_size=16, microbatch_size=8, rank=1, world_size=2)
    options["start_position"] = 160
    with (
        BatchLoader(dataset, num_workers=0, **options) as plain,
        BatchLoader(LabelDropout(dataset, p, null), num_workers=workers, **options) as loader,
    ):
        dropped = 0
        for _ in range(20):
            a, b = next(plain), next(loader)
            # The formula, with the draws on the side of whoever reads the batch.
            u = uniform(seed, Stream.LABEL_DROPOUT, a.positions)[:, 0]
            assert torch.equal(b.y, torch.where(u < p, null, a.y)) and b.y.dtype == torch.int64
            assert torch.equal(a.x, b.x) and torch.equal(a.positions, b.positions)
            dropped += int((b.y == null).sum())
    assert 24 < dropped < 72  # of 160, 48 expected


def test_it_is_the_dataset_in_all_else() -> None:
    dataset = Digits(8)
    around = LabelDropout(dataset, 0.5, 10)
    assert len(around) == len(dataset) and around.num_classes == 10
    assert (around.shape, around.name) == (dataset.shape, dataset.name)
    assert around.summary() == dataset.summary()
    index = torch.arange(6)
    without = LabelDropout(dataset, 0.0, None).get(index, index, 0)
    assert torch.equal(without.y, dataset.get(index, index, 0).y)
    with pytest.raises(ValueError, match="label dropout of 0.5 needs a null class"):
        LabelDropout(dataset, 0.5, None)


def test_known_draws() -> None:
    """The draws are part of a run's identity: those that earlier releases made on the device."""
    y = drop_labels(torch.arange(16), torch.arange(16) + 1000, 7, 0.25, -1)
    assert y.tolist() == KNOWN
