"""The loader: one stream of samples whatever the split into ranks, micro-batches and workers."""

import gc
import signal
import threading
import time

import pytest
import torch

from mixflow_fast.data import BatchLoader, Digits, ImageFolder, Photos, sample_index
from tests.support.datasets import collect, moments_dataset

sklearn_datasets = pytest.importorskip("sklearn.datasets")


DATASETS = {
    "photos": lambda folder: Photos(flip=True),
    "moments": moments_dataset,
}


@pytest.mark.parametrize("kind", DATASETS)
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize(("world_size", "microbatch_size"), [(1, 4), (2, 3), (3, 2), (12, 1)])
def test_every_split_gives_the_same_stream(tmp_path, kind, workers, world_size, microbatch_size):
    dataset = DATASETS[kind](tmp_path)
    common = {"seed": 7, "global_batch_size": 12, "start_position": 36}
    whole, order = collect(BatchLoader(dataset, microbatch_size=12, **common), 3)
    assert order == list(range(36, 72))
    union = {}
    for rank in range(world_size):
        loader = BatchLoader(
            dataset,
            microbatch_size=microbatch_size,
            rank=rank,
            world_size=world_size,
            num_workers=workers,
            **common,
        )
        part, order = collect(loader, 3)
        # The formula, written out as loops.
        assert order == [
            step * 12 + (micro * world_size + rank) * microbatch_size + i
            for step in range(3, 6)
            for micro in range(12 // (world_size * microbatch_size))
            for i in range(microbatch_size)
        ]
        assert not union.keys() & part.keys()
        union |= part
    assert union == whole


def test_batches_hold_the_samples_that_the_order_names():
    dataset = Digits(8, "all")
    loader = BatchLoader(dataset, seed=3, global_batch_size=599, microbatch_size=599)
    batches = [next(loader) for _ in range(4)]  # one epoch is three steps
    positions = torch.cat([batch.positions for batch in batches])
    index = sample_index(positions, 1797, 3)
    x = torch.cat([batch.x for batch in batches])
    raw = torch.from_numpy(sklearn_datasets.load_digits().images).float()
    assert torch.equal(x[:, 0], raw[index] / 8 - 1)
    assert sorted(index[:1797].tolist()) == list(range(1797))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_far_start_equals_skipping(workers):
    dataset = Photos(flip=True)
    common = {"seed": 1, "global_batch_size": 64, "microbatch_size": 32, "num_workers": workers}
    skipping = BatchLoader(dataset, **common)
    for _ in range(2 * 130):  # more than one block of the order
        next(skipping)
    assert skipping.position == 64 * 130
    started = BatchLoader(dataset, start_position=64 * 130, **common)
    assert started.position == 64 * 130
    assert collect(started, 2) == collect(skipping, 2)
    with BatchLoader(dataset, start_position=64 << 50, **common) as far:
        assert next(far).positions[0].item() == 64 << 50


def test_without_shuffle_samples_come_as_stored():
    loader = BatchLoader(
        Digits(8, "all"), seed=0, global_batch_size=8, microbatch_size=8, shuffle=False
    )
    assert next(loader).y.tolist() == sklearn_datasets.load_digits().target[:8].tolist()


def loader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mixflow_fast-loader")]


class Slow:
    """Digits that take time, count calls, and call `at` on a chosen position."""

    num_classes, shape, name = 10, (1, 8, 8), "slow"

    def __init__(self, delay, position=-1, at=None):
        self.digits, self.delay, self.position, self.at = Digits(), delay, position, at
        self.started = []

    def __len__(self):
        return len(self.digits)

    def get(self, indices, positions, seed):
        first = int(positions[0])
        self.started.append(first)
        time.sleep(self.delay(first))
        if first == self.position:
            self.at()
        return self.digits.get(indices, positions, seed)


def slow_loader(dataset, workers=3):
    return BatchLoader(dataset, seed=0, global_batch_size=4, microbatch_size=4, num_workers=workers)


def test_workers_keep_the_order_and_look_a_bounded_way_ahead():
    dataset = Slow(lambda first: 0.03 if first % 8 == 0 else 0.0)
    with slow_loader(dataset) as loader:
        firsts = [int(next(loader).positions[0]) for _ in range(12)]
        time.sleep(0.2)
        assert firsts == list(range(0, 48, 4))
        assert max(dataset.started) < 4 * (12 + 6)
    assert not loader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_stops_at_its_batch_with_its_name(image_folder, workers):
    (image_folder / "b_china" / "1.png").write_bytes(b"broken")
    dataset = ImageFolder(image_folder, 16)
    where = sample_index(torch.arange(6), 6, 0).tolist().index(4)
    loader = BatchLoader(
        dataset, seed=0, global_batch_size=1, microbatch_size=1, num_workers=workers
    )
    for _ in range(where):
        next(loader)
    with pytest.raises(ValueError, match=r"b_china.1\.png"):
        next(loader)
    assert not loader_threads()


def test_no_thread_is_left_after_an_interrupt():
    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.1)

    loader = slow_loader(Slow(lambda first: 0.0, position=8, at=interrupt))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(5):
            next(loader)
            time.sleep(0 if loader.position < 8 else 0.05)
        time.sleep(20)  # on a busy machine the signal comes late
    loader.close()
    # One that was being started when the signal came is not known to the pool, and ends by itself.
    for thread in loader_threads():
        thread.join(timeout=20)
    assert not loader_threads()


def test_no_thread_is_left_after_collection():
    loader = slow_loader(Slow(lambda first: 0.01))
    next(loader)
    assert loader_threads()
    del loader
    gc.collect()
    for thread in loader_threads():
        thread.join(timeout=5)
    assert not loader_threads()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_batch_size": 10}, r"global_batch_size must be a multiple of .* 4 \* 2 = 8"),
        (
            {"start_position": 12},
            "start_position must be a multiple of .* = 8, got 12.* starts at 8",
        ),
        ({"start_position": -8}, "start_position must be"),
        ({"rank": 2}, "rank must be below world_size = 2, got 2"),
        ({"microbatch_size": 0}, "microbatch_size must be"),
        ({"num_workers": -1}, "num_workers must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_loader_settings_are_named(kwargs, message):
    good = {"seed": 0, "global_batch_size": 8, "microbatch_size": 4, "world_size": 2}
    with pytest.raises(ValueError, match=message):
        BatchLoader(Digits(), **(good | kwargs))
