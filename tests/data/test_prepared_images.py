"""Prepared sets as training data: the same batches as the folder's, and damage by its name."""

import os
import threading

import numpy as np
import pytest
import torch

from mixflow_fast.data import ImageFolder, build_dataset
from mixflow_fast.data.dataset import mirrored, without_flips
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
from mixflow_fast.data.prepared_images import PreparedImages
from mixflow_fast.data.set_files import read_manifest, write_manifest
from tests.support.image_folders import write_folder

FORMATS = ("webp", "raw", "jpeg")
INDICES, POSITIONS = torch.arange(14), torch.arange(14) + 5_000_000_000


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The images, and a set of each format."""
    root = tmp_path_factory.mktemp("sets")
    source = list_source(write_folder(root / "images"))
    for image_format in FORMATS:
        prepare(source, root / image_format, Settings(32, image_format, shard_rows=4))
    return root


@pytest.fixture
def own(shared, tmp_path):
    """A set that a test may damage."""
    prepare(list_source(shared / "images"), tmp_path / "set", Settings(32, shard_rows=4))
    return tmp_path / "set"


@pytest.mark.parametrize("image_format", FORMATS)
def test_batches_are_those_of_the_folder(shared, image_format):
    folder = ImageFolder(shared / "images", 32).get(INDICES, POSITIONS, 7)
    dataset = build_dataset("images", path=shared / image_format)
    batch = dataset.get(INDICES, POSITIONS, 7)
    assert batch.x is None and batch.images.dtype == torch.uint8 and batch.images.is_contiguous()
    assert torch.equal(batch.y, folder.y) and torch.equal(batch.positions, POSITIONS)
    if image_format != "jpeg":
        assert torch.equal(batch.images, folder.images)
    flips = mirrored(POSITIONS, 7)
    plain = without_flips(dataset).get(INDICES, POSITIONS, 7).images
    assert 0 < flips.sum() < 14 and torch.equal(plain, dataset.pixels(INDICES))
    assert torch.equal(batch.images[flips], plain[flips].flip(-1))
    assert torch.equal(batch.images[~flips], plain[~flips])
    shuffled = torch.tensor([13, 0, 5, 5])
    assert torch.equal(dataset.get(shuffled, POSITIONS[:4], 7).y, batch.y[shuffled])


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_loaders_ask_for(shared, image_format):
    dataset = PreparedImages(shared / image_format, size=32)
    assert len(dataset) == 14 and dataset.shape == (3, 32, 32) and dataset.size == 32
    assert dataset.classes == ["a", "b"] and dataset.num_classes == 2 and not dataset.crops
    assert dataset.encoded == (image_format != "raw")
    assert dataset.labels(torch.tensor([0, 13])).tolist() == [0, 1]
    assert dataset.name_of(13) == f"image 13 (b/006.JPEG) in shard 00003 of {shared / image_format}"
    assert dataset.name == f"images-{image_format}-32"
    if image_format == "raw":
        with pytest.raises(ValueError, match="holds raw pixels"):
            dataset.payload(0)
    else:
        assert dataset.payload(3)[:4] == (
            b"RIFF" if image_format == "webp" else b"\xff\xd8\xff\xe0"
        )
    summary = dataset.summary()
    assert summary.describe() == "14 images, 2 classes, 3 x 32 x 32"
    assert summary.class_names == ("a", "b")
    assert ("JPEG: the pixels" in " ".join(summary.notes)) == (image_format == "jpeg")


def test_fingerprints_tell_sets_apart(shared, own):
    digests = {f: PreparedImages(shared / f).summary().digest for f in FORMATS}
    assert len(set(digests.values())) == 3
    os.rename(own, own.with_name("moved"))
    assert PreparedImages(own.with_name("moved")).summary().digest == digests["webp"]


@pytest.mark.parametrize("image_format", FORMATS)
def test_threads_read_the_same(shared, image_format):
    dataset = PreparedImages(shared / image_format, flip=False)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(dataset.pixels(INDICES)))
               for _ in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and all(torch.equal(images, found[0]) for images in found)


def test_a_forked_process_reads_the_same_files(shared):
    dataset = PreparedImages(shared / "webp")
    content = dataset.payload(9)  # the shard is open
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, b"same" if dataset.payload(9) == content else b"other")
        os._exit(0)
    assert os.read(reader, 99) == b"same" and dataset.payload(9) == content
    os.waitpid(child, 0)


def test_a_set_of_another_size_or_kind_is_refused(shared, own, tmp_path):
    with pytest.raises(
        ValueError, match="prepared at 32 pixels, asked for are 64: prepare .*--size 64"
    ):
        PreparedImages(own, size=64)
    with pytest.raises(ValueError, match="no manifest.json.*Class folders .* data.kind=folder"):
        PreparedImages(shared / "images")
    latents = tmp_path / "latents"
    latents.mkdir()
    write_manifest(latents, {"format": "mixflow-latents/1"})
    with pytest.raises(ValueError, match="'mixflow-latents/1', expected.*data.kind=latents"):
        PreparedImages(latents)
    (own / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match="is not complete: 4 of 4 shards are done; run the command"
    ):
        PreparedImages(own)


def test_damage_is_found_when_a_set_is_opened(own):
    with (own / "shards/00001.tar").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ValueError, match=r"shards/00001.tar has 1,000 bytes, expected 20,480"):
        PreparedImages(own)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, 9, "outside of the shards"),
        (1, 1 << 40, "outside"),
        (2, -1, "outside"),
        (3, 2, "label 2"),
    ],
)
def test_an_index_of_another_set_is_refused(own, column, value, words):
    index = np.load(own / "index.npy")
    index[3, column] = value
    np.save(own / "index.npy", index)
    with pytest.raises(ValueError, match=words):
        PreparedImages(own)
    np.save(own / "index.npy", index.astype(np.uint64))  # as many bytes
    with pytest.raises(ValueError, match=r"must be int64 \(14, 4\), got uint64"):
        PreparedImages(own)


def test_damage_inside_an_image_is_named(own):
    dataset = PreparedImages(own)
    shard, offset, count, _ = np.load(own / "index.npy")[6]
    with (own / f"shards/{shard:05d}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    with pytest.raises(ValueError, match=r"cannot read image 6 \(a/006.JPEG\) in shard 00001 of .*"
                                         r"verify"):  # fmt: skip
        dataset.get(torch.tensor([6]), torch.tensor([0]), 0)
    os.truncate(own / "shards/00003.tar", 600)
    with pytest.raises(ValueError, match="00003.tar ends at byte 600, .* more are expected"):
        dataset.get(torch.tensor([12]), torch.tensor([0]), 0)


def test_a_set_of_another_version_is_refused(own):
    manifest = read_manifest(own, "mixflow-images/1")
    write_manifest(own, {**manifest, "format": "mixflow-images/2"})
    with pytest.raises(ValueError, match="'mixflow-images/2', expected .*another version"):
        PreparedImages(own)
