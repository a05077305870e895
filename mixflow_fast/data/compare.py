"""How far the pixels of DALI are from those of Pillow, on this machine, by kind of file.

The two decode with different builds of libjpeg-turbo, and a GPU decodes JPEG by itself; what they
agree on is measured here and not assumed.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data.dali import DaliLoader
from mixflow_fast.data.dali_crop import crop_plan
from mixflow_fast.data.dali_feed import is_ordinary
from mixflow_fast.data.dataset import ImageDataset, without_flips
from mixflow_fast.data.decoding import opened

BATCH = 16
_SUBSAMPLING = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}


@dataclass(frozen=True)
class Kind:
    """What decides how an image is decoded and cropped.

    Attributes:
        file: such as "JPEG 4:2:0"; "by Pillow" for what DALI is not given to decode.
        halvings: of ADM's crop; None where nothing is cropped.
    """

    file: str
    halvings: int | None


@dataclass
class Difference:
    """DALI's pixels against Pillow's, of the images of one kind; bytes 0 to 255.

    Attributes:
        images: how many.
        identical: of them, without any difference.
        psnr: dB of each image that is not identical.
        latents: relative RMS difference of each image's latents, if there is an encoder.
    """

    images: int = 0
    identical: int = 0
    psnr: list[float] = field(default_factory=list)
    latents: list[float] = field(default_factory=list)
    _counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, one: np.ndarray, other: np.ndarray) -> None:
        """Count an image: two uint8 arrays of one shape."""
        counts = np.bincount(np.abs(one.astype(np.int64) - other).ravel(), minlength=256)
        self._counts += counts
        self.images += 1
        squares = float(counts @ np.arange(256) ** 2) / one.size
        if squares:
            self.psnr.append(10 * np.log10(255**2 / squares))
        else:
            self.identical += 1

    @property
    def mean(self) -> float:
        """Mean difference of a value."""
        return float(self._counts @ np.arange(256)) / max(1, int(self._counts.sum()))

    @property
    def largest(self) -> int:
        """Largest difference of a value."""
        return int(self._counts.nonzero()[0].max(initial=0))

    def share_over(self, difference: int) -> float:
        """Share of the values that differ by more."""
        return float(self._counts[difference + 1 :].sum()) / max(1, int(self._counts.sum()))


def kind_of(content: bytes, size: int | None) -> Kind:
    """The kind of an image file.

    Args:
        content: of the file.
        size: side of ADM's crop; None where nothing is cropped.
    """
    with opened(io.BytesIO(content)) as image:
        plan = None if size is None else crop_plan(image.width, image.height, size)
        if size is not None and (plan is None or not is_ordinary(image)):
            return Kind("by Pillow", None)
        sampling = ""
        if image.format == "JPEG":
            from PIL import JpegImagePlugin

            sampling = " " + _SUBSAMPLING.get(JpegImagePlugin.get_sampling(image), "other")
            sampling = " grey" if image.mode == "L" else sampling
        return Kind(f"{image.format}{sampling}", None if plan is None else int(plan[0]))


def compare(
    dataset: ImageDataset,
    count: int,
    device: torch.device,
    encode: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[int], object] = lambda images: None,
) -> dict[Kind, Difference]:
    """Images through Pillow and through DALI as a run on `device` reads them, without mirroring.

    Args:
        dataset: images with encoded files.
        count: how many of its images, drawn at random and always the same.
        device: where DALI decodes.
        encode: latents (B, ...) of (B, 3, S, S) uint8 images on the device.
        advance: called with the number of images that were compared.

    Raises:
        ValueError: DALI cannot be used, or an image that cannot be read.
    """
    plain = without_flips(dataset)
    count = min(count, len(plain))
    found: dict[Kind, Difference] = defaultdict(Difference)
    options = dict(seed=0, global_batch_size=BATCH, microbatch_size=BATCH, device=device)
    with DaliLoader(plain, **options) as loader:
        for first in range(0, count, BATCH):
            batch = next(loader)
            rows = min(BATCH, count - first)
            indices = loader.indices(batch.positions)[:rows]
            truth = plain.get(indices, batch.positions[:rows].cpu(), 0).images
            ours = batch.images[:rows]
            kinds = [
                kind_of(plain.payload(i), plain.size if plain.crops else None)
                for i in indices.tolist()
            ]
            for kind, one, other in zip(kinds, truth.numpy(), ours.cpu().numpy(), strict=True):
                found[kind].add(one, other)
            if encode is not None:
                errors = _relative(encode(truth.to(ours.device)), encode(ours))
                for kind, error in zip(kinds, errors, strict=True):
                    found[kind].latents.append(error)
            advance(rows)
    return dict(sorted(found.items(), key=lambda item: (item[0].file, item[0].halvings or 0)))


def _relative(truth: Tensor, other: Tensor) -> list[float]:
    """Relative RMS difference of each row."""
    off = (other.double() - truth.double()).flatten(1).square().mean(1).sqrt()
    return (off / truth.double().flatten(1).square().mean(1).sqrt().clamp_min(1e-12)).tolist()
