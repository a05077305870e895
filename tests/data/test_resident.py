"""Latents that lie on the device: the batches of the files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.data import Batch, BatchLoader, Digits, Latents, device_loader
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.latents_store import LatentsStore
from mixflow_fast.data.resident import Resident, fits, resident_problem, table_bytes
from tests.support.late_copies import LateCopies
from tests.support.latents import ROWS, write_store

pytest.importorskip("sklearn.datasets")
CPU = torch.device("cpu")
SIZES = {"seed": 7, "global_batch_size": 24, "microbatch_size": 12}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, late: bool
) -> None:
    """Rows are chosen on the host and gathered on the device; the files are read once."""
    latents = Latents(write_store(tmp_path / "set"))
    examples = LabelDropout(latents, 0.5, 3)
    with BatchLoader(examples, **SIZES) as plain:
        expected = [next(plain) for _ in range(7)]
    resident, device = Resident(latents, CPU), CPU
    read: list[int] = []
    fill = LatentsStore.fill

    def spy(store: LatentsStore, out: Tensor, rows: Tensor) -> None:
        read.append(len(rows))
        fill(store, out, rows)

    monkeypatch.setattr(LatentsStore, "fill", spy)
    if late:
        copies, device = LateCopies(train_s=0), torch.device("cuda")
        monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
        take = resident.take
        monkeypatch.setattr(
            resident, "take", lambda rows, out: copies.training.queue(lambda: take(rows, out))
        )
    seen: list[Batch] = []
    with DeviceLoader(examples, device, workers=workers, resident=resident, **SIZES) as ring:
        for _ in expected:
            batch = next(ring)
            if late:
                copies.training.synchronize()
            seen.append(batch.map(torch.clone))
    for batch, other in zip(seen, expected, strict=True):
        assert torch.equal(batch.x.mean, other.x.mean) and torch.equal(batch.x.std, other.x.std)
        assert torch.equal(batch.y, other.y) and torch.equal(batch.positions, other.positions)
        assert batch.x.scale == other.x.scale == 0.5
    assert read == [1], "a sample for the shapes alone"
    both = torch.cat([batch.x.mean for batch in seen])[:, 0, 0, 0]
    assert set(both.tolist()) == set(ROWS[:, 0, 0, 0].tolist()), "both mirrors of every sample"


def test_what_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = Latents(write_store(tmp_path / "set")).table
    assert table_bytes(store) == 10 * 4 * 3 * 2 * 2
    assert not fits(store, CPU)
    memory = type("Properties", (), {"total_memory": 8 * 10**9 + 480 + 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    for reserved, there_is_room in ((1000, True), (1001, False)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device, used=reserved: used)
        assert fits(store, torch.device("cuda")) is there_is_room


def test_other_data_are_refused(tmp_path: Path) -> None:
    plain = Latents(write_store(tmp_path / "plain", kind="sample", mirrors=2))
    for dataset in (Digits(), plain):
        assert "no set of moments" in resident_problem(dataset)
        with pytest.raises(ValueError, match=f"{dataset.name} is no set of moments"):
            Resident(dataset, CPU)
