"""Images in and out: tensors in [-1, 1] to 8-bit pixels, and grids of them as PNG files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.files import write_bytes


def to_uint8(x: Tensor) -> Tensor:
    """Pixels of images in [-1, 1]: (..., C, H, W) float -> (..., H, W, C) uint8 on the CPU.

    -1 -> 0, 1 -> 255, nearest in between: floor(127.5 x + 128), clipped, as SiT and ADM save them.

    Raises:
        ValueError: fewer than three dimensions, not float, NaN or infinity.
    """
    if x.dim() < 3 or not x.is_floating_point():
        raise ValueError(f"x must be a (..., C, H, W) float tensor, got {tuple(x.shape)} {x.dtype}")
    x = x.detach().to("cpu", torch.float32)
    if not torch.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or infinity: the sampler or the model diverged")
    return (127.5 * x + 128.0).clamp(0, 255).to(torch.uint8).movedim(-3, -1).contiguous()


def grid_png_bytes(x: Tensor, columns: int, scale: int = 1, padding: int = 2) -> bytes:
    """A PNG with the images in rows of `columns`, the last row filled up with white.

    The top left pixel of image i lies at row (i // columns) (H scale + padding), column
    (i % columns) (W scale + padding); padding is white and only between images.

    Args:
        x: (B, C, H, W) float in [-1, 1] or uint8, C = 1 (gray) or 3 (RGB), B >= 1.
        columns: images per row; a wider grid than B has B columns.
        scale: integer factor of the nearest-neighbour enlargement.
        padding: pixels between images, not enlarged.

    Raises:
        ValueError: a shape or a number other than those.
    """
    if x.dim() != 4 or x.shape[0] < 1 or x.shape[1] not in (1, 3):
        raise ValueError(
            "x must be (B, C, H, W) with B >= 1 and C = 1 or 3 (decode latents first), "
            f"got {tuple(x.shape)}"
        )
    for name, value, least in (
        ("columns", columns, 1),
        ("scale", scale, 1),
        ("padding", padding, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    from PIL import Image

    tiles = x.cpu().movedim(-3, -1) if x.dtype == torch.uint8 else to_uint8(x)
    tiles = tiles.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    count, height, width, channels = tiles.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    canvas = torch.full(
        (rows * (height + padding) - padding, columns * (width + padding) - padding, channels),
        255,
        dtype=torch.uint8,
    )
    for i, tile in enumerate(tiles):
        top, left = (i // columns) * (height + padding), (i % columns) * (width + padding)
        canvas[top : top + height, left : left + width] = tile
    pixels = canvas[..., 0] if channels == 1 else canvas
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def save_grid(
    path: str | os.PathLike[str], x: Tensor, columns: int, scale: int = 1, padding: int = 2
) -> None:
    """Write `grid_png_bytes` to `path`, whole or not at all; folders are made."""
    write_bytes(path, grid_png_bytes(x, columns, scale, padding))


def save_captioned(
    path: str | os.PathLike[str], pictures: dict[str, Path], columns: int = 2, gap: int = 12
) -> None:
    """Pictures of one size in rows of `columns`, each under its caption, written as one PNG.

    Args:
        path: the PNG; folders are made.
        pictures: caption -> image file.
        columns: pictures in a row.
        gap: pixels between them.
    """
    from PIL import Image, ImageDraw, ImageFont

    images = {caption: Image.open(file).convert("RGB") for caption, file in pictures.items()}
    font = ImageFont.load_default(size=20)
    top = 30
    width, height = (max(size) for size in zip(*(i.size for i in images.values()), strict=True))
    columns, rows = min(columns, len(images)), -(-len(images) // columns)
    whole = columns * (width + gap) - gap, rows * (top + height + gap) - gap
    canvas = Image.new("RGB", whole, "white")
    draw = ImageDraw.Draw(canvas)
    for place, (caption, image) in enumerate(images.items()):
        left, upper = place % columns * (width + gap), place // columns * (top + height + gap)
        draw.text((left, upper + 3), caption, fill="black", font=font)
        canvas.paste(image, (left, upper + top))
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())
