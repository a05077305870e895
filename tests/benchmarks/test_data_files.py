"""The files of `benchmarks.data`: the same numbers in every layout, images of the usual size."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.data_files import write_jpegs, write_latents
from mixflow_fast.data import Latents


def test_latents_in_three_layouts_are_the_same_numbers(tmp_path) -> None:
    files = write_latents(tmp_path / "files", 5)
    ours = Latents(files.ours)
    every = torch.arange(5)
    rows = torch.cat(ours.get(every, every, 0).x[:2], 1)
    theirs = torch.from_numpy(np.stack([np.load(file) for file in files.repa_npy]))
    assert torch.equal(rows, theirs.half())
    assert torch.equal(load_file(files.lightningdit)["latents"].reshape(theirs.shape), theirs)
    with Image.open(files.repa_png[4]) as image:
        assert image.size == (256, 256)


def test_jpegs_are_of_the_usual_size(tmp_path) -> None:
    write_jpegs(tmp_path, 3)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [file.parent.name for file in files] == ["class0", "class0", "class1"]
    for file in files:
        with Image.open(file) as image:
            assert image.size == (500, 375)
        assert 40_000 < file.stat().st_size < 200_000
