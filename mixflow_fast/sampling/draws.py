"""What is drawn for samples, by id: labels, and the noise of stochastic samplers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal, random_words


def draw_labels(seed: int, ids: Tensor, num_classes: int, balanced: bool = False) -> Tensor:
    """Class labels of the samples `ids`: (B,) int64 in [0, num_classes).

    Uniform from (seed, Stream.SAMPLE_LABEL, id), or id % num_classes when `balanced` (every class
    equally often: the protocol of 50 images per class).
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    if balanced:
        return ids % num_classes
    # Integers all the way: a float product may round up to num_classes.
    return (random_words(seed, Stream.SAMPLE_LABEL, ids)[:, 0] * num_classes) >> 32


def sde_keys(seed: int, steps: int) -> Tensor:
    """Keys of the noise of intervals 0 .. steps - 1: (steps,) int64 on the CPU.

    Interval k has its own, from Stream.SAMPLE_SDE at the position k; the 64 bits are a seed's.
    """
    words = random_words(seed, Stream.SAMPLE_SDE, torch.arange(steps, device="cpu"), 2)
    return words[:, 0] | words[:, 1] << 32


def sde_noise(seed: int, ids: Tensor, step: int, shape: tuple[int, ...]) -> Tensor:
    """Noise of a stochastic sampler's interval: (B, *shape) float32, from (seed, id, step)."""
    return SdeNoise(sde_keys(seed, step + 1), ids, shape)(step)


class SdeNoise:
    """Number of an interval -> its noise, (B, *shape) float32 on the device of the ids.

    Args:
        keys: of `sde_keys`, on the CPU.
        ids: (B,) int64.
        shape: of one sample.
    """

    def __init__(self, keys: Tensor, ids: Tensor, shape: tuple[int, ...]) -> None:
        # The bits of a seed, which are not negative.
        self._keys = [key & 0xFFFFFFFFFFFFFFFF for key in keys.tolist()]
        self._ids, self._shape = ids, shape

    def __call__(self, step: int) -> Tensor:
        numel = math.prod(self._shape)
        noise = normal(self._keys[step], Stream.SAMPLE_SDE, self._ids, numel)
        return noise.view(-1, *self._shape)
