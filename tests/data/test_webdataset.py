"""webdataset's shards, written by its own writer, as training data."""

import gzip
import io
import json
import os
import tarfile

import pytest
import torch

from mixflow_fast.data import ImageFolder, build_dataset
from mixflow_fast.data.webdataset import INDEX, WebDataset
from tests.support.image_folders import bad_images, encoded, smooth, write_folder

INDICES, POSITIONS = torch.arange(14), torch.arange(14) + 77


@pytest.fixture
def folder(tmp_path):
    return ImageFolder(write_folder(tmp_path / "images"), 32)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write(path, samples, tar_format=tarfile.GNU_FORMAT):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in samples:
            add(archive, name, content)
    return path


@pytest.fixture
def shards(folder, tmp_path):
    """Two shards by webdataset's writer, in its order; labels as .cls."""
    webdataset = pytest.importorskip("webdataset")
    pattern = str(tmp_path / "shards/%02d.tar")
    os.mkdir(tmp_path / "shards")
    with webdataset.ShardWriter(pattern, maxcount=9, verbose=0) as sink:
        for number, file in enumerate(folder.files):
            content = open(file, "rb").read()
            label = int(folder.labels(torch.tensor([number])))
            sink.write({"__key__": f"{number:06d}", "jpg": content, "cls": label})
    return tmp_path / "shards"


def test_batches_are_those_of_the_folder(folder, shards):
    truth = folder.get(INDICES, POSITIONS, 3)
    dataset = build_dataset("webdataset", path=shards, size=32)
    for _ in range(2):  # the second time by the index that the first has left
        batch = dataset.get(INDICES, POSITIONS, 3)
        assert batch.x is None and torch.equal(batch.images, truth.images)
        assert torch.equal(batch.y, truth.y) and dataset.num_classes == 2
        assert dataset.payload(9) == open(folder.files[9], "rb").read()
        assert dataset.encoded and dataset.crops and dataset.size == 32
        assert dataset.name_of(9) == f"000009.jpg in {shards / '01.tar'}"
        digest = dataset.summary().digest
        assert (shards / INDEX).is_file()
        dataset = WebDataset(shards, 32)
        assert dataset.summary().digest == digest
    assert len(WebDataset(shards / "00.tar", 32)) == 9


def test_the_index_follows_the_shards(folder, shards):
    WebDataset(shards, 32)
    (shards / INDEX).write_bytes(b"damaged")
    assert len(WebDataset(shards, 32)) == 14
    write(shards / "02.tar", [("x.png", encoded(smooth(40, 40, 1), "PNG")), ("x.cls", b"5")])
    dataset = WebDataset(shards, 32)
    assert len(dataset) == 15 and dataset.num_classes == 6
    assert [p.name for p in shards.glob(".*")] == [INDEX]  # no rests


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_all_layouts_of_members(tmp_path, tar_format):
    """Folders, names too long for a header, other members, labels in .json, capital suffixes."""
    picture, long = encoded(smooth(40, 40, 1), "PNG"), "n" * 60 + "/" + "k" * 90
    samples = [
        ("train/1.PNG", picture),
        ("train/1.json", json.dumps({"label": 7, "text": "a cat"}).encode()),
        ("README", b"no sample"),
        ("train/2.txt", b"a sample without an image"),
        ("train/2.cls", b"3"),
        (f"{long}.cls", b" 4\n"),
        (f"{long}.png", picture),
        ("other/1.png", picture),  # another sample than train/1
        ("other/1.cls", b"0"),
    ]
    dataset = WebDataset(write(tmp_path / "s.tar", samples, tar_format), 32)
    assert dataset.labels(torch.arange(3)).tolist() == [7, 4, 0]
    assert all(dataset.payload(index) == picture for index in range(3))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ([("1.jpg", b"x")], "1.jpg in .*s.tar has no label: expected 1.cls with an integer"),
        ([("1.jpg", b"x"), ("1.cls", b"cat")], "has no label"),
        ([("1.jpg", b"x"), ("1.cls", b"-1")], "has no label"),
        ([("1.jpg", b"x"), ("1.json", b'{"label": true}')], "has no label"),
        ([("1.jpg", b"x"), ("1.json", b"[]")], "has no label"),
        ([("1.jpg", b""), ("2.cls", b"1")], "1.jpg in .* has no label"),
        ([("1.jpg", b"x"), ("1.png", b"x"), ("1.cls", b"1")], "two images for one sample"),
        ([("1.txt", b"x")], "no image .* is in the shards"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path, samples, words):
    with pytest.raises(ValueError, match=words):
        WebDataset(write(tmp_path / "s.tar", samples), 32)


def test_compressed_damaged_and_missing_shards(tmp_path):
    shard = write(tmp_path / "s/1.tar", [("1.jpg", b"x" * 3000), ("1.cls", b"1")])
    (tmp_path / "z").mkdir()
    (tmp_path / "z/1.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"compressed archives \(1.tar.gz\).*unpack them to .tar"):
        WebDataset(tmp_path / "z", 32)
    (tmp_path / "z/1.tar").write_bytes(gzip.compress(shard.read_bytes()))  # by another name
    with pytest.raises(ValueError, match="cannot read the shard .*z/1.tar.*Compressed"):
        WebDataset(tmp_path / "z", 32)
    os.truncate(shard, 2000)
    with pytest.raises(ValueError, match="cannot read the shard .*s/1.tar"):
        WebDataset(shard, 32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no .tar shard .*: give the folder of the shards"):
        WebDataset(tmp_path / "empty", 32)


@pytest.mark.parametrize("name", ["02.tar.gz", "02.TGZ"])
def test_a_shard_that_was_not_unpacked_is_not_passed_over(shards, name):
    (shards / name).write_bytes(gzip.compress((shards / "01.tar").read_bytes()))
    with pytest.raises(ValueError, match=rf"compressed archives \({name}\).*unpack them to .tar"):
        WebDataset(shards, 32)
    (shards / name).rename(shards / name.replace("02", "01"))  # one that was, may stay
    assert len(WebDataset(shards, 32)) == 14


def test_a_bad_image_is_named(tmp_path):
    for kind in ("noise", "half", "animated"):
        content, reason = bad_images()[kind]
        dataset = WebDataset(write(tmp_path / "s.tar", [("7.jpg", content), ("7.cls", b"1")]), 32)
        with pytest.raises(ValueError, match=f"7.jpg in .*s.tar: .*{reason}"):
            dataset.get(torch.tensor([0]), torch.tensor([0]), 0)


def test_a_folder_that_may_not_be_written(shards, monkeypatch):
    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert len(WebDataset(shards, 32)) == 14 and not (shards / INDEX).exists()
