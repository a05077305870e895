"""The crop against exact cases, and folders of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import ImageFolder, adm_center_crop
from mixflow_fast.kernels.philox import Stream, uniform
from tests.support.datasets import get


def test_crop_of_four_times_the_size_is_two_exact_halvings():
    # Multiples of 16: every average of 2, 4, 8 and 16 pixels is a whole number, nothing is rounded.
    pixels = np.random.RandomState(0).randint(0, 16, (32, 32, 3)) * 16
    expected = pixels.reshape(8, 4, 8, 4, 3).astype(np.float64).mean(axis=(1, 3))
    cropped = np.asarray(adm_center_crop(Image.fromarray(pixels.astype(np.uint8)), 8))
    np.testing.assert_array_equal(cropped, expected)


@pytest.mark.parametrize(("width", "height"), [(16, 21), (21, 16), (16, 16), (29, 16)])
def test_crop_takes_the_centre_rounded_down(width, height):
    pixels = np.random.RandomState(1).randint(0, 256, (height, width, 3)).astype(np.uint8)
    top, left = (height - 16) // 2, (width - 16) // 2
    cropped = np.asarray(adm_center_crop(Image.fromarray(pixels), 16))
    np.testing.assert_array_equal(cropped, pixels[top : top + 16, left : left + 16])


@pytest.mark.parametrize(("width", "height"), [(25, 37), (31, 17), (90, 67), (65, 300)])
def test_crop_matches_torch_on_odd_sizes(width, height):
    """PyTorch's antialiased bicubic (float64) is the truth; PIL rounds to bytes twice a resize."""
    row, col = np.mgrid[0:height, 0:width]
    smooth = 128 + 60 * np.sin(row / 9.0) + 40 * np.cos(col / 7.0)
    image = Image.fromarray(np.stack([smooth, smooth, smooth], -1).astype(np.uint8))
    cropped = np.asarray(adm_center_crop(image, 16)).astype(np.float64)
    assert cropped.shape == (16, 16, 3)
    if min(width, height) >= 32:  # the halvings are checked exactly above
        while min(image.size) >= 32:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = 16 / min(image.size)
    new_height, new_width = round(image.height * scale), round(image.width * scale)
    truth = torch.nn.functional.interpolate(
        torch.from_numpy(np.asarray(image).astype(np.float64)).permute(2, 0, 1)[None],
        size=(new_height, new_width),
        mode="bicubic",
        antialias=True,
    )[0].permute(1, 2, 0)
    top, left = (new_height - 16) // 2, (new_width - 16) // 2
    difference = cropped - truth[top : top + 16, left : left + 16].numpy()
    assert np.abs(difference).max() <= 1.2  # 0.5 * (sum of |weights| <= 1.3) + 0.5


def test_folder_reads_classes_in_order_and_pixels_exactly(image_folder):
    dataset = ImageFolder(image_folder, 18, flip=False)
    assert dataset.classes == ["a_flower", "b_china"] and dataset.num_classes == 2
    assert len(dataset) == 6 and dataset.shape == (3, 18, 18)
    batch = get(dataset, *range(6))
    assert batch.y.tolist() == [0, 0, 0, 1, 1, 1]
    file = image_folder / "b_china" / "sub" / "2.png"
    pixels = np.asarray(Image.open(file))[:, 1:19].astype(np.float64)
    np.testing.assert_allclose(batch.x[5].numpy(), pixels.transpose(2, 0, 1) / 127.5 - 1, atol=1e-6)


def test_flips_follow_the_position_alone(image_folder):
    plain, flipped = ImageFolder(image_folder, 16, flip=False), ImageFolder(image_folder, 16)
    indices, positions = torch.tensor([0, 1, 2, 3, 4, 5] * 8), torch.arange(100, 148)
    mirrored = uniform(5, Stream.FLIP, positions)[:, 0] < 0.5
    assert 8 < int(mirrored.sum()) < 40  # 24 +- 4.6 standard deviations
    x, y = plain.get(indices, positions, 5).x, flipped.get(indices, positions, 5).x
    assert torch.equal(y[~mirrored], x[~mirrored]) and torch.equal(y[mirrored], x[mirrored].flip(3))
    alone = flipped.get(indices[7:9], positions[7:9], 5).x
    assert torch.equal(alone, y[7:9])
    assert not torch.equal(flipped.get(indices, positions, 6).x, y)


def test_grey_and_transparent_images_become_rgb(tmp_path):
    (tmp_path / "c").mkdir()
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "c" / "0.png")
    alpha = np.dstack([grey, grey + 1, grey + 2, grey])
    Image.fromarray(alpha).save(tmp_path / "c" / "1.png")
    x = (get(ImageFolder(tmp_path, 8, flip=False), 0, 1).x + 1) * 127.5
    for channel in range(3):
        np.testing.assert_allclose(x[0, channel], grey, atol=1e-4)
        np.testing.assert_allclose(x[1, channel], grey + channel, atol=1e-4)


def test_bad_folders_and_images_are_named(image_folder, tmp_path_factory):
    with pytest.raises(ValueError, match="path must be a folder.*nowhere"):
        ImageFolder(image_folder / "nowhere", 16)
    with pytest.raises(ValueError, match="no class folder"):
        ImageFolder(tmp_path_factory.mktemp("empty"), 16)
    with pytest.raises(ValueError, match="size must be"):
        ImageFolder(image_folder, 0)
    good = (image_folder / "a_flower" / "0.png").read_bytes()
    for content in (b"not an image", good[: len(good) // 2]):
        (image_folder / "a_flower" / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the image .*a_flower.0\.png"):
            get(ImageFolder(image_folder, 16), 0)
    (image_folder / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty.*no image"):
        ImageFolder(image_folder, 16)
