"""A small prepared set, made by the command's own functions, of images that are its crops."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from mixflow_fast.data.preparation.prepare import Settings, prepare
from mixflow_fast.data.preparation.source import list_source

SIDE = 32
# Seven images of three classes; numbers 2 and 6 of the source cannot be read.
PIXELS = torch.randint(
    0, 256, (7, SIDE, SIDE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)
)
SOURCE = np.array([0, 1, 3, 4, 5, 7, 8])
LABELS = np.array([0, 0, 1, 1, 1, 2, 2])


def write_prepared(root, image_format="raw"):
    """The set, and its source beside it."""
    folder = root.with_name(f"{root.name}-source")
    for number, label in enumerate([0, 0, 0, 1, 1, 1, 2, 2, 2]):
        file = folder / f"class{label}" / f"{number:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number in SOURCE:
            pixels = PIXELS[SOURCE.tolist().index(number)].numpy()
            Image.fromarray(pixels).save(file)
        else:
            file.write_bytes(b"no image")
    source = list_source(folder, "folder")
    prepare(source, root, Settings(SIDE, image_format, shard_rows=5), on_bad="skip", threads=1)
    return root
