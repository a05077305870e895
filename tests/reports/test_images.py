"""Pixels and grids of samples."""

from __future__ import annotations

import io
import math

import pytest
import torch

from mixflow_fast.reports.images import grid_png_bytes, save_grid, to_uint8


def test_pixels() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 9.0, 126.6 / 127.5 - 1, 126.4 / 127.5 - 1, -0.2])
    # 127.5 (x + 1) rounded to the nearest, and x = 0, half way, upwards.
    assert to_uint8(x.view(1, 1, 2, 4)).flatten().tolist() == [0, 0, 128, 255, 255, 127, 126, 102]
    rgb = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 5) - 1
    assert to_uint8(rgb).shape == (2, 5, 3) and to_uint8(rgb)[1, 4].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.full((1, 1, 1), math.nan))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels: int) -> None:
    from PIL import Image

    images = torch.linspace(-1, 0.9, 5 * channels * 2 * 3).view(5, channels, 2, 3)
    path = tmp_path / "new" / "grid.png"
    save_grid(path, images, columns=2, scale=4, padding=3)
    assert path.read_bytes() == grid_png_bytes(images, 2, 4, 3)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    grid = Image.open(io.BytesIO(path.read_bytes()))
    assert grid.mode == {1: "L", 3: "RGB"}[channels]
    assert grid.size == (2 * 12 + 3, 3 * 8 + 2 * 3)
    covered = set()
    for index in range(5):
        top, left = (index // 2) * (8 + 3), (index % 2) * (12 + 3)
        for row in range(8):
            for column in range(12):
                pixel = grid.getpixel((left + column, top + row))
                expected = to_uint8(images[index])[row // 4, column // 4].tolist()
                assert pixel == (expected[0] if channels == 1 else tuple(expected))
                covered.add((left + column, top + row))
    white = 255 if channels == 1 else (255, 255, 255)
    for x in range(grid.width):
        for y in range(grid.height):
            assert (x, y) in covered or grid.getpixel((x, y)) == white


def test_pictures_of_8_bits_are_taken_as_they_are() -> None:
    x = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    pictures = to_uint8(x).movedim(-1, -3)
    assert grid_png_bytes(pictures, columns=2) == grid_png_bytes(x, columns=2)


def test_grid_errors() -> None:
    with pytest.raises(ValueError, match="decode latents"):
        grid_png_bytes(torch.zeros(1, 4, 2, 2), 1)
    for bad in ({"columns": 0}, {"columns": 1, "scale": 0}, {"columns": 1, "padding": -1}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            grid_png_bytes(torch.zeros(1, 1, 2, 2), **bad)
