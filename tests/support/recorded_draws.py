"""Recorded numbers in the place of Philox's, by stream: an official run's, or a quadrature's."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream


def use_recorded(monkeypatch: pytest.MonkeyPatch, draws: Mapping[Stream, Tensor]) -> list[Stream]:
    """Give out `draws` (B, ...) from now on; another stream than these is a KeyError.

    Words (the weights "discrete(n)") are recorded as they are, uniform and normal numbers as
    floating-point tensors of any precision.

    Returns:
        the streams in the order in which they are drawn; it grows with every draw.
    """
    drawn: list[Stream] = []

    def recorded(
        seed: Tensor, stream: Stream, ids: Tensor, numel: int = 1, impl: str = "auto"
    ) -> Tensor:
        drawn.append(Stream(stream))
        values = draws[Stream(stream)].reshape(len(ids), -1)
        assert values.shape[1] == numel
        return values

    for name in ("normal", "uniform", "random_words"):
        monkeypatch.setattr(philox, name, recorded)
    return drawn


def words_of(k: Tensor, n: int) -> Tensor:
    """32-bit words from which k of 0..n comes out."""
    return (k.to(torch.int64) << 32) // (n + 1) + 1
