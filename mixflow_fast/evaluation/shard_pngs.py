"""A set's pictures as image files, written with each shard: FOLDER/png/000000.png by id."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from mixflow_fast.evaluation.sample_sets import SampleSet
from mixflow_fast.files import remove_partial, write_bytes

_DIGITS = 6


class ShardPngs:
    """Writes the pictures of shards as PNG files, each whole or not at all.

    Args:
        folder: of the set.
        shard: ids in a shard.
    """

    def __init__(self, folder: Path, shard: int) -> None:
        self._folder, self._shard = folder / "png", shard

    def path(self, number: int) -> Path:
        """The file of an id."""
        return self._folder / f"{number:0{_DIGITS}d}.png"

    def on_shard(self, number: int, pictures: np.ndarray) -> None:
        """Write the files of one shard, (rows, H, W, C) uint8; older ones are replaced."""
        for row, picture in enumerate(pictures):
            self._write(number * self._shard + row, picture)

    def complete(self, made: SampleSet) -> None:
        """Write what is lacking of a whole set, such as one that was made without them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self._folder)
        for number, picture in enumerate(made.pictures):
            if not self.path(number).is_file():
                self._write(number, picture)

    def _write(self, number: int, picture: np.ndarray) -> None:
        from PIL import Image

        content = io.BytesIO()
        grey = picture.shape[-1] == 1
        Image.fromarray(np.ascontiguousarray(picture[..., 0] if grey else picture)).save(
            content, "PNG"
        )
        write_bytes(self.path(number), content.getvalue())
