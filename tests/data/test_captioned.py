"""Caches of captioned images as examples."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mixflow_fast.data import BatchLoader, device_loader
from mixflow_fast.data.bucket_order import BucketOrder
from mixflow_fast.data.captioned import CaptionedLatents
from mixflow_fast.data.dali import choose_loader, dali_problem
from mixflow_fast.data.dataset import Batch, fill, without_flips
from mixflow_fast.data.device_loader import DeviceLoader
from mixflow_fast.data.label_dropout import LabelDropout
from mixflow_fast.data.prompts_store import PartInfo, PromptsStore
from mixflow_fast.data.resident import Resident
from mixflow_fast.data.set_files import file_record, write_manifest
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.kernels.philox import Stream, uniform
from tests.support.caches import SD3_PARTS, latent_values, part_values, write_cache, write_prompts
from tests.support.late_copies import LateCopies

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
    assert "28 captions, 29 different prompts with the empty one (embeddings" in one.notes[0]
    assert "class" not in one.describe() and one.to_record()["classes"] == 0
    assert one.digest == CaptionedLatents(cache, drop=0.1).summary().digest
    assert one.digest != CaptionedLatents(cache, mirrors=1).summary().digest
    assert one.digest != CaptionedLatents(cache, buckets=["64x64"]).summary().digest
    other = write_cache(tmp_path / "other", CAPTIONS[::-1], BUCKETS, mirrors=2)
    assert one.digest != CaptionedLatents(other).summary().digest


def edit(cache: Path, folder: str, **changes: object) -> None:
    """A manifest with other values and a checksum that fits, listed as it is then."""
    record = json.loads((cache / folder / "manifest.json").read_text())
    record.pop("checksum")
    write_manifest(cache / folder, record | changes)
    if folder:
        record = json.loads((cache / "manifest.json").read_text())
        edit(cache, "", files=[file_record(cache, f["file"]) for f in record["files"]])


def test_latents_of_other_images_are_another_cache(tmp_path: Path) -> None:
    """The same latents and captions, two of them the other way round."""
    cache = write_cache(tmp_path / "c")
    before = CaptionedLatents(cache).summary().digest
    order = np.arange(16)
    order[[3, 4]] = order[[4, 3]]
    np.save(cache / "latents/64x64/source.npy", order)
    manifest = json.loads((cache / "latents/64x64/manifest.json").read_text())
    files = [file_record(cache / "latents/64x64", f["file"]) for f in manifest["files"]]
    edit(cache, "latents/64x64", files=files)
    data = CaptionedLatents(cache)
    assert data.prompt_rows(torch.tensor([3, 4]), positions(2), 0).tolist() == [5, 4]
    assert data.summary().digest != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "manifest.json").unlink(), "holds no manifest.json"),
        (lambda c: (c / "prompts/manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda c: (c / "prompts/shards/00001/t5.npy").unlink(), "t5.npy cannot be read"),
        (lambda c: (c / "items/first.npy").unlink(), "items/first.npy cannot be read"),
        (lambda c: (c / "latents/64x64/moments/00000.npy").write_bytes(b"x"), "has 1 bytes"),
        (lambda c: edit(c, "", items=17), "must be \\(18,\\) int64"),
        (lambda c: edit(c, "", format="mixflow-captioned/2"), "another version"),
        (lambda c: edit(c, "", text="later"), "does not describe a cache"),
        (lambda c: edit(c, "prompts", count=18), "18 prompts, 17 rows of part"),
        (lambda c: edit(c, "latents/64x64", kind="sample"), "must be 16 moments"),
        (lambda c: edit(c, "latents/64x64", count=15), "15 samples of 1 rows, 16 rows"),
        (lambda c: edit(c, "prompts", length=77), "has length 77, the cache's manifest says 7"),
        (lambda c: edit(c, "prompts", class_name="Flux"), "has class_name 'Flux', the cache's"),
        (lambda c: edit(c, "prompts", text="online"), "has text 'online', the cache's manifest"),
        (lambda c: edit(c, "", prompts=18), "has count 17, the cache's manifest says 18"),
    ],
)  # fmt: skip
def test_a_damaged_cache_is_refused(tmp_path: Path, damage, message: str) -> None:
    cache = write_cache(tmp_path / "c")
    CaptionedLatents(cache)
    damage(cache)
    with pytest.raises(ValueError, match=message):
        CaptionedLatents(cache)


def test_the_first_prompt_must_be_the_empty_one(tmp_path: Path) -> None:
    root = write_prompts(tmp_path / "p", 5)
    lines = (root / "prompts.jsonl").read_text().splitlines()
    (root / "prompts.jsonl").write_text("\n".join([lines[1].replace("1", "0", 1), *lines[1:]]))
    edit(root, "", files=[file_record(root, "prompts.jsonl")])
    with pytest.raises(
        ValueError, match="must begin with the empty prompt as row 0, got row 0, 'p"
    ):
        PromptsStore(root)


def test_images_without_a_caption_are_refused(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "c", captions=(1, 0, 2))
    with pytest.raises(ValueError, match="images without a caption"):
        CaptionedLatents(cache)


@pytest.mark.parametrize("seed", range(2))
def test_slots_of_two_shapes_stay_whole_on_a_device_that_is_behind(
    cache: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Batches of both shapes lie in the same memory: none is written while another is read."""
    copies = LateCopies(seed=seed)
    monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
    data = CaptionedLatents(cache, drop=0.3)
    options = dict(seed=4, global_batch_size=8, microbatch_size=4)
    seen: list[Batch] = []
    with (
        BatchLoader(data, **options) as plain,
        DeviceLoader(data, torch.device("cuda"), depth=2, poison=True, **options) as ring,
    ):
        expected = [next(plain) for _ in range(24)]
        for _ in range(24):
            batch = next(ring)
            allocated = copies.allocated
            # Behind the poison of the batch before, as a training step would be.
            copies.training.queue(lambda batch=batch: seen.append(batch.map(torch.clone)))
            copies.training.synchronize()
        assert copies.allocated == allocated
    assert len({tuple(batch.x.mean.shape) for batch in seen}) == 2
    for found, wanted in zip(seen, expected, strict=True):
        for one, other in zip(found.buffers(), wanted.buffers(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("late", [(0.0, 0.01), (0.01, 0.0)])
def test_a_ring_of_two_shapes_with_nothing_waited_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, late: tuple[float, float]
) -> None:
    """As above without a wait of the host, for the training's stream is far behind or ahead."""
    copies = LateCopies(*late)
    monkeypatch.setattr(device_loader, "CopyStream", lambda device: copies)
    data, options = CaptionedLatents(cache), dict(seed=4, global_batch_size=4, microbatch_size=4)
    seen: list[Batch] = []
    with (
        BatchLoader(data, **options) as plain,
        DeviceLoader(data, torch.device("cuda"), depth=2, **options) as ring,
    ):
        expected = [next(plain) for _ in range(24)]
        for _ in range(24):
            batch = next(ring)
            copies.training.queue(lambda batch=batch: seen.append(batch.map(torch.clone)))
        copies.training.synchronize()
    for found, wanted in zip(seen, expected, strict=True):
        for one, other in zip(found.buffers(), wanted.buffers(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 4), (2, 4), (4, 2), (2, 1)])
def test_ranks_and_micro_batches_split_one_stream(cache: Path, ranks: int, micro: int) -> None:
    """Latents, captions, drops and mirrors of a position do not depend on who makes it."""
    data = CaptionedLatents(cache, drop=0.4)
    common = dict(seed=9, global_batch_size=8, start_position=8 * 4090)  # into the next cycle
    with BatchLoader(data, microbatch_size=8, **common) as plain:
        whole = [next(plain) for _ in range(12)]
    found: dict[int, list[torch.Tensor]] = {}
    for rank in range(ranks):
        options = dict(microbatch_size=micro, rank=rank, world_size=ranks, workers=1)
        with DeviceLoader(data, torch.device("cpu"), **common, **options) as ring:
            for _ in range(12 * ring.microsteps):
                batch = next(ring)
                for row, position in enumerate(batch.positions.tolist()):
                    found[position] = [value[row].clone() for value in batch.buffers()]
    assert sorted(found) == list(range(8 * 4090, 8 * 4102))
    for batch in whole:
        for row, position in enumerate(batch.positions.tolist()):
            for one, other in zip(batch.buffers(), found[position], strict=True):
                assert torch.equal(one[row], other)


def test_draws_of_a_position_are_independent() -> None:
    """Counts of a 2 x 2 x 3 table of mirror, drop and caption, against their product."""
    at = positions(60_000)
    mirror = uniform(3, Stream.FLIP, at)[:, 0] < 0.5
    drop = uniform(3, Stream.PROMPT_DROP, at)[:, 0] < 0.2
    caption = (uniform(3, Stream.CAPTION_CHOICE, at)[:, 0] * 3).long()
    label = uniform(3, Stream.LABEL_DROPOUT, at)[:, 0] < 0.2
    for other, share in ((mirror, 0.5), (label, 0.2)):
        for number in range(3):
            joint = (other & drop & (caption == number)).double().sum()
            expected = 60_000 * share * 0.2 / 3
            assert abs(joint - expected) < 4.5 * expected**0.5


def test_memory_that_is_no_buffer_of_both_halves_is_filled_too(cache: Path) -> None:
    data = CaptionedLatents(cache, drop=0.3)
    at, indices = positions(4), torch.tensor([0, 3, 5, 8])
    made = data.get(indices, at, 2)
    out = made.map(torch.zeros_like)
    halves = Moments(out.x.mean.clone(), out.x.std.clone(), out.x.scale)
    out = replace(out, x=halves)
    fill(data, out, indices, at, 2)
    assert torch.equal(out.x.mean, made.x.mean) and torch.equal(out.x.std, made.x.std)
    assert torch.equal(out.cond["t5"], made.cond["t5"]) and torch.equal(out.positions, at)


def test_latents_cannot_lie_on_the_device(cache: Path) -> None:
    data = CaptionedLatents(cache)
    with pytest.raises(ValueError, match="captioned-c is no set of moments"):
        Resident(data, torch.device("cpu"))
    assert choose_loader("auto", data, torch.device("cuda")) == "threads"
    assert "captioned-c holds none" in dali_problem(data)


def test_statistics_are_those_of_all_numbers(cache: Path) -> None:
    """Against numpy on all rows: fewer samples than are looked at."""
    data = CaptionedLatents(cache)
    found = data.statistics()
    assert found.examples == 16 and found.scale == 1.5305
    values = []
    for index in range(16):
        shape = (16, 8, 8) if index < 9 else (16, 6, 12)
        values.append(latent_values(index, 0, shape).float().numpy()[:16].ravel())
    values = np.concatenate(values)
    # The draw of the posterior adds noise of std 0.1 to 0.2 to means of std 1.
    assert found.mean == pytest.approx(1.5305 * values.mean(), abs=0.02)
    assert found.std == pytest.approx(1.5305 * np.sqrt(values.var() + 0.0233), rel=0.01)


def test_latents_of_two_autoencoders_are_refused(tmp_path: Path) -> None:
    one = write_cache(tmp_path / "c", buckets={"64x64": range(9), "96x48": range(9, 16)})
    other = write_cache(tmp_path / "d", buckets={"96x48": range(9, 16)}, scale=0.3611)
    shutil.rmtree(one / "latents/96x48")
    shutil.copytree(other / "latents/96x48", one / "latents/96x48")
    edit(one, "latents/96x48")  # lists it as it is
    with pytest.raises(ValueError, match=r"scale 0\.3611.* has 16, 1\.5305, .*one autoencoder"):
        CaptionedLatents(one)
    assert len(CaptionedLatents(one, buckets=["64x64"])) == 9


def test_what_is_no_cache_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no cache of captioned images; make one with"):
        CaptionedLatents(tmp_path)
