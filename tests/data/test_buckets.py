"""Buckets by name, the nearest one, and crops: ADM's where square, resized as torch does else."""

import io
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data.buckets import Bucket, fit_to_bucket, nearest_bucket, parse_buckets
from mixflow_fast.data.decoding import read_rgb
from tests.support.image_folders import adm_crop, encoded, smooth

# The sizes that SDXL's authors list for about one megapixel, down to 2:1.
MEGAPIXEL = ("1024x1024", "1152x896", "896x1152", "1216x832", "832x1216", "1344x768", "768x1344",
             "1408x704", "704x1408")  # fmt: skip


def test_names():
    found = parse_buckets(["1152x896", "512", " 64x128 "])
    assert found == (Bucket(1152, 896), Bucket(512, 512), Bucket(64, 128))
    assert [bucket.name for bucket in found] == ["1152x896", "512x512", "64x128"]
    assert parse_buckets("1024x1024,1152x896") == (Bucket(1024, 1024), Bucket(1152, 896))
    assert found[0].latent_shape() == (16, 112, 144)
    assert found[2].latent_shape(channels=4, factor=16) == (4, 8, 4)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["1150x896"], "1150x896 must have sides that are multiples of 16 pixels, got 1150: 1136"),
        (["8"], "8x8 must have sides .* got 8: 16 would do"),
        (["0x64"], "multiples of 16 pixels, got 0"),
        (["512", "64x64", "512x512"], "bucket 512x512 is given twice"),
        (["512x"], "'512x' is no size in pixels: expected WIDTHxHEIGHT"),
        (["-64x64"], "no size in pixels"),
        (["6٤x64"], "no size in pixels"),
        (["64x64x64"], "no size in pixels"),
        ([""], "no size in pixels"),
        ([], "no bucket is given"),
    ],
)
def test_names_that_are_refused(names, words):
    with pytest.raises(ValueError, match=words):
        parse_buckets(names)


def exact_distance(size, bucket):
    """The logarithms as exact rationals: exp |log r| is the larger of r and 1 / r."""
    shape = Fraction(size[0] * bucket.height, size[1] * bucket.width)
    area = Fraction(size[0] * size[1], bucket.width * bucket.height)
    return max(shape, 1 / shape), max(area, 1 / area)


def test_the_nearest_bucket_is_the_exact_one():
    buckets = parse_buckets([*MEGAPIXEL, "512", "576x448"])
    generator = np.random.default_rng(0)
    for size in generator.integers(32, 6000, (500, 2)).tolist():
        least = min(exact_distance(size, bucket) for bucket in buckets)
        found = nearest_bucket(size, buckets)
        assert exact_distance(size, found) == least
        logs = [abs(math.log(size[0] / size[1] * b.height / b.width)) for b in buckets]
        assert abs(math.log(size[0] / size[1] * found.height / found.width)) < min(logs) + 1e-12


def test_images_of_a_buckets_size_go_there():
    buckets = parse_buckets(MEGAPIXEL)
    for bucket in buckets:
        assert nearest_bucket((bucket.width, bucket.height), buckets) == bucket
        assert nearest_bucket((3 * bucket.width, 3 * bucket.height), buckets) == bucket


@pytest.mark.parametrize(
    ("size", "names", "nearest"),
    [
        ((700, 700), ["1152x896", "896x1152"], "1152x896"),  # the same shape but for a turn
        ((64, 64), ["32", "128"], "32x32"),  # half and twice the side
        ((200, 100), ["128x128", "256x64"], "256x64"),  # log 2 from both, and of equal areas
        ((70, 70), ["64", "128", "256x192"], "64x64"),  # one shape: the nearest area
        ((600, 470), ["512", "1152x896"], "1152x896"),  # the shape counts before the area
    ],
)
def test_ties_do_not_depend_on_the_order(size, names, nearest):
    for order in itertools.permutations(parse_buckets(names)):
        assert nearest_bucket(size, order).name == nearest


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (40, 33), (63, 65), (128, 129), (257, 511), (64, 64), (513, 1025), (31, 300)],
)
def test_a_square_bucket_has_the_bits_of_adms_crop(width, height):
    picture = smooth(width, height, width)
    expected = adm_crop(picture, 64)
    np.testing.assert_array_equal(fit_to_bucket(picture, Bucket(64, 64)), expected)
    np.testing.assert_array_equal(fit_to_bucket(np.array(picture), Bucket(64, 64)), expected)


@pytest.mark.parametrize(
    ("size", "halvings", "resized"),
    [
        ((96, 64), 0, (96, 64)),  # of the size, as it is
        ((97, 64), 0, (97, 64)),  # half a pixel too wide on either side
        ((100, 90), 0, (96, 86)),  # 86.4 rows, of which 64 are kept
        ((150, 80), 0, (120, 64)),
        ((201, 129), 1, (100, 64)),  # 100 x 64 after the halving
        ((385, 300), 2, (96, 75)),  # 192 x 150, 96 x 75
        ((300, 120), 0, (160, 64)),  # twice as wide and not twice as high: no halving
        ((48, 40), 0, (96, 80)),  # enlarged
        ((90, 200), 0, (96, 213)),  # one side is enlarged, so both are
    ],
)
def test_other_buckets_are_torchs_resize_and_a_centre_crop(size, halvings, resized):
    """Antialiased bicubic of torch in float64 is Pillow's formula but for its 8-bit rounding."""
    picture = smooth(*size, seed=sum(size))
    truth = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].double()
    for _ in range(halvings):  # with an odd side a box spans more than two pixels
        half = (truth.shape[2] // 2, truth.shape[3] // 2)
        truth = area_resize(truth, half).round()
    truth = torch.nn.functional.interpolate(
        truth, size=resized[::-1], mode="bicubic", antialias=True, align_corners=False
    )
    left, top = (resized[0] - 96) // 2, (resized[1] - 64) // 2
    truth = truth[0, :, top : top + 64, left : left + 96].clamp(0, 255).permute(1, 2, 0)
    found = fit_to_bucket(picture, Bucket(96, 64))
    assert found.shape == (64, 96, 3) and found.dtype == np.uint8
    # Pillow rounds after the rows and after the columns.
    assert np.abs(found - truth.numpy()).max() < 2.01
    shifted = np.roll(found, 1, axis=1)
    assert np.abs(shifted - truth.numpy()).max() > 2.01, "a crop off by one would pass"
    shifted = np.roll(found, 1, axis=0)
    assert np.abs(shifted - truth.numpy()).max() > 2.01


def area_resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Box filter of Pillow: a pixel's mean over those whose centres are in its box."""
    for axis, length in zip((2, 3), size, strict=True):
        scale = images.shape[axis] / length
        rows = []
        for n in range(length):
            # Pillow's: centre (n + 1/2) scale, support scale / 2, both ends rounded.
            centre = (n + 0.5) * scale
            first, last = int(centre - scale / 2 + 0.5), int(centre + scale / 2 + 0.5)
            rows.append(images.narrow(axis, first, last - first).mean(axis))
        images = torch.stack(rows, axis)
    return images


def test_every_image_covers_every_bucket():
    """Rounding must not leave a side one pixel short."""
    buckets = parse_buckets(["64x48", "48x64", "80x32", "32x112"])
    for size, bucket in itertools.product(itertools.product(range(32, 300, 37), repeat=2), buckets):
        found = fit_to_bucket(Image.new("RGB", size, (9, 120, 250)), bucket)
        assert found.shape == (bucket.height, bucket.width, 3)
        assert (found == (9, 120, 250)).all()  # outside of an image a crop is black


@pytest.mark.parametrize(
    ("size", "enlarges"),
    [((96, 64), False), ((95, 64), True), ((500, 63), True), ((97, 65), False), ((10, 10), True)],
)
def test_what_is_enlarged(size, enlarges):
    assert Bucket(96, 64).enlarges(size) is enlarges


def test_exifs_orientation_is_not_applied():
    """As `data/decoding.py`: the pixels as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = smooth(128, 64, 4)
    turned = read_rgb(io.BytesIO(encoded(picture, "PNG", exif=exif)))
    np.testing.assert_array_equal(fit_to_bucket(turned, Bucket(128, 64)), np.array(picture))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.uint8), r"\(h, w, 3\) uint8, got \(4, 4\) uint8"),
        (np.zeros((4, 4, 3), np.float32), "got .* float32"),
        (Image.new("L", (40, 40)), "mode RGB, got L"),
    ],
)
def test_what_is_no_image_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        fit_to_bucket(image, Bucket(64, 64))
