"""The comparison of DALI's pixels with Pillow's: what it counts, and by which kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mixflow_fast.data import ImageFolder, compare
from mixflow_fast.data.compare import Difference, Kind, kind_of
from tests.support.encoded_images import (
    encoded,
    odd_files,
    photos,
    plain_files,
    write_folder,
    write_prepared,
)

CPU = torch.device("cpu")
WINDOW = photos()[0].crop((100, 100, 181, 170))


def test_a_difference_counts_what_numpy_counts() -> None:
    rng = np.random.RandomState(0)
    found, pairs = Difference(), []
    for width in (8, 16):
        one = rng.randint(20, 200, (4, width, 3)).astype(np.uint8)
        pairs.append((one, (one + rng.randint(-9, 10, one.shape)).astype(np.uint8)))
    pairs.append((pairs[0][0], pairs[0][0]))
    for one, other in pairs:
        found.add(one, other)
    off = np.concatenate([np.abs(a.astype(int) - b).ravel() for a, b in pairs])
    assert (found.images, found.identical, found.largest) == (3, 1, off.max())
    assert found.mean == pytest.approx(off.mean())
    assert found.share_over(4) == pytest.approx((off > 4).mean())
    truth = [10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)) for a, b in pairs[:2]]
    assert found.psnr == pytest.approx(truth)


def test_kinds() -> None:
    files = plain_files(WINDOW)
    assert kind_of(files["jpeg 4:2:0"], 32) == Kind("JPEG 4:2:0", 1)
    assert kind_of(files["jpeg 4:4:4"], 16) == Kind("JPEG 4:4:4", 2)
    assert kind_of(files["jpeg grey"], 64) == Kind("JPEG grey", 0)
    assert kind_of(files["webp lossless"], None) == Kind("WEBP", None)
    assert kind_of(odd_files(WINDOW)["jpeg CMYK"], 32) == Kind("by Pillow", None)
    assert kind_of(encoded(WINDOW.crop((0, 0, 10, 70)), "PNG"), 8) == Kind("by Pillow", None)


def test_prepared_images_are_identical(tmp_path) -> None:
    dataset = ImageFolder(write_prepared(tmp_path, 20), 24)
    dataset.crops = False
    (kind, found), *rest = compare.compare(dataset, 100, CPU).items()
    assert kind == Kind("WEBP", None) and not rest
    assert found.images == found.identical == 20


def test_raw_images_by_kind_with_latents(tmp_path) -> None:
    """Every image once, though the last batch of the loader goes into the next epoch."""
    files = plain_files(WINDOW) | odd_files(WINDOW)
    dataset = ImageFolder(write_folder(tmp_path, files), 32)
    seen: list[int] = []

    def encode(images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    found = compare.compare(dataset, 1000, CPU, encode, seen.append)
    assert sum(seen) == sum(d.images for d in found.values()) == len(files)
    assert found[Kind("by Pillow", None)].images == len(odd_files(WINDOW))
    assert found[Kind("by Pillow", None)].identical == len(odd_files(WINDOW))
    jpeg = found[Kind("JPEG 4:2:0", 1)]
    assert 0 < jpeg.mean < 0.1 and jpeg.largest <= 8 and min(jpeg.psnr) > 55
    assert 0 < max(jpeg.latents) < 1e-2 and len(jpeg.latents) == jpeg.images


def test_pixels_that_differ_are_seen(tmp_path, monkeypatch) -> None:
    """Against a decoder that turns images by EXIF, as DALI's own default does."""
    files = {"jpeg with EXIF": plain_files(WINDOW.crop((0, 0, 70, 70)))["jpeg with EXIF"]}
    dataset = ImageFolder(write_folder(tmp_path, files), 70)
    dataset.crops = False
    monkeypatch.setitem(
        compare.DaliLoader.__init__.__globals__["DECODER"], "adjust_orientation", True
    )
    (found,) = compare.compare(dataset, 1, CPU).values()
    assert found.identical == 0 and found.mean > 5
