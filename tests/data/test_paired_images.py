"""Images beside latents: paired by number, whatever the order, and refused where one is missing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mixflow_fast.data import Latents
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.paired_images import PairedImages
from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source
from tests.support.datasets import content
from tests.support.image_folders import write_folder
from tests.support.teacher import images

PIXELS = images(40, 6).permute(0, 2, 3, 1).numpy()  # image n belongs to latent number n
NUMBERS = [12, 3, 37, 5]
LABELS = {12: 0, 3: 2, 37: 1, 5: 2}


def write_latents(root: Path, numbers: list[int] = NUMBERS) -> Path:
    """REPA's vae-sd folder, mean | std; every value of latent n is n, without noise."""
    for number in numbers:
        file = root / name_of(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        mean = np.full((4, 2, 2), number, np.float32)
        np.save(file, np.concatenate([mean, 0 * mean]))
    (root / "dataset.json").write_text(
        json.dumps({"labels": [[name_of(n), LABELS.get(n, 0)] for n in numbers]})
    )
    return root


def name_of(number: int) -> str:
    return f"{number // 10:05d}/img-mean-std-{number:08d}.npy"


def write_images(root: Path, numbers: list[int], **labels: int) -> Path:
    """REPA's images folder, in another order and with other folders than the latents'."""
    listed = []
    for number in reversed(numbers):
        name = f"{number % 3:05d}/img{number:08d}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[number]).save(root / name)
        listed.append([name, labels.get(f"n{number}", LABELS.get(number, 0))])
    (root / "dataset.json").write_text(json.dumps({"labels": listed}))
    return root


def assert_paired(dataset: Latents) -> None:
    indices = torch.tensor([2, 0, 3, 1, 0])
    batch = dataset.get(indices, torch.arange(5), 0)
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (5, 3, 6, 6)
    assert batch.images.is_contiguous()
    for latent, image in zip(content(batch), batch.images, strict=True):
        number = int(latent[0, 0, 0])
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), PIXELS[number])


def test_repas_folders_are_paired_by_number(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "vae-sd")
    # More images than latents, so that pairing by order would be wrong everywhere.
    folder = write_images(tmp_path / "images", [*NUMBERS, 0, 39, 20])
    assert_paired(Latents(latents, moments=True, images=folder))
    assert (
        Latents(latents, moments=True).get(torch.tensor([0]), torch.tensor([0]), 0).images is None
    )
    with pytest.raises(ValueError, match=r"1 of 5 latents have no image .* number 8"):
        Latents(write_latents(tmp_path / "more", [*NUMBERS, 8]), moments=True, images=folder)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_hold_number_n_at_row_n(tmp_path: Path, last: bool, suffix: str) -> None:
    pixels = PIXELS if last else np.moveaxis(PIXELS, -1, 1)
    file = tmp_path / f"set.{suffix}"
    if suffix == "npy":
        np.save(file, pixels)
    else:
        np.savez(file, images=pixels, other=np.zeros(3))
    assert_paired(Latents(write_latents(tmp_path / "latents"), moments=True, images=file))
    rows = np.arange(40, dtype=np.float32)[:, None, None, None] + np.zeros((1, 4, 2, 2), np.float32)
    np.savez(tmp_path / "x.npz", latents=rows, labels=np.arange(40))
    assert_paired(Latents(tmp_path / "x.npz", images=file))
    np.savez(tmp_path / "y.npz", latents=rows[:39], labels=np.arange(39))
    with pytest.raises(ValueError, match="one row per latent, 39, got 40"):
        Latents(tmp_path / "y.npz", images=file)
    with pytest.raises(ValueError, match="number 40 has no image: .* rows 0 to 39"):
        Latents(write_latents(tmp_path / "more", [*NUMBERS, 40]), moments=True, images=file)


def test_latents_in_an_array_and_images_in_a_folder(tmp_path: Path) -> None:
    rows = np.arange(4, dtype=np.float32)[:, None, None, None] + np.zeros((1, 4, 2, 2), np.float32)
    np.savez(tmp_path / "x.npz", latents=rows, labels=[LABELS.get(n, 0) for n in range(4)])
    assert_paired(Latents(tmp_path / "x.npz", images=write_images(tmp_path / "i", [3, 1, 0, 2, 5])))


def test_a_folder_of_another_data_set_is_refused(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents")
    with pytest.raises(ValueError, match=r"img00000003.png' the label 7, its latent has 2"):
        Latents(latents, moments=True, images=write_images(tmp_path / "labels", NUMBERS, n3=7))
    twice = write_images(tmp_path / "twice", NUMBERS)
    listed = json.loads((twice / "dataset.json").read_text())["labels"]
    extra = {"labels": [*listed, ["other/img3.png", 2]]}
    (twice / "dataset.json").write_text(json.dumps(extra))
    with pytest.raises(ValueError, match="two files with the number 3"):
        Latents(latents, moments=True, images=twice)
    (twice / "dataset.json").write_text(json.dumps({"labels": [["../labels/img1.png", 0]]}))
    with pytest.raises(ValueError, match="names '../labels/img1.png', which is not below"):
        Latents(latents, moments=True, images=twice)
    (twice / "dataset.json").write_text(json.dumps({"labels": [["a.png", 0]]}))
    with pytest.raises(ValueError, match="'a.png', whose name has no number"):
        Latents(latents, moments=True, images=twice)


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents")
    for name, array in (
        ("float", PIXELS.astype(np.float32)),
        ("grey", PIXELS[..., :1]),
        ("wide", PIXELS[:, :4]),
        ("flat", PIXELS[0]),
        ("none", PIXELS[:0]),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(ValueError, match=rf"{name}.npy' must be uint8 \(N, 3, H, H\) or"):
            Latents(latents, moments=True, images=tmp_path / f"{name}.npy")
    np.savez(tmp_path / "two.npz", a=PIXELS, b=PIXELS)
    with pytest.raises(ValueError, match="must hold the array images, got only a, b"):
        Latents(latents, moments=True, images=tmp_path / "two.npz")
    with pytest.raises(ValueError, match="images .*nowhere does not exist"):
        Latents(latents, moments=True, images=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match="images must be a prepared set, a folder with dataset.json"
    ):
        Latents(latents, moments=True, images=tmp_path)

    folder = write_images(tmp_path / "images", NUMBERS)
    dataset = Latents(latents, moments=True, images=folder)
    last = folder / "00001/img00000037.png"
    Image.fromarray(PIXELS[0][:4, :4]).save(last)
    with pytest.raises(ValueError, match="img00000037.png' must be 6 x 6 pixels like the first"):
        dataset.get(torch.tensor([3]), torch.tensor([0]), 0)
    Image.fromarray(PIXELS[0][:4]).save(last)
    with pytest.raises(ValueError, match="img00000037.png' must be square, .* got 6 x 4"):
        dataset.get(torch.tensor([3]), torch.tensor([0]), 0)
    last.unlink()
    with pytest.raises(ValueError, match="cannot read the image .*img00000037.png"):
        dataset.get(torch.tensor([3]), torch.tensor([0]), 0)


def test_images_are_decoded_by_the_rule_of_training_images(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents")
    folder = write_images(tmp_path / "images", NUMBERS)
    Image.fromarray(np.full((6, 6), 40_000, np.uint16)).save(folder / "00000/img00000012.png")
    clear = np.dstack([PIXELS[3], np.zeros((6, 6), np.uint8)])
    Image.fromarray(clear).save(folder / "00000/img00000003.png")
    dataset = Latents(latents, moments=True, images=folder)
    found = dataset.get(torch.arange(4), torch.arange(4), 0).images
    assert (found[2] == 40_000 >> 8).all() and (found[0] == 255).all()


def test_images_that_are_listed_must_be_there(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents")
    folder = write_images(tmp_path / "images", [*NUMBERS, 20])
    (folder / "00002/img00000020.png").unlink()  # of no latent
    Latents(latents, moments=True, images=folder)
    (folder / "00001/img00000037.png").unlink()
    with pytest.raises(ValueError, match=r"lists 4 files, of which 1 .* '00001/img00000037.png'"):
        Latents(latents, moments=True, images=folder)


def test_other_images_are_other_data(tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents")
    folder = write_images(tmp_path / "images", NUMBERS)
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "b.npy", 255 - PIXELS)
    given = (None, folder, tmp_path / "a.npy", tmp_path / "b.npy")
    found = [Latents(latents, moments=True, images=images).summary().digest for images in given]
    assert len(set(found)) == 4
    folder.rename(tmp_path / "moved")
    moved = Latents(latents, moments=True, images=tmp_path / "moved").summary()
    assert moved.digest == found[1]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A set without the images 1 and 3 of its source, both bad; a hole shifts all after it."""
    source = write_folder(tmp_path / "pictures")  # 0 to 6 are of class 0, 7 to 13 of class 1
    for number in (1, 3):
        (source / f"a/{number:03d}.JPEG").write_bytes(b"")
    prepare(list_source(source), tmp_path / "set", Settings(32, shard_rows=4), on_bad="skip")
    return tmp_path / "set"


def crop(prepared: Path, number: int) -> np.ndarray:
    name = list_source(prepared.with_name("pictures")).files[number]
    return np.asarray(adm_center_crop(Image.open(prepared.with_name("pictures") / name), 32))


def test_a_prepared_set_is_paired_by_the_sources_numbers(prepared: Path, tmp_path: Path) -> None:
    latents = write_latents(tmp_path / "latents", [6, 0, 4])
    dataset = Latents(latents, moments=True, images=prepared)
    batch = dataset.get(torch.tensor([2, 0, 1]), torch.arange(3), 0)
    for mean, image in zip(batch.x.mean, batch.images, strict=True):
        number = int(mean[0, 0, 0])
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), crop(prepared, number))
    other = dataset.summary().digest
    assert Latents(latents, moments=True).summary().digest != other
    with pytest.raises(ValueError, match="1 of 2 latents have no image in .* first is number 3"):
        Latents(write_latents(tmp_path / "hole", [3, 5]), moments=True, images=prepared)
    with pytest.raises(ValueError, match=r"b/001.JPEG\) .* has the label 1, its latent has 0"):
        Latents(write_latents(tmp_path / "other", [0, 8]), moments=True, images=prepared)
    (prepared / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is not complete: 4 of 4 shards are done"):
        Latents(latents, moments=True, images=prepared)


def test_rows_of_one_array_are_ids_of_a_prepared_set(prepared: Path, tmp_path: Path) -> None:
    labels = torch.tensor([0] * 5 + [1] * 7)
    images = PairedImages(prepared, list(range(12)), labels, rows=True)
    kept = [0, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    for row in (11, 3):
        (image,) = images.get([row])
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), crop(prepared, kept[row]))
    with pytest.raises(ValueError, match="must be one per latent, 13, got 12"):
        PairedImages(prepared, list(range(13)), torch.zeros(13), rows=True)


def test_the_layout_of_repa_that_prepare_writes(tmp_path: Path) -> None:
    source = list_source(write_folder(tmp_path / "pictures"))
    prepare(source, tmp_path / "set", Settings(32, "png", "repa"))
    for path in (tmp_path / "set", tmp_path / "set/images"):
        images = PairedImages(path, [8, 3], torch.tensor([1, 0]), rows=False)
        truth = crop(tmp_path / "set", 3)
        np.testing.assert_array_equal(images.get([1])[0].permute(1, 2, 0).numpy(), truth)
