"""The 1000 synsets, and every folder that looks like ImageNet and is not."""

import hashlib
import os
from pathlib import Path

import pytest

from mixflow_fast.data.preparation.imagenet import (
    KNOWN_CMYK,
    KNOWN_PNG,
    check_imagenet,
    choose_scheme,
)
from mixflow_fast.data.preparation.imagenet_synsets import SYNSETS
from mixflow_fast.data.preparation.source import list_source
from tests.support.image_folders import encoded, smooth


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """All class folders with an image each; links, because a thousand files take long."""
    root = tmp_path_factory.mktemp("imagenet")
    (root / "picture.JPEG").write_bytes(encoded(smooth(40, 40, 1), "JPEG"))
    for name in SYNSETS:
        (root / "train" / name).mkdir(parents=True)
        os.symlink(root / "picture.JPEG", root / "train" / name / f"{name}_1.JPEG")
    return root / "train"


def test_the_list_is_the_published_one():
    """SHA-256 of TensorFlow's, timm's and TFDS' list, a synset a line; they are one file."""
    text = "".join(f"{name}\n" for name in SYNSETS)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "70002b0ff5de60a3a17a82dbfcff291931f96225ddf941ad2e182fc39e183d15"
    )
    assert len(set(SYNSETS)) == 1000 and list(SYNSETS) == sorted(SYNSETS)
    assert SYNSETS[0] == "n01440764" and SYNSETS[999] == "n15075141"


def test_known_oddities_are_in_the_classes():
    assert len(KNOWN_CMYK) == 22 and len(KNOWN_PNG) == 1
    assert {name.partition("_")[0] for name in KNOWN_CMYK | KNOWN_PNG} <= set(SYNSETS)


def test_imagenet_is_recognised_and_numbered(imagenet):
    assert choose_scheme(imagenet) == "imagenet"
    source = list_source(imagenet)
    assert source.scheme == "imagenet" and source.classes == SYNSETS
    assert source.labels.tolist() == list(range(1000))


def test_missing_foreign_and_empty_folders_are_named(imagenet):
    lost, aside = imagenet / "n02085620", imagenet.parent / "n02085620"
    os.rename(lost, aside)
    with pytest.raises(ValueError, match="1 of the 1000 synsets are missing: n02085620. A missing"):
        list_source(imagenet)  # recognised although it is not whole
    os.rename(aside, imagenet / "dogs")
    with pytest.raises(ValueError, match="missing: n02085620; 1 folders are none of them: dogs"):
        check_imagenet(imagenet)
    assert list_source(imagenet, "folder").classes[0] == "dogs"
    os.rename(imagenet / "dogs", lost)
    (link,) = lost.iterdir()
    os.rename(link, imagenet.parent / "link")
    with pytest.raises(ValueError, match="1 class folders of .* no image .*n02085620.*unpack"):
        list_source(imagenet)
    os.rename(imagenet.parent / "link", link)
    check_imagenet(imagenet)


def test_a_part_of_imagenet_is_a_folder_of_classes(tmp_path):
    for name in SYNSETS[:3]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.JPEG").write_bytes(encoded(smooth(40, 40, 1), "JPEG"))
    with pytest.raises(ValueError, match="997 of the 1000 synsets are missing.*--classes folder"):
        list_source(tmp_path)
    assert len(list_source(tmp_path, "folder")) == 3


def test_the_devkits_numbers_are_refused(tmp_path):
    """Folders by ILSVRC2012_ID sort plausibly, and every label is then another class."""
    for number in range(1, 1001):
        (tmp_path / str(number)).mkdir()
    for scheme in (None, "imagenet"):
        with pytest.raises(ValueError, match="devkit's ILSVRC2012_ID .*another numbering.*synsets"):
            list_source(tmp_path, scheme)
    (tmp_path / "1000").rmdir()  # digits, as of MNIST
    assert choose_scheme(tmp_path) == "folder"
    with pytest.raises(ValueError, match="ILSVRC2012_ID"):
        check_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "ILSVRC2012_val_00000001.JPEG",
            "validation or test set as it is published, without class",
        ),
        ("n01440764.tar", "holds the archives of the classes .*unpack each"),
    ],
)
def test_imagenet_as_it_is_downloaded(tmp_path, name, words):
    (tmp_path / name).touch()
    for scheme in (None, "imagenet"):
        with pytest.raises(ValueError, match=words):
            list_source(tmp_path, scheme)


def test_other_folders_are_folders(tmp_path):
    (tmp_path / "cat").mkdir(), (tmp_path / "dog").mkdir(), (tmp_path / "n01440764").mkdir()
    assert choose_scheme(tmp_path) == "folder"
    (tmp_path / "n01443537").mkdir()
    assert choose_scheme(tmp_path) == "imagenet"
    with pytest.raises(ValueError, match="998 of the 1000 .*2 folders are none of them: cat, dog"):
        check_imagenet(tmp_path)
