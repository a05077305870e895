"""The DALI loader: the examples of `BatchLoader`, from DALI's own CPU pipelines."""

from __future__ import annotations

import gc
import io
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.cli import main
from mixflow_fast.data import Batch, BatchLoader, Digits, ImageFolder, dali
from mixflow_fast.data.dali import DECODER, DaliLoader, build_pipeline, choose_loader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.prepared_images import PreparedImages
from tests.support.encoded_images import (
    encoded,
    odd_files,
    photos,
    plain_files,
    turned,
    write_folder,
    write_prepared,
)

SIDE = 32
ORDER = {"seed": 3, "global_batch_size": 16, "microbatch_size": 4}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def prepared_set(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    images = write_prepared(root / "images", 40, SIDE)
    arguments = ["data", "prepare", str(images), "--size", str(SIDE), "--classes", "folder"]
    for image_format in ("webp", "raw"):
        out = str(root / image_format)
        assert main([*arguments, "--format", image_format, "--out", out]) == 0
    return root


@pytest.fixture
def prepared(prepared_set):
    return PreparedImages(prepared_set / "webp")


def reader_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mixflow_fast-reader")]


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("positions", "y", "images"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for batch in (one, other):  # a folder gives both, and a run takes the bytes
        assert batch.x is None or torch.equal(batch.x, batch.images.float() / 127.5 - 1)


def decode(content: bytes, decoder: dict[str, bool]) -> np.ndarray:
    def source():
        return [np.frombuffer(content, np.uint8)], [np.int64(5)], [np.int32(0)]

    images, numbers = build_pipeline(source, 1, 1, CPU, None, decoder).run()
    assert int(numbers.at(0)) == 5
    return np.array(images.at(0))


WINDOW = photos()[0].crop((100, 100, 251, 213))


@pytest.mark.parametrize("kind", plain_files(WINDOW))
def test_dali_decodes_to_the_bits_of_pillow(kind):
    content = plain_files(WINDOW)[kind]
    truth = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode(content, DECODER), truth)


@pytest.mark.parametrize("option", ["adjust_orientation", "use_fast_idct"])
def test_the_decoders_options_are_needed(option):
    content = encoded(WINDOW, "JPEG", quality=90, exif=turned())
    truth = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    other = decode(content, DECODER | {option: True})
    assert not np.array_equal(other, truth)
    assert (other.shape == truth.shape) == (option == "use_fast_idct")


@pytest.mark.parametrize("start", [0, 16 * 3_000_000_000])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_prepared_images_are_the_same_on_any_number_of_ranks(prepared, ranks, start):
    """Ids, labels, flips and pixels, against the loader of one rank that decodes by Pillow."""
    dataset = LabelDropout(prepared, 0.3, 2)
    whole = {}
    with BatchLoader(dataset, start_position=start, **ORDER) as loader:
        for _ in range(3 * loader.microsteps):
            batch = next(loader)
            for row, position in enumerate(batch.positions.tolist()):
                whole[position] = (int(batch.y[row]), batch.images[row])
    assert min(whole) == start and {y for y, _ in whole.values()} == {0, 1, 2}
    seen = set()
    for rank in range(ranks):
        options = dict(rank=rank, world_size=ranks, start_position=start, **ORDER)
        with DaliLoader(dataset, **options) as loader:
            assert loader.microsteps == 4 // ranks and loader.position == start
            for _ in range(3 * loader.microsteps):
                batch = next(loader)
                assert batch.images.is_contiguous() and batch.images.dtype == torch.uint8
                for row, position in enumerate(batch.positions.tolist()):
                    label, image = whole[position]
                    assert int(batch.y[row]) == label
                    assert torch.equal(batch.images[row], image)
                    seen.add(position)
            assert loader.position == start + 3 * 16
    assert seen == whole.keys()


def test_a_start_equals_running_there(prepared):
    with DaliLoader(prepared, **ORDER) as running:
        for _ in range(2 * running.microsteps):
            next(running)
        with DaliLoader(prepared, start_position=32, **ORDER) as started:
            for _ in range(3):
                assert_same(next(running), next(started))


def test_a_far_start_costs_what_a_near_one_costs(prepared):
    seconds = []
    for start in (0, 48_000_000_000):
        begin = time.perf_counter()
        with DaliLoader(prepared, start_position=start, **ORDER) as loader:
            assert next(loader).positions[0] == start
        seconds.append(time.perf_counter() - begin)
    assert seconds[1] < 10 * seconds[0] + 1


def test_raw_images_of_every_kind_differ_by_rounding_alone(tmp_path):
    files = plain_files(WINDOW) | odd_files(WINDOW)
    dataset = ImageFolder(write_folder(tmp_path, files), 32)
    options = dict(seed=1, global_batch_size=len(files), microbatch_size=len(files))
    with BatchLoader(dataset, **options) as threads, DaliLoader(dataset, **options) as loader:
        one, other = next(threads), next(loader)
    assert torch.equal(one.positions, other.positions) and torch.equal(one.y, other.y)
    off = (one.images.int() - other.images.int()).abs().flatten(1)
    assert off.float().mean(1).max() < 0.1 and off.max() <= 8, off.float().mean(1)
    # A flip that one of the two did not do would be far outside.
    assert (one.images.flip(-1).int() - other.images.int()).abs().float().mean() > 5


def test_a_shifted_feed_is_caught(prepared):
    loader = DaliLoader(prepared, **ORDER)
    next(loader)
    loader._reading.popleft()  # a micro-batch that was ordered never reaches DALI
    with pytest.raises(RuntimeError, match=r"positions \[\d+, .* shifted"):
        for _ in range(6):
            next(loader)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


@pytest.mark.parametrize("zero_copy", [False, True])
def test_kept_batches_stay_as_they_are(prepared, zero_copy):
    with DaliLoader(prepared, zero_copy=zero_copy, **ORDER) as loader:
        kept = [next(loader) for _ in range(10)]
        bits = [batch.images.clone() for batch in kept]
        for _ in range(10):
            next(loader)
        for batch, copy in zip(kept, bits, strict=True):
            assert torch.equal(batch.images, copy)
            assert batch.images.is_contiguous() is not zero_copy
        with BatchLoader(prepared, **ORDER) as truth:
            for batch in kept:
                assert_same(batch, next(truth))


@pytest.mark.parametrize("cut", [0, 300])
def test_a_damaged_file_is_named_and_ends_the_loader(tmp_path, cut):
    """Files that need a crop are opened before DALI sees them; prepared ones are not."""
    write_folder(tmp_path, {f"jpeg {n}": encoded(WINDOW, "JPEG") for n in range(24)})
    file = tmp_path / "class1" / "005 jpeg 5.jpg"
    file.write_bytes(file.read_bytes()[:-cut] if cut else b"")
    dataset = ImageFolder(tmp_path, 113)
    dataset.crops = cut == 0
    before = []
    for kind in (BatchLoader, DaliLoader):
        loader, given = kind(dataset, **ORDER), 0
        named = r" \(sample 14, at position \d+\)" * (kind is DaliLoader)
        with pytest.raises(ValueError, match=r"005 jpeg 5\.jpg'" + named):
            for given in range(9):  # noqa: B007
                next(loader)
        before.append(given)
    # Not earlier: what DALI has ahead is trained on first.
    assert before[0] == before[1] >= 2
    assert not reader_threads()
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_an_error_that_no_file_explains_says_so(prepared, monkeypatch):
    monkeypatch.setattr(dali, "check_by_pillow", lambda dataset, feed: None)
    monkeypatch.setattr(type(prepared), "payload", lambda self, index: b"damaged")
    with pytest.raises(RuntimeError, match="position 0 .*data.loader=threads goes on"):
        next(DaliLoader(prepared, **ORDER))


def test_a_loader_that_is_dropped_leaves_nothing(prepared):
    loader = DaliLoader(prepared, **ORDER)
    next(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    for _ in range(50):
        if not reader_threads():
            break
        time.sleep(0.02)
    assert not reader_threads()


def test_which_loader_is_chosen(prepared, prepared_set, monkeypatch):
    raw = PreparedImages(prepared_set / "raw")
    assert choose_loader("auto", prepared, CPU) == "threads"
    assert choose_loader("dali", prepared, CPU) == "dali"
    assert choose_loader("auto", prepared, GPU) == "dali"
    assert choose_loader("auto", LabelDropout(prepared, 0.1, 9), GPU) == "dali"
    assert choose_loader("threads", prepared, GPU) == "threads"
    assert choose_loader("auto", raw, GPU) == "threads"
    assert choose_loader("auto", LabelDropout(Digits(8), 0.1, 10), GPU) == "threads"
    with pytest.raises(ValueError, match="holds none; or set data.loader=auto"):
        choose_loader("dali", Digits(8), GPU)
    with pytest.raises(ValueError, match="raw pixels"):
        choose_loader("dali", raw, GPU)
    monkeypatch.setattr(dali, "is_installed", lambda: False)
    assert choose_loader("auto", prepared, GPU) == "threads"
    with pytest.raises(ValueError, match=r'pip install "mixflow_fast\[gpu\]"'):
        choose_loader("dali", prepared, GPU)
    with pytest.raises(ValueError, match=r"mixflow_fast\[gpu\]"):
        DaliLoader(prepared, **ORDER)
