"""What goes into DALI: which files as they are, and what becomes of the others."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import ImageFolder
from mixflow_fast.data.dali_crop import crop_plan
from mixflow_fast.data.dali_feed import Feed, check_by_pillow, make_feed
from mixflow_fast.data.dataset import random_flip
from mixflow_fast.data.label_dropout import LabelDropout
from tests.support.encoded_images import encoded, odd_files, photos, plain_files, write_folder

WINDOW = photos()[0].crop((100, 100, 151, 140))


def _feed(folder: ImageFolder, flips: int = 3) -> Feed:
    every = torch.arange(len(folder))
    return make_feed(LabelDropout(folder, 0.0, None), every, every + 7, flips)


@pytest.fixture
def plain(tmp_path):
    return ImageFolder(write_folder(tmp_path / "plain", plain_files(WINDOW)), 16)


def test_ordinary_files_go_in_as_they_are(plain) -> None:
    feed = _feed(plain)
    assert [p.tobytes() for p in feed.payloads] == [plain.payload(i) for i in range(len(plain))]
    expected = crop_plan(51, 40, 16)
    assert all(np.array_equal(plan, expected) for plan in feed.plans)


def test_flips_and_positions_are_those_of_the_order(plain) -> None:
    feed = _feed(plain)
    assert [int(n) for n in feed.numbers] == list(range(7, 7 + len(plain)))
    ramp = torch.arange(16.0).expand(len(plain), 1, 1, 16)
    flipped = random_flip(ramp, feed.positions, 3)[:, 0, 0, 0] == 15
    assert flipped.any() and not flipped.all()
    assert [bool(f) for f in feed.flips] == flipped.tolist()
    plain.flip = False
    assert not any(_feed(plain).flips)


def test_prepared_images_are_not_looked_into(plain) -> None:
    plain.crops = False
    feed = _feed(plain)
    assert feed.plans == [] and len(feed.inputs()) == 3
    assert feed.payloads[3].tobytes() == plain.payload(3)


@pytest.mark.parametrize("kind", odd_files(WINDOW))
def test_odd_files_are_decoded_and_cropped_by_the_one_rule(tmp_path, kind) -> None:
    folder = ImageFolder(write_folder(tmp_path, {kind: odd_files(WINDOW)[kind]}), 16, flip=False)
    feed = _feed(folder)
    assert feed.payloads[0].tobytes() != folder.payload(0)
    with Image.open(io.BytesIO(feed.payloads[0].tobytes())) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (16, 16))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(pixels, folder.get(feed.indices, feed.positions, 0).images[0])
    assert np.array_equal(feed.plans[0], crop_plan(16, 16, 16))


def test_an_image_of_too_many_halvings_is_cropped_here(tmp_path) -> None:
    folder = ImageFolder(write_folder(tmp_path, {"png": encoded(photos()[0], "PNG")}), 8)
    feed = _feed(folder)
    with Image.open(io.BytesIO(feed.payloads[0].tobytes())) as image:
        assert image.size == (8, 8)


BAD = {
    "png": b"no image",
    "webp": encoded(
        WINDOW, "WEBP", save_all=True, append_images=[photos()[1].crop((0, 0, 51, 40))]
    ),
    "png 2": b"",
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_with_its_position(tmp_path, kind) -> None:
    folder = ImageFolder(write_folder(tmp_path, {"png 0": encoded(WINDOW, "PNG")}), 16)
    (tmp_path / "class0" / "1.png").write_bytes(BAD[kind])
    folder = ImageFolder(tmp_path, 16)
    with pytest.raises(ValueError, match=r"class0/1\.png' \(sample 1, at position 8\): "):
        _feed(folder)


def test_what_fails_in_decoding_is_found_by_pillow(plain) -> None:
    feed = _feed(plain)
    check_by_pillow(LabelDropout(plain, 0.0, None), feed)
    feed.payloads[4] = feed.payloads[4][:-200]
    with pytest.raises(ValueError, match=r"\(sample 4, at position 11\): "):
        check_by_pillow(LabelDropout(plain, 0.0, None), feed)
