"""Shards by readers that nobody here wrote: tarfile, webdataset, numpy, Pillow."""

import io
import mmap
import tarfile

import numpy as np
import pytest
from PIL import Image

from mixflow_fast.data.preparation.formats import FORMATS, Shard, encode, payload_offsets
from tests.support.image_folders import smooth

SIZE, LABELS, NUMBERS = 48, [3, 0, 999, 12], [4, 5, 9, 120]
PIXELS = [np.asarray(smooth(SIZE, SIZE, seed)) for seed in range(4)]


def write(path, image_format):
    with Shard(path, image_format, SIZE) as shard:
        for number, label, pixels in zip(NUMBERS, LABELS, PIXELS, strict=True):
            shard.add(number, label, encode(pixels, image_format))
    assert shard.rows == 4
    return shard.sizes


@pytest.mark.parametrize("image_format", ["webp", "png", "jpeg"])
def test_images_are_what_was_given(image_format):
    for pixels in PIXELS:
        stored = Image.open(io.BytesIO(encode(pixels, image_format)))
        assert stored.size == (SIZE, SIZE) and stored.mode == "RGB"
        assert not stored.getexif() and "icc_profile" not in stored.info
        error = np.abs(np.asarray(stored).astype(int) - pixels)
        assert error.max() == 0 or (image_format == "jpeg" and 0 < error.mean() < 2)
        if image_format == "jpeg":  # 4:4:4: every component has the full resolution
            assert [component[1:3] for component in stored.layer] == [(1, 1)] * 3


@pytest.mark.parametrize(("image_format", "suffix"), [("webp", "webp"), ("jpeg", "jpg")])
def test_tar_shards_are_read_by_tarfile_and_by_offset(tmp_path, image_format, suffix):
    path = tmp_path / "0.tar"
    sizes = write(path, image_format)
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        names = [f"{n:08d}.{kind}" for n in NUMBERS for kind in (suffix, "cls")]
        assert [member.name for member in members] == names
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in members} == {(0, 0, 0, "")}
        labels = [int(archive.extractfile(member).read()) for member in members[1::2]]
        payloads = [archive.extractfile(member).read() for member in members[::2]]
    assert labels == LABELS and [len(payload) for payload in payloads] == sizes
    content = path.read_bytes()
    assert len(content) % tarfile.RECORDSIZE == 0
    for offset, payload in zip(payload_offsets(image_format, sizes, LABELS), payloads, strict=True):
        assert content[offset : offset + len(payload)] == payload


def test_tar_shards_are_read_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write(tmp_path / "0.tar", "webp")
    found = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in found] == [f"{n:08d}" for n in NUMBERS]
    assert [sample["cls"] for sample in found] == LABELS
    for sample, pixels in zip(found, PIXELS, strict=True):
        np.testing.assert_array_equal(sample["webp"], pixels)


def test_raw_shards_are_read_by_numpy_and_aligned(tmp_path):
    path = tmp_path / "0.npy"
    sizes = write(path, "raw")
    found = np.load(path, mmap_mode="r")
    assert found.offset == mmap.PAGESIZE == 4096 and found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.stack(PIXELS))
    offsets = payload_offsets("raw", sizes, LABELS)
    assert offsets == [4096 + row * SIZE * SIZE * 3 for row in range(4)]
    with Shard(tmp_path / "1.npy", "raw", SIZE):
        pass
    assert np.load(tmp_path / "1.npy").shape == (0, SIZE, SIZE, 3)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_bytes_do_not_depend_on_when_they_are_written(tmp_path, image_format):
    write(tmp_path / "0", image_format), write(tmp_path / "1", image_format)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
