"""Data of other formats: named, with the next step, by both kinds of dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mixflow_fast.data import ImageFolder, Latents, Photos
from tests.support.datasets import LATENTS, write_npz, write_repa


def empty(*names: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()

    return write


def image(name: str) -> Callable[[Path], None]:
    def write(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)

    return write


def lightning(root: Path) -> None:
    x = torch.zeros(2, 32, 16, 16)
    save_file(
        {"latents": x, "latents_flip": x.clone(), "labels": torch.zeros(2)},
        root / "latents_rank00_shard000.safetensors",
    )


def network(root: Path) -> None:
    save_file({"x_embedder.weight": torch.zeros(2)}, root / "net.safetensors")


# What lies in the folder, and what either kind of dataset says of it.
BOTH = {
    "webdataset": (empty("0.tar", "1.tar"), r"\(webdataset\): read .* data.kind=webdataset"),
    "zip": (empty("imagenet.zip"), "holds a zip archive: unpack"),
    "TFRecord": (empty("train-00000-of-01024"), "holds TFRecords: write images"),
    "tfrecord suffix": (empty("a.tfrecord"), "holds TFRecords: write images"),
    "parquet": (empty("data/train-0.parquet"), "Hugging Face datasets.: write the images"),
    "arrow": (empty("train/data-00000-of-00001.arrow", "train/state.json"), "Hugging Face"),
    "hugging face": (empty("dataset_dict.json"), "a folder of Hugging Face datasets: write"),
    "lmdb": (empty("data.mdb", "lock.mdb"), "holds an LMDB: write images"),
    "torch": (empty("latents/1.pt"), r"holds torch tensors \(.pt\): write them as set.npy"),
    "hdf5": (empty("x.h5"), "holds HDF5: write them as set.npy"),
    "LightningDiT": (
        lightning,
        "LightningDiT's latents .*labels, latents, latents_flip.*: join .* write them as set.npy",
    ),
    "weights": (network, r"which are read as weights \(train.init\)"),
    "diffusers": (empty("model_index.json", "vae/config.json"), "weights go to train.init"),
    "transformer": (empty("config.json", "diffusion_pytorch_model.safetensors"), "train.init"),
    "run": (empty("config.yaml", "checkpoints/x"), r"is the folder of a run \(out=\), not data"),
    "empty": (empty(), "it is empty$"),
}


@pytest.mark.parametrize("name", BOTH)
def test_other_formats_are_named_with_the_next_step(tmp_path: Path, name: str) -> None:
    write, message = BOTH[name]
    write(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("manifest.json", "work.json", "done/0.json", "shards/0.tar"), "images"),
        (("work.json", "done/0.json", "moments/0.npy"), "latents"),
    ],
)
def test_sets_that_are_made_here_are_no_class_folders(tmp_path, names, kind):
    empty(*names)(tmp_path)
    with pytest.raises(ValueError, match=f"`mixflow-fast data` makes: .* data.kind={kind}"):
        ImageFolder(tmp_path, 8)


@pytest.mark.parametrize("suffix", ["tar", "zip", "parquet", "pt", "h5", "safetensors"])
def test_a_file_of_another_format_is_named_too(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"set.{suffix}").touch()
    for open_it in (lambda path: ImageFolder(path, 8), Latents):
        with pytest.raises(ValueError, match=r"path must be a .* got .*; it holds "):
            open_it(tmp_path / f"set.{suffix}")


@pytest.mark.parametrize("name", ["cat/1.png", "1.JPEG"])
def test_images_given_as_latents(tmp_path: Path, name: str) -> None:
    image(name)(tmp_path)
    with pytest.raises(ValueError, match=r"it holds images \(1\..*data.kind=folder"):
        Latents(tmp_path)


def test_latents_given_as_images(tmp_path: Path) -> None:
    write_npz(tmp_path, LATENTS)
    for path in (tmp_path, tmp_path / "set.npz"):
        with pytest.raises(ValueError, match=r"it holds arrays \(set.npz\): .* data.kind=latents"):
            ImageFolder(path, 8)
    write_repa(tmp_path, LATENTS)
    with pytest.raises(ValueError, match="it holds arrays"):
        ImageFolder(tmp_path, 8)


def test_an_image_or_a_flat_folder_of_images(tmp_path: Path) -> None:
    image("1.png")(tmp_path), image("2.jpg")(tmp_path)
    with pytest.raises(ValueError, match=r"no class folder in .* holds 2 images directly: move"):
        ImageFolder(tmp_path, 8)
    with pytest.raises(ValueError, match="it is one image: give the folder of the class folders"):
        ImageFolder(tmp_path / "1.png", 8)
    with pytest.raises(ValueError, match="it is one image: .* data.kind=folder"):
        Latents(tmp_path / "1.png")


def test_latents_one_folder_deeper(tmp_path: Path) -> None:
    """The folder that REPA's preprocessing fills, and one of splits."""
    for name in ("images", "vae-sd"):
        (tmp_path / "repa" / name).mkdir(parents=True)
        write_repa(tmp_path / "repa" / name, LATENTS)
    message = r"its folders do \(images, vae-sd\): set data.path=.*/vae-sd data.images=.*/images"
    with pytest.raises(ValueError, match=message):
        Latents(tmp_path / "repa")
    for name in ("train", "val"):
        (tmp_path / "splits" / name).mkdir(parents=True)
        np.save(tmp_path / "splits" / name / "latents.npy", LATENTS)
    with pytest.raises(ValueError, match=r"its folders do \(train, val\): set data.path=.*/train"):
        Latents(tmp_path / "splits")


def test_what_is_right_is_not_held_for_another_format(tmp_path: Path) -> None:
    """Foreign files beside the data do not matter."""
    write_npz(tmp_path, LATENTS)
    empty("a.tar", "b.zip", "notes.txt")(tmp_path)
    assert len(Latents(tmp_path / "set.npz")) == 6
    image("pictures/cat/1.png")(tmp_path)
    empty("pictures/a.tar", "pictures/cat/labels.pt")(tmp_path)
    assert len(ImageFolder(tmp_path / "pictures", 8)) == 1
    assert Photos(size=8).summary().notes == ()
