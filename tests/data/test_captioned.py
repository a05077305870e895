"""Caches of captioned images as examples."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.data.bucket_order import BucketOrder
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.dataset import Batch, without_flips
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.prompts_store import PartInfo, PromptsStore
from mixflow_fast.data.set_files import write_manifest
from mixflow_fast.kernels.philox import Stream, uniform
from tests.support.caches import SD3_PARTS, latent_values, part_values, write_cache, write_prompts

BUCKETS = {"64x64": range(0, 9), "96x48": range(9, 16)}
CAPTIONS = (1, 2, 3, 1) * 4


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "c", CAPTIONS, BUCKETS, mirrors=2)


def positions(count: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + count)


def test_rows_of_prompts_are_those_that_were_stored(tmp_path: Path) -> None:
    parts = SD3_PARTS | {
        "ids": PartInfo((3,), "int32"),
        "mask": PartInfo((3,), "uint8"),
        "wide": PartInfo((2, 3), "float32"),
    }
    parts = {k: v for k, v in parts.items() if k not in ("ids", "mask")}
    store = PromptsStore(write_prompts(tmp_path / "p", 20, parts))
    rows = torch.tensor([19, 0, 6, 5, 6])
    taken = store.take(rows)
    assert taken.keys() == parts.keys()
    for name, part in parts.items():
        expected = part_values(name, part, 20)[rows]
        assert taken[name].dtype == expected.dtype and torch.equal(taken[name], expected)
    store.willneed(rows)


def test_tokens_keep_their_bits(tmp_path: Path) -> None:
    root = tmp_path / "p"
    write_prompts(root, 3, {"ids": PartInfo((4,), "int32")}, text="online")
    ids = PromptsStore(root).take(torch.tensor([2, 0]))["ids"]
    assert ids.dtype == torch.int32
    assert torch.equal(ids, part_values("ids", PartInfo((4,), "int32"), 3)[[2, 0]])


@pytest.mark.parametrize("rows", [torch.tensor([20]), torch.tensor([-1]), torch.tensor([1.0])])
def test_rows_that_are_not_there(tmp_path: Path, rows: torch.Tensor) -> None:
    store = PromptsStore(write_prompts(tmp_path / "p", 20))
    with pytest.raises(ValueError, match="rows must"):
        store.take(rows)


def test_an_example_has_its_latent_and_one_of_its_captions(cache: Path) -> None:
    data = CaptionedLatents(cache)
    assert data.shape == (16, 6, 12) and data.bucket_sizes == [9, 7] and len(data) == 16
    first = np.concatenate([[0], np.cumsum(CAPTIONS)])
    for index in range(16):
        at = positions(50, 1000 * index)
        batch = data.get(torch.full((50,), index), at, seed=5)
        flips = uniform(5, Stream.FLIP, at)[:, 0] < 0.5
        shape = (16, 8, 8) if index < 9 else (16, 6, 12)
        for row in range(50):
            expected = latent_values(index, int(flips[row]), shape)
            assert torch.equal(torch.cat([batch.x.mean[row], batch.x.std[row]]), expected)
        assert batch.x.scale == 1.5305
        rows = data.prompt_rows(torch.full((50,), index), at, 5)
        wanted = set(range(1 + first[index], 1 + first[index + 1]))
        assert set(rows.tolist()) == wanted
        for name, part in SD3_PARTS.items():
            values = part_values(name, part, 1 + sum(CAPTIONS))
            assert torch.equal(batch.cond[name], values[rows])


def test_captions_are_drawn_evenly_and_beside_everything_else(cache: Path) -> None:
    data = CaptionedLatents(cache)
    at = positions(30_000)
    rows = data.prompt_rows(torch.full((30_000,), 2), at, 0)  # rows 4, 5, 6
    counts = torch.bincount(rows, minlength=7)[4:].double()
    assert ((counts - 10_000).abs() < 4 * (30_000 * 2 / 9) ** 0.5).all()
    dropped = CaptionedLatents(cache, drop=0.25)
    with_drop = dropped.prompt_rows(torch.full((30_000,), 2), at, 0)
    kept = with_drop != 0
    assert (~kept).double().mean() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(with_drop[kept], rows[kept])
    # Which caption it was does not tell whether it is dropped.
    for row in (4, 5, 6):
        assert (~kept)[rows == row].double().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropped.without_drop().prompt_rows(torch.full((30_000,), 2), at, 0), rows)
    batch = dropped.get(torch.full((8,), 2), at[:8], 0)
    empty = part_values("t5", SD3_PARTS["t5"], 1)[0]
    for row in range(8):
        assert torch.equal(batch.cond["t5"][row], empty) == (not kept[row])


def test_get_is_a_function_of_the_position(cache: Path) -> None:
    data = CaptionedLatents(cache, drop=0.5)
    order = BucketOrder(data.bucket_sizes, seed=1, global_batch_size=4)
    at = positions(4, 40)
    whole = data.get(order(at), at, 1)
    for row in range(4):
        one = data.get(order(at)[row : row + 1], at[row : row + 1], 1)
        for whole_part, part in zip(whole.buffers(), one.buffers(), strict=True):
            assert torch.equal(whole_part[row : row + 1], part)


def test_samples_of_two_buckets_are_no_batch(cache: Path) -> None:
    with pytest.raises(ValueError, match="of one bucket, got 64x64, 96x48"):
        CaptionedLatents(cache).get(torch.tensor([0, 12]), positions(2), 0)


def test_buckets_and_mirrors_can_be_chosen(cache: Path) -> None:
    data = CaptionedLatents(cache, buckets=["96x48"], mirrors=1)
    assert len(data) == 7 and data.shape == (16, 6, 12) and not data.flip
    batch = data.get(torch.tensor([3]), positions(1), 0)
    assert torch.equal(batch.x.mean[0], latent_values(12, 0, (16, 6, 12))[:16])
    assert not without_flips(CaptionedLatents(cache)).flip
    with pytest.raises(ValueError, match="did you mean '96x48'"):
        CaptionedLatents(cache, buckets=["96x49"])
    with pytest.raises(ValueError, match="in \\[0, 1\\), got 1.5"):
        CaptionedLatents(cache, drop=1.5)


def test_mirrors_that_are_not_stored(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c")
    assert not CaptionedLatents(cache).flip
    with pytest.raises(ValueError, match="encode with --mirrors 2"):
        CaptionedLatents(cache, mirrors=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_ring_gives_batches_of_each_shape_in_the_order(cache: Path, workers: int) -> None:
    data = CaptionedLatents(cache, drop=0.3)
    options = dict(seed=2, global_batch_size=8, microbatch_size=4)
    order = BucketOrder(data.bucket_sizes, seed=2, global_batch_size=8)
    shapes = set()
    examples = LabelDropout(data, 0.0, None)
    device = torch.device("cpu")
    with DeviceLoader(examples, device, workers=workers, poison=True, **options) as loader:
        memory = {}
        for microstep in range(60):
            batch = next(loader)
            at = positions(4, 4 * microstep)
            expected = data.get(order(at), at, 2)
            for found, wanted in zip(batch.buffers(), expected.buffers(), strict=True):
                assert torch.equal(found, wanted)
            shapes.add(tuple(batch.x.mean.shape[1:]))
            memory[batch.cond["t5"].data_ptr()] = True
    assert shapes == {(16, 8, 8), (16, 6, 12)}
    assert len(memory) <= 3  # no memory but that of the ring


def test_a_resumed_stream_is_the_same(cache: Path) -> None:
    data = LabelDropout(CaptionedLatents(cache), 0.0, None)
    options = dict(seed=2, global_batch_size=4, microbatch_size=4, workers=0)
    device = torch.device("cpu")
    with DeviceLoader(data, device, **options) as loader:
        batches = [next(loader).map(torch.clone) for _ in range(12)]
    with DeviceLoader(data, device, start_position=28, **options) as loader:
        for batch in batches[7:]:
            again: Batch = next(loader)
            for one, other in zip(batch.buffers(), again.buffers(), strict=True):
                assert torch.equal(one, other)


def test_summary_tells_caches_apart(tmp_path: Path, cache: Path) -> None:
    one = CaptionedLatents(cache).summary()
    assert one.describe().startswith("16 captioned latents")
    assert "28 captions, 29 different prompts (embeddings" in one.notes[0]
    assert one.digest == CaptionedLatents(cache, drop=0.1).summary().digest
    assert one.digest != CaptionedLatents(cache, mirrors=1).summary().digest
    assert one.digest != CaptionedLatents(cache, buckets=["64x64"]).summary().digest
    other = write_cache(tmp_path / "other", CAPTIONS[::-1], BUCKETS, mirrors=2)
    assert one.digest != CaptionedLatents(other).summary().digest


def edit(file: Path, **changes: object) -> None:
    """A manifest with other values and a checksum that fits."""
    record = json.loads(file.read_text())
    record.pop("checksum")
    write_manifest(file.parent, record | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda c: (c / "prompts/manifest.json").unlink(), "holds no manifest.json"),
        (lambda c: (c / "prompts/shards/00001/t5.npy").unlink(), "t5.npy cannot be read"),
        (lambda c: (c / "items/first.npy").unlink(), "items/first.npy cannot be read"),
        (lambda c: (c / "latents/64x64/moments/00000.npy").write_bytes(b"x"), "has 1 bytes"),
        (lambda c: edit(c / "manifest.json", items=17), "must be \\(18,\\) int64"),
        (lambda c: edit(c / "manifest.json", format="mixflow-captioned/2"), "another version"),
        (lambda c: edit(c / "manifest.json", text="later"), "does not describe a cache"),
        (lambda c: edit(c / "prompts/manifest.json", count=18), "18 prompts, 17 rows of part"),
        (lambda c: edit(c / "latents/64x64/manifest.json", kind="sample"), "must be 16 moments"),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_refused(tmp_path: Path, damage, message: str) -> None:
    cache = write_cache(tmp_path / "c")
    CaptionedLatents(cache)
    damage(cache)
    with pytest.raises(ValueError, match=message):
        CaptionedLatents(cache)


def test_images_without_a_caption_are_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c", captions=(1, 0, 2))
    with pytest.raises(ValueError, match="images without a caption"):
        CaptionedLatents(cache)
