"""A folder of images in classes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support.datasets import halved_photos


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of real windows (lossless), 6 images, one of them in a sub-folder."""
    photos = halved_photos()
    for label, name in enumerate(("b_china", "a_flower")):
        (tmp_path / name / "sub").mkdir(parents=True)
        for number in range(3):
            window = photos[label, 20 * number : 20 * number + 18, 30:51]
            file = tmp_path / name / ("sub" if number == 2 else "") / f"{number}.png"
            Image.fromarray(np.rint((window + 1) * 127.5).astype(np.uint8)).save(file)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "a_flower" / "notes.txt").write_text("no image")
    return tmp_path
