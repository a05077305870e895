"""The ring of micro-batches: the stream of the order in fixed memory, whole while it is used."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast import MixFlow
from mixflow_fast.data import (
    Batch,
    BatchLoader,
    Digits,
    ImageFolder,
    Latents,
    Photos,
    device_loader,
)
from mixflow_fast.data.dataset import Dataset, mirrored, split
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.order import sample_index
from mixflow_fast.kernels.interpolate import Moments
from tests.support.datasets import moments_dataset
from tests.support.late_copies import LateCopies
from tests.support.latents import write_store
from tests.support.runs import CountReads

pytest.importorskip("sklearn.datasets")
CPU = torch.device("cpu")
SIZES = {"seed": 7, "global_batch_size": 24, "microbatch_size": 12}


class Table:
    """Moments in one buffer, both mirrors, and images: all that a batch can have.

    Row `2 * index + mirror` holds the numbers index + mirror / 2 and, as std, 0.25.
    """

    num_classes, shape, name, flip = 5, (2, 3, 3), "table", True

    def __init__(self, count: int = 50) -> None:
        rows = torch.arange(2 * count) / 2
        self.rows = rows.to(torch.float16)[:, None, None, None].repeat(1, 4, 3, 3)
        self.rows[:, 2:] = 0.25
        self.asked: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.rows) // 2

    def willneed(self, indices: Tensor, positions: Tensor, seed: int) -> None:
        self.asked.append(positions)

    def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
        x = split(self.rows[2 * indices + mirrored(positions, seed)], 0.5)
        images = indices.to(torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
        return Batch(x, indices % 5, positions, images=images)


class Filling(Table):
    """Writes itself into given memory; `get` serves for the shapes alone."""

    def fill(self, out: Batch, indices: Tensor, positions: Tensor, seed: int) -> None:
        made = super().get(indices, positions, seed)
        out.x.mean.copy_(made.x.mean)
        out.x.std.copy_(made.x.std)
        out.y.copy_(made.y)
        out.images.copy_(made.images)


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "photos": lambda folder: Photos(flip=True),
    "latents": moments_dataset,
    "set": lambda folder: Latents(write_store(folder / "set")),
    "table": lambda folder: Table(),
    "filling": lambda folder: Filling(),
    "dropped": lambda folder: LabelDropout(Filling(), 0.5, 5),
}


def same(a: Batch, b: Batch) -> bool:
    pairs = list(zip(a.buffers(), b.buffers(), strict=True))
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in pairs) and len(pairs) > 2


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_batches_are_those_of_the_plain_loader(
    tmp_path: Path, kind: str, workers: int, depth: int
) -> None:
    dataset = DATASETS[kind](tmp_path)
    with (
        BatchLoader(dataset, start_position=48, **SIZES) as plain,
        DeviceLoader(
            dataset, CPU, start_position=48, workers=workers, depth=depth, poison=True, **SIZES
        ) as ring,
    ):
        assert ring.microsteps == plain.microsteps == 2
        for _ in range(9):
            assert ring.position == plain.position
            assert same(next(ring), next(plain))
        assert ring.wait.take().batches == 9 and ring.wait.batches == 0


@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 4), (2, 3), (4, 3), (12, 1)])
def test_ranks_and_sizes_split_one_stream(world_size: int, microbatch_size: int) -> None:
    """A far start costs nothing: 4.8e10 is 37,000 epochs of ImageNet."""
    dataset, start = Table(), 48 * 10**9
    common = {"seed": 3, "global_batch_size": 12, "start_position": start}
    with BatchLoader(dataset, microbatch_size=12, **common) as plain:
        whole = torch.cat([next(plain).x.mean[:, 0, 0, 0] for _ in range(2)])
    found = {}
    for rank in range(world_size):
        split_up = dict(microbatch_size=microbatch_size, rank=rank, world_size=world_size)
        with DeviceLoader(dataset, CPU, **common, **split_up) as ring:
            for _ in range(2 * ring.microsteps):
                batch = next(ring)
                found |= dict(
                    zip(batch.positions.tolist(), batch.x.mean[:, 0, 0, 0].tolist(), strict=True)
                )
    assert sorted(found) == list(range(start, start + 24))
    assert [found[position] for position in sorted(found)] == whole.tolist()


def test_memory_is_that_of_the_ring_and_is_used_again() -> None:
    with DeviceLoader(Table(), CPU, depth=3, **SIZES) as ring:
        places = [next(ring).x.mean.data_ptr() for _ in range(12)]
    assert places[:3] * 4 == places and len(set(places)) == 3


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["table", "dropped"])
def test_slots_stay_whole_on_a_device_that_is_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, seed: int
) -> None:
    """What is queued on the training's stream sees its batch, however late both streams are."""
    copies = LateCopies(seed=seed)
    monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
    dataset = DATASETS[kind](tmp_path)
    seen: list[Batch] = []
    with (
        BatchLoader(dataset, **SIZES) as plain,
        DeviceLoader(dataset, torch.device("cuda"), depth=2, **SIZES) as ring,
    ):
        expected = [next(plain) for _ in range(25)]
        for _ in range(25):
            with CountReads() as counter:
                batch = next(ring)
            assert not counter.reads
            allocated = copies.allocated
            copies.training.queue(lambda batch=batch: seen.append(batch.map(torch.clone)))
        copies.training.synchronize()
        assert copies.allocated == allocated
        assert ring.wait.take().device_s > 0
        assert copies.waiting == {"mixflow_fast-loader"}, "the training thread waits for nothing"
    assert copies.waiting == {"mixflow_fast-loader", "MainThread"}, "but for the end"
    assert all(same(a, b) for a, b in zip(seen, expected, strict=True))


@pytest.mark.parametrize("broken", ["free", "ready"])
def test_the_late_device_finds_an_event_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """The test above would fail without either of the two."""
    # Where the copies are quick, only `free` holds them back; where they are slow, `ready` counts.
    late = (0.0, 0.01) if broken == "free" else (0.01, 0.0)
    copies = LateCopies(*late)
    monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
    seen: list[Tensor] = []
    with DeviceLoader(Table(), torch.device("cuda"), depth=2, **SIZES) as ring:
        if broken == "free":
            monkeypatch.setattr(
                copies,
                "send",
                lambda pairs, after, ready: LateCopies.send(copies, pairs, copies.event(), ready),
            )
        else:
            monkeypatch.setattr(ring.wait, "have_wait", lambda copies, ready: None)
        for _ in range(25):
            batch = next(ring)
            copies.training.queue(lambda batch=batch: seen.append(batch.positions.clone()))
        copies.training.synchronize()
    wanted = [torch.arange(start, start + 12) for start in range(0, 300, 12)]
    assert not all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_use_after_the_next_call_is_refused() -> None:
    """By the objective, which looks whether its data changed, and by what the memory holds."""
    looked = threading.Event()

    class Waiting(Table):
        def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
            assert positions[0] < 36 or looked.wait(20)  # the first slot's second batch
            return super().get(indices, positions, seed)

    mix = MixFlow(clock="data_at_1")
    with DeviceLoader(Waiting(), CPU, depth=3, poison=True, **SIZES) as ring:
        batch = next(ring)
        it = mix.prepare(batch.x, ids=batch.positions, dtype=torch.bfloat16)
        mix.loss(it.x, it)
        next(ring)
        assert batch.x.mean.isnan().all() and (batch.y == torch.iinfo(torch.int64).max).all()
        with pytest.raises(ValueError, match="changed in place between prepare and loss"):
            mix.loss(it.x, it)
        looked.set()


def test_a_clone_stays() -> None:
    with DeviceLoader(Table(), CPU, depth=2, poison=True, **SIZES) as ring:
        kept = [next(ring).map(torch.clone) for _ in range(10)]
    with BatchLoader(Table(), **SIZES) as plain:
        assert all(same(batch, next(plain)) for batch in kept)
    assert isinstance(kept[0].x, Moments)


def test_a_dataset_is_told_what_comes() -> None:
    table = Table()
    with DeviceLoader(table, CPU, depth=2, workers=1, **SIZES) as ring:
        for number in range(1, 6):
            next(ring)
            told = [int(positions[0]) for positions in table.asked]
            assert told == list(range(0, 12 * len(told), 12)) and len(told) >= number + 2


def test_waiting_is_counted() -> None:
    class Slow(Table):
        def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
            time.sleep(0.05)
            return super().get(indices, positions, seed)

    for workers in (0, 1):
        with DeviceLoader(Slow(), CPU, workers=workers, **SIZES) as ring:
            next(ring)
            ring.wait.take()
            started = time.perf_counter()
            for _ in range(4):
                next(ring)
            wait, seconds = ring.wait.take(), time.perf_counter() - started
        # Two parts of 8 and 4 rows, one after the other; with no worker one part.
        assert wait.batches == 4 and 4 * 0.045 < wait.host_s < seconds
        assert wait.device_s == 0


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("mixflow_fast-loader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_at_its_batch_with_its_name(image_folder: Path, workers: int) -> None:
    (image_folder / "b_china" / "1.png").write_bytes(b"broken")
    where = sample_index(torch.arange(6), 6, 0).tolist().index(4)
    ring = DeviceLoader(
        ImageFolder(image_folder, 16),
        CPU,
        seed=0,
        global_batch_size=1,
        microbatch_size=1,
        workers=workers,
    )
    for _ in range(where):
        next(ring)
    with pytest.raises(ValueError, match=r"b_china.1\.png"):
        next(ring)
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(ring)


def test_samples_of_two_shapes_are_refused() -> None:
    class Odd(Table):
        def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
            batch = super().get(indices, positions, seed)
            return batch if positions[0] < 12 else replace(batch, images=batch.images[..., 1:])

    with (
        DeviceLoader(Odd(), CPU, **SIZES) as ring,
        pytest.raises(ValueError, match=r"images of some is \(3, 4, 4\) and of others \(3, 4, 3\)"),
    ):
        for _ in range(3):
            next(ring)


def test_no_thread_is_left_after_an_interrupt() -> None:
    class Interrupting(Table):
        def get(self, indices: Tensor, positions: Tensor, seed: int) -> Batch:
            if positions[0] == 24:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                time.sleep(0.1)
            return super().get(indices, positions, seed)

    ring = DeviceLoader(Interrupting(), CPU, depth=1, **SIZES)
    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):
            next(ring)
        time.sleep(20)  # on a busy machine the signal comes late
    ring.close()
    assert not loader_threads()


def test_no_thread_is_left_after_collection() -> None:
    ring = DeviceLoader(Digits(), CPU, **SIZES)
    next(ring)
    assert loader_threads()
    del ring
    gc.collect()
    for thread in loader_threads():
        thread.join(timeout=5)
    assert not loader_threads()


def test_memory_of_a_collected_ring_outlives_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, ended = LateCopies(copy_s=0.05), list[bool]()
    monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
    synchronize = copies.synchronize
    monkeypatch.setattr(copies, "synchronize", lambda: ended.append(synchronize() is None))
    ring = DeviceLoader(Table(), torch.device("cuda"), **SIZES)
    next(ring)
    del ring
    gc.collect()
    for thread in loader_threads():
        thread.join(timeout=5)
    assert ended == [True], "the thread ended with copies on their way"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"depth": 0}, "depth must be an integer >= 1, got 0"),
        ({"workers": -1}, "workers must be an integer >= 0, got -1"),
        ({"microbatch_size": 5}, "global_batch_size must be a multiple"),
        ({"start_position": 12}, "start_position must be a multiple of .* = 24"),
        ({"rank": 1}, "rank must be below world_size"),
    ],
)
def test_bad_settings_are_named(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeviceLoader(Digits(), CPU, **SIZES | kwargs)
    assert not loader_threads()
