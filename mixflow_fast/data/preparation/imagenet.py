"""The class folders of ImageNet-1k: they must be the 1000 synsets, or every label may be wrong.

Labels are places in a sorted list, so one folder that is missing shifts all that follow it, and a
folder named by another numbering gives plausible labels that are all wrong.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mixflow_fast.data.decoding import IMAGE_SUFFIXES
from mixflow_fast.data.preparation.imagenet_synsets import SYNSETS
from mixflow_fast.messages import shorten

Scheme = Literal["imagenet", "folder"]
TRAIN_IMAGES, TRAIN_CLASS_IMAGES = 1_281_167, (732, 1300)
# JPEGs of the training set that are CMYK, and one PNG by the name of a JPEG, as TensorFlow's
# converters list them. They are read like all others.
KNOWN_PNG = frozenset({"n02105855_2933"})
KNOWN_CMYK = frozenset(
    """
n01739381_1309 n02077923_14822 n02447366_23489 n02492035_15739 n02747177_10752 n03018349_4028
n03062245_4620 n03347037_9675 n03467068_12171 n03529860_11437 n03544143_17228 n03633091_5218
n03710637_5125 n03961711_5286 n04033995_2932 n04258138_17003 n04264628_27969 n04336792_7448
n04371774_5854 n04596742_4225 n07583066_647 n13037406_4650
""".split()
)
_SYNSET = re.compile(r"n\d{8}")
_NUMBERED = frozenset(map(str, range(1, 1001)))
_ORDER = "labels here are places in the sorted synsets (n01440764 = 0 ... n15075141 = 999)"


def choose_scheme(root: Path) -> Scheme:
    """What the classes of a folder are where nobody said it.

    "imagenet" where half of its folders or more are named as synsets, or it holds what ImageNet is
    published as; else "folder".

    Raises:
        ValueError: the folders are 1 to 1000, which may be the numbers of ImageNet's devkit.
    """
    folders, files = _contents(root)
    if set(folders) == _NUMBERED:
        raise ValueError(
            f"{_devkit(root)}. If they are classes of another kind, give --classes folder, whose "
            "labels are places in the alphabetical order (1, 10, 100, 1000, 101, ...)"
        )
    synsets = sum(_SYNSET.fullmatch(name) is not None for name in folders)
    if synsets and 2 * synsets >= len(folders):
        return "imagenet"
    return "imagenet" if not folders and _published(root, files) else "folder"


def check_imagenet(root: Path) -> None:
    """Refuse a folder whose class folders are not exactly the 1000 synsets, each with images.

    Raises:
        ValueError: names what is missing and what is foreign; the validation set as it is
            published, archives that were not unpacked and the devkit's numbers in words of their
            own.
    """
    folders, files = _contents(root)
    if not folders and (words := _published(root, files)):
        raise ValueError(words)
    if folders and all(name.isdigit() for name in folders):
        raise ValueError(_devkit(root))
    known = set(SYNSETS)
    missing = [name for name in SYNSETS if name not in set(folders)]
    foreign = [name for name in folders if name not in known]
    if missing or foreign:
        parts = []
        if missing:
            parts.append(f"{len(missing)} of the 1000 synsets are missing: {shorten(missing)}")
        if foreign:
            parts.append(f"{len(foreign)} folders are none of them: {shorten(foreign)}")
        raise ValueError(
            f"{root} is not ImageNet-1k: {'; '.join(parts)}. A missing folder would shift all "
            "labels after it: complete the copy, or give --classes folder for another set of "
            "classes (a part of ImageNet, say)"
        )
    empty = [name for name in SYNSETS if not _has_image(root / name)]
    if empty:
        raise ValueError(
            f"{len(empty)} class folders of {root} hold no image ({', '.join(IMAGE_SUFFIXES)}): "
            f"{shorten(empty)}. The copy is not complete: unpack their archives again"
        )


def _published(root: Path, files: Sequence[str]) -> str:
    """What is said where a folder holds ImageNet as it is downloaded; "" where it does not."""
    if any(re.fullmatch(r"n\d{8}\.tar", name) for name in files):
        return (
            f"{root} holds the archives of the classes (n01440764.tar, ...): unpack each into a "
            "folder of its name"
        )
    if any(name.startswith(("ILSVRC2012_val_", "ILSVRC2012_test_")) for name in files):
        return (
            f"{root} is ImageNet's validation or test set as it is published, without class "
            "folders: sort its images into folders by synset. The devkit's ground truth numbers "
            f"the classes by ILSVRC2012_ID, which is another order: {_ORDER}"
        )
    return ""


def _devkit(root: Path) -> str:
    return (
        f"the folders of {root} are numbers: if they are the devkit's ILSVRC2012_ID (1 to 1000), "
        f"that is another numbering, and {_ORDER}: name the folders by their synsets "
        "(`WNID` in the devkit's meta.mat)"
    )


def _contents(root: Path) -> tuple[list[str], list[str]]:
    """Names of (folders, files), sorted, without hidden ones."""
    folders, files = [], []
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.name[0] != ".":
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def _has_image(folder: Path) -> bool:
    return any(
        name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)
        for _, _, names in os.walk(folder)
        for name in names
    )
