"""What goes into the DALI pipeline for a micro-batch; made on the host, without DALI.

Everything that is random is an input: whether an example is mirrored is a number, and DALI draws
nothing.

DALI decodes ordinary files to the bits of Pillow. Where it would not (measured: it drops
transparency where `data/decoding.py` puts the image over white, and it may scale 16 bits where
Pillow keeps the high byte), and where one picture in a million is not worth finding out on every
GPU (CMYK, palettes, pictures with previews), the file is decoded and cropped here, by the one rule,
and DALI gets the pixels as a lossless file. Headers are enough to tell.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mixflow_fast.data.dali_crop import crop_plan
from mixflow_fast.data.dataset import mirrored
from mixflow_fast.data.decoding import opened, read_rgb
from mixflow_fast.data.image_folder import adm_center_crop
from mixflow_fast.data.label_dropout import LabelDropout

if TYPE_CHECKING:
    from PIL import Image

# What DALI is trusted with, in Pillow's names.
_FORMATS = {"JPEG", "PNG", "WEBP"}
_MODES = {"RGB", "L"}


@dataclass(frozen=True)
class Feed:
    """One micro-batch of M samples, as the pipeline takes it.

    Attributes:
        indices, positions: (M,) int64, of `MicrobatchOrder`.
        payloads: M encoded files, uint8 arrays.
        numbers: M int64 arrays of one value, the positions; they come back with the pixels.
        flips: M int32 arrays of one value, 1 where the example is mirrored.
        plans: M arrays of `crop_plan`; empty where nothing is cropped.
    """

    indices: Tensor
    positions: Tensor
    payloads: list[np.ndarray]
    numbers: list[np.ndarray]
    flips: list[np.ndarray]
    plans: list[np.ndarray]

    def inputs(self) -> tuple[list[np.ndarray], ...]:
        """What the pipeline's `external_source` returns."""
        always = self.payloads, self.numbers, self.flips
        return (*always, self.plans) if self.plans else always


def make_feed(dataset: LabelDropout, indices: Tensor, positions: Tensor, seed: int) -> Feed:
    """Read the files of a micro-batch.

    Args:
        dataset: around images with encoded files.
        indices, positions: (M,) int64.
        seed: of the run.

    Raises:
        ValueError: a file that is no image, or that is refused; names it and its position.
    """
    payloads, plans = [], []
    for index, position in zip(indices.tolist(), positions.tolist(), strict=True):
        content = dataset.payload(index)
        if dataset.crops:
            try:
                content, plan = _prepared(content, dataset.size)
            except ValueError as error:
                raise bad_sample(dataset, index, position, error) from error
            plans.append(plan)
        payloads.append(np.frombuffer(content, np.uint8))
    flips = np.zeros(len(indices), np.int32)
    if dataset.flip:
        flips = mirrored(positions, seed).numpy().astype(np.int32)
    return Feed(indices, positions, payloads, list(positions.numpy()), list(flips), plans)


def bad_sample(dataset: LabelDropout, index: int, position: int, error: object) -> ValueError:
    """The error for a sample whose file cannot be read."""
    return ValueError(
        f"cannot read the image {dataset.name_of(index)!r} (sample {index}, at position "
        f"{position}): {error}. To go on with a run, put a readable copy in its place: without "
        "the file the examples have another order"
    )


def check_by_pillow(dataset: LabelDropout, feed: Feed) -> None:
    """Decode a micro-batch by Pillow.

    Raises:
        ValueError: names the first file that cannot be decoded, and its position.
    """
    rows = zip(feed.indices.tolist(), feed.positions.tolist(), strict=True)
    for payload, (index, position) in zip(feed.payloads, rows, strict=True):
        try:
            read_rgb(io.BytesIO(payload.tobytes()))
        except ValueError as error:
            raise bad_sample(dataset, index, position, error) from error


def _prepared(content: bytes, size: int) -> tuple[bytes, np.ndarray]:
    """A file that DALI decodes as Pillow does, and the plan of its crop."""
    with opened(io.BytesIO(content)) as image:
        plan = crop_plan(image.width, image.height, size) if is_ordinary(image) else None
    if plan is not None:
        return content, plan
    image = adm_center_crop(read_rgb(io.BytesIO(content)), size)
    lossless = io.BytesIO()
    image.save(lossless, "PNG", compress_level=1)
    plan = crop_plan(size, size, size)
    assert plan is not None
    return lossless.getvalue(), plan


def is_ordinary(image: Image.Image) -> bool:
    """Whether DALI may decode an opened image: 8 bits, grey or YCbCr or RGB, no transparency."""
    # Pillow's decoder of a PNG is told of 16 bits in its last argument: "RGB;16B".
    wide = image.format == "PNG" and any("16" in str(tile[3]) for tile in image.tile)
    return (
        image.format in _FORMATS
        and image.mode in _MODES
        and "transparency" not in image.info
        and image.info.get("adobe_transform") != 0  # a JPEG that holds RGB itself
        and not wide
    )
