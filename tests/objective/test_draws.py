"""Positions of calls without ids, in the workers of a loader."""

import warnings

import pytest
import torch

from mixflow_fast import MixFlow
from mixflow_fast.flow import DATA_AT_1


class _PreparedInWorkers(torch.utils.data.Dataset):
    """What people write who prepare in the loader and do not pass ids."""

    def __init__(self) -> None:
        self.mix = MixFlow(clock=DATA_AT_1, seed=1)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            t = self.mix.prepare(torch.zeros(1, 1, 2, 2)).t
        assert "without ids in a DataLoader's worker" in str(told[0].message)
        return t


def test_workers_of_a_loader_draw_other_times_in_each_worker_and_epoch() -> None:
    loader = torch.utils.data.DataLoader(_PreparedInWorkers(), num_workers=2)
    drawn = [t.item() for _ in range(2) for t in loader]
    assert len(set(drawn)) == 16


def test_ranks_with_equal_seeds_draw_other_times_in_their_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = []
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        torch.manual_seed(3)
        drawn += [
            t.item() for t in torch.utils.data.DataLoader(_PreparedInWorkers(), num_workers=2)
        ]
    assert len(set(drawn)) == 16
