"""Datasets by name."""

from __future__ import annotations

import pytest

from mixflow_fast.data import Digits, ImageFolder, Latents, Photos, build_dataset
from tests.support.datasets import LATENTS, write_npz


def test_build_dataset(image_folder, tmp_path):
    assert isinstance(build_dataset("photos", split="heldout"), Photos)
    assert isinstance(build_dataset("digits", size=16), Digits)
    assert isinstance(build_dataset("folder", path=image_folder, size=16), ImageFolder)
    assert isinstance(build_dataset("latents", path=write_npz(tmp_path, LATENTS)), Latents)
    with pytest.raises(ValueError, match="got 'photo'; did you mean 'photos'"):
        build_dataset("photo")
    with pytest.raises(ValueError, match="unknown argument 'splt'.*did you mean 'split'"):
        build_dataset("photos", splt="train")
    with pytest.raises(ValueError, match="'folder' needs the argument 'path'"):
        build_dataset("folder", size=16)
    with pytest.raises(ValueError, match="split must be one of train, heldout, all"):
        build_dataset("photos", split="test")
    with pytest.raises(ValueError, match=r"size must be in \[1, 20\]"):
        build_dataset("photos", split="heldout", size=21)
