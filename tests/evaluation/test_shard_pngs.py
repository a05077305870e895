"""PNG files of a set, with its shards and afterwards."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mixflow_fast.evaluation.sample_sets import read_set, write_set
from mixflow_fast.evaluation.shard_pngs import ShardPngs
from tests.support.sample_sets import make, pictures, plan


def test_each_picture_has_a_file_of_its_number(tmp_path: Path) -> None:
    pngs = ShardPngs(tmp_path / "a", 4)
    assert write_set(make, plan(), tmp_path / "a", on_shard=pngs.on_shard)
    expected = pictures(torch.arange(11)).movedim(1, -1).numpy()
    names = sorted(path.name for path in (tmp_path / "a" / "png").iterdir())
    assert names == [f"{n:06d}.png" for n in range(11)]
    for number, picture in enumerate(expected):
        assert np.array_equal(np.asarray(Image.open(pngs.path(number))), picture)
    # What is gone is written from the file of all, and what is there is left.
    pngs.path(7).unlink()
    pngs.path(0).write_bytes(b"mine")
    pngs.complete(read_set(tmp_path / "a"))
    assert np.array_equal(np.asarray(Image.open(pngs.path(7))), expected[7])
    assert pngs.path(0).read_bytes() == b"mine"


def test_grey(tmp_path: Path) -> None:
    grey = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3, 1)
    pngs = ShardPngs(tmp_path, 2)
    pngs.on_shard(1, grey)
    image = Image.open(pngs.path(3))
    assert image.mode == "L" and np.array_equal(np.asarray(image), grey[1, ..., 0])
