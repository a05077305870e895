"""Sizes that pictures of many shapes are brought to: which one an image goes to, and its crop.

An image becomes its bucket's crop by ADM's rule (`image_folder.cover_crop`), so a square bucket
has the bits of the square crops that other sets are made of. EXIF's orientation is not applied,
by the rule of `data/decoding.py`: an image's size is the one it is stored in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mixflow_fast.data.image_folder import cover_crop

if TYPE_CHECKING:
    from PIL import Image

_STEP = 16  # pixels: 8 of the autoencoder times the network's patch of 2
_NAME = re.compile(r"([0-9]{1,6})(?:x([0-9]{1,6}))?")


@dataclass(frozen=True)
class Bucket:
    """A size in pixels; both sides are multiples of 16.

    Raises:
        ValueError: a side that is none.
    """

    width: int
    height: int

    def __post_init__(self) -> None:
        for side in (self.width, self.height):
            if side < _STEP or side % _STEP:
                near = ", ".join(
                    str(n) for n in (side // _STEP * _STEP, side // _STEP * _STEP + _STEP) if n
                )
                raise ValueError(
                    f"bucket {self.width}x{self.height} must have sides that are multiples of "
                    f"{_STEP} pixels, got {side}: {near} would do"
                )

    @property
    def name(self) -> str:
        """ "1152x896": width before height."""
        return f"{self.width}x{self.height}"

    def latent_shape(self, channels: int = 16, factor: int = 8) -> tuple[int, int, int]:
        """(C, h, w) of a latent: a pixel of it stands for `factor` x `factor` pixels."""
        return channels, self.height // factor, self.width // factor

    def enlarges(self, size: tuple[int, int]) -> bool:
        """Whether an image of (width, height) pixels is enlarged to cover the bucket."""
        return size[0] < self.width or size[1] < self.height


def parse_buckets(names: Iterable[str]) -> tuple[Bucket, ...]:
    """Buckets by their names, in the order in which they are given.

    Args:
        names: such as "1152x896", or "512" for 512x512.

    Raises:
        ValueError: none, another form, sides that are no multiples of 16, one given twice.
    """
    if isinstance(names, str):
        names = names.split(",")
    found: list[Bucket] = []
    for name in names:
        match = _NAME.fullmatch(name.strip())
        if match is None:
            raise ValueError(
                f"bucket {name!r} is no size in pixels: expected WIDTHxHEIGHT such as 1152x896, or "
                "one number for a square"
            )
        bucket = Bucket(int(match[1]), int(match[2] or match[1]))
        if bucket in found:
            raise ValueError(f"bucket {bucket.name} is given twice: give each size once")
        found.append(bucket)
    if not found:
        raise ValueError("no bucket is given: give sizes such as 1024x1024,1152x896")
    return tuple(found)


def nearest_bucket(size: tuple[int, int], buckets: Iterable[Bucket]) -> Bucket:
    """The bucket that an image goes to; a function of the set of buckets, not of their order.

    The first is |log((w / h) / (W / H))|, how far the shapes are apart; among buckets of one shape
    |log(w h / (W H))|; where that is equal, too, the bucket of fewer pixels, then the wider one.

    Args:
        size: (width, height) of the image in pixels.
        buckets: at least one.
    """
    width, height = size

    def distance(bucket: Bucket) -> tuple[float, float, int, int]:
        # Ratios instead of logarithms: Python divides integers exactly to the last bit, so that
        # a square image is as far from 1152x896 as from 896x1152.
        shape = _ratio(width * bucket.height, height * bucket.width)
        pixels = bucket.width * bucket.height
        return shape, _ratio(width * height, pixels), pixels, -bucket.width

    return min(buckets, key=distance)


def _ratio(a: int, b: int) -> float:
    """exp |log(a / b)|."""
    return max(a, b) / min(a, b)


def fit_to_bucket(image: Image.Image | np.ndarray, bucket: Bucket) -> np.ndarray:
    """The crop of an image: resized until it just covers the bucket, then its centre.

    Args:
        image: in mode RGB, or (h, w, 3) uint8.
        bucket: the size.

    Returns:
        (H, W, 3) uint8 of the bucket's size.

    Raises:
        ValueError: an image of another mode, an array of another form.
    """
    from PIL import Image as pil

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be (h, w, 3) uint8, got {image.shape} {image.dtype}")
        image = pil.fromarray(image)
    if image.mode != "RGB":
        raise ValueError(
            f"image must be in mode RGB, got {image.mode}: open it by data.decoding.decode_rgb"
        )
    return np.array(cover_crop(image, bucket.width, bucket.height))
