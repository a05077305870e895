"""The crop against exact cases, and folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import ImageFolder, adm_center_crop
from mixflow_fast.data.image_folder import is_folder
from mixflow_fast.data.label_dropout import LabelDropout
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
    pixels = np.asarray(Image.open(file))[:, 1:19]
    np.testing.assert_array_equal(batch.images[5].numpy(), pixels.transpose(2, 0, 1))
    assert torch.equal(batch.x, batch.images.float() / 127.5 - 1)
    # A run takes the bytes, and scales them on the device.
    assert LabelDropout(dataset, 0.0, None).get(torch.tensor([5]), torch.tensor([5]), 0).x is None


def test_flips_follow_the_position_alone(image_folder):
    plain, flipped = ImageFolder(image_folder, 16, flip=False), ImageFolder(image_folder, 16)
    indices, positions = torch.tensor([0, 1, 2, 3, 4, 5] * 8), torch.arange(100, 148)
    mirrored = uniform(5, Stream.FLIP, positions)[:, 0] < 0.5
    assert 8 < int(mirrored.sum()) < 40  # 24 +- 4.6 standard deviations
    x, y = plain.get(indices, positions, 5).images, flipped.get(indices, positions, 5).images
    assert torch.equal(y[~mirrored], x[~mirrored]) and torch.equal(y[mirrored], x[mirrored].flip(3))
    alone = flipped.get(indices[7:9], positions[7:9], 5).images
    assert torch.equal(alone, y[7:9])
    assert not torch.equal(flipped.get(indices, positions, 6).images, y)


def test_bad_folders_and_images_are_named(image_folder, tmp_path_factory):
    with pytest.raises(ValueError, match="path .*nowhere does not exist: the last"):
        ImageFolder(image_folder / "nowhere", 16)
    with pytest.raises(ValueError, match="no class folder"):
        ImageFolder(tmp_path_factory.mktemp("empty"), 16)
    with pytest.raises(ValueError, match="size must be"):
        ImageFolder(image_folder, 0)
    good = (image_folder / "a_flower" / "0.png").read_bytes()
    for content in (b"not an image", good[: len(good) // 2]):
        (image_folder / "a_flower" / "0.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read .*a_flower.0\.png.*a readable copy"):
            get(ImageFolder(image_folder, 16), 0)
    (image_folder / "c_empty").mkdir()
    with pytest.raises(ValueError, match="c_empty.*no image"):
        ImageFolder(image_folder, 16)


def write_image(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(file, "PNG")
    return file


def test_a_folder_that_is_reached_twice_is_refused(tmp_path):
    """A loop, a class that is a link to another, a part that is in two classes."""
    write_image(tmp_path / "set/cat/1.png"), write_image(tmp_path / "set/dog/more/1.png")
    for link, target in (
        ("cat/cat", "cat"),
        ("cat/top", ""),
        ("ant", "dog"),
        ("cat/x", "dog/more"),
    ):
        (tmp_path / "set" / link).symlink_to(tmp_path / "set" / target)
        with pytest.raises(ValueError, match="is the same folder as .* would come twice"):
            ImageFolder(tmp_path / "set", 8)
        (tmp_path / "set" / link).unlink()
    # Links to folders and files outside are how subsets are made.
    write_image(tmp_path / "elsewhere/n1/1.png")
    (tmp_path / "set/ant").symlink_to(tmp_path / "elsewhere/n1")
    (tmp_path / "set/dog/2.png").symlink_to(tmp_path / "elsewhere/n1/1.png")
    dataset = ImageFolder(tmp_path / "set", 8)
    assert dataset.classes == ["ant", "cat", "dog"] and len(dataset) == 4


def test_folders_with_one_number_for_all_are_told_apart(tmp_path, monkeypatch):
    """Some file systems in user space give every folder the inode 0."""
    write_image(tmp_path / "cat/1.png"), write_image(tmp_path / "dog/1.png")
    stat = os.stat

    def without_number(path, **options):
        mode, _, *rest = stat(path, **options)
        return os.stat_result((mode, 0, *rest))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", without_number)
        assert len(ImageFolder(tmp_path, 8)) == 2


def test_a_link_to_an_image_is_looked_at_once(tmp_path):
    """Of a million links on a network disk a second look at each would take as long again."""
    (tmp_path / "1.png").symlink_to(write_image(tmp_path / "elsewhere/1.png"))
    (entry,) = [entry for entry in os.scandir(tmp_path) if entry.name == "1.png"]
    assert not entry.is_dir()
    (tmp_path / "elsewhere/1.png").unlink()  # what another look would see
    assert not is_folder(entry)


@pytest.mark.parametrize("link", ["dog", "cat/2.png", "cat/more"])
def test_links_to_nothing_are_refused(tmp_path, link):
    """A class that is not mounted would give all after it another label."""
    write_image(tmp_path / "cat/1.png"), write_image(tmp_path / "eel/1.png")
    for target in ("/nowhere/at/all", link):  # the second is a link to itself
        (tmp_path / link).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"{link}' is a broken link, to "):
            ImageFolder(tmp_path, 8)
        (tmp_path / link).unlink()


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    for name in ("train/n01", "train/n02", "val/n01"):
        write_image(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match=r"are train, val: parts .* such as '.*/train', whose"):
        ImageFolder(tmp_path, 8)
    assert ImageFolder(tmp_path / "train", 8).classes == ["n01", "n02"]
    write_image(tmp_path / "aeroplane/1.png")  # CIFAR-100 has a class train
    assert ImageFolder(tmp_path, 8).num_classes == 3


def test_what_is_passed_over_is_said(tmp_path):
    write_image(tmp_path / "n01440764/n01440764_10026.JPEG"), write_image(tmp_path / "b/c.png")
    summary = ImageFolder(tmp_path, 8).summary()
    assert summary.describe() == "2 images, 2 classes, 3 x 8 x 8"
    assert not summary.notes and not summary.warnings
    (tmp_path / "b/list.txt").touch(), (tmp_path / "b/.hidden.txt").touch()
    (note,) = ImageFolder(tmp_path, 8).summary().notes
    assert note.startswith("files passed over: 1 (.txt 1); read are .png")
    (tmp_path / "b/1.gif").touch(), (tmp_path / "b/2.GIF").touch()
    write_image(tmp_path / "0.png")
    summary = ImageFolder(tmp_path, 8).summary()
    assert len(summary.warnings) == 2 and not summary.notes
    assert summary.warnings[0].startswith("files passed over: 3 (.gif 2, .txt 1)")
    assert "have no class and are passed over: 1, such as 0.png" in summary.warnings[1]
    (tmp_path / "c").mkdir(), (tmp_path / "c/1.gif").touch()
    with pytest.raises(ValueError, match="class folder 'c' .* holds no image"):
        ImageFolder(tmp_path, 8)


def test_classes_one_folder_deeper_are_pointed_at(tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / "CLS-LOC" / name / "1.png")
    (warning,) = ImageFolder(tmp_path, 8).summary().warnings
    assert "3 folders below, such as CLS-LOC/a, CLS-LOC/b, ... (3 in all)" in warning
    write_image(tmp_path / "CLS-LOC/1.png")
    assert not ImageFolder(tmp_path, 8).summary().warnings


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_image(tmp_path / "set/a/1.png")
    assert len(ImageFolder("~/set", 8)) == 1
    with pytest.raises(ValueError, match="path ~/sot does not exist: the last folder of it"):
        ImageFolder("~/sot", 8)


def test_the_digest_is_of_the_data_not_of_where_they_are(tmp_path, monkeypatch):
    write_image(tmp_path / "set/a/1.png"), write_image(tmp_path / "set/b/1.png")
    first = ImageFolder(tmp_path / "set", 8).summary()
    (tmp_path / "set").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved/a/1.png", (0, 0))
    monkeypatch.chdir(tmp_path / "moved")
    for path in (tmp_path / "moved", f"{tmp_path}/moved/", ".", "../moved"):
        assert ImageFolder(path, 8).summary() == first, path
    digests = {first.digest}
    (tmp_path / "moved/b/1.png").rename(tmp_path / "moved/b/2.png")
    digests.add(ImageFolder(".", 8).summary().digest)
    Image.new("RGB", (99, 99)).save("b/2.png")
    digests.add(ImageFolder(".", 8).summary().digest)
    (tmp_path / "moved/b").rename(tmp_path / "moved/c")
    digests.add(ImageFolder(".", 8).summary().digest)
    assert len(digests) == 4
