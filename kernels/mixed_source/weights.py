"""Weights w of a mixed source, by the position or id of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream


def draw_weight(source: MixedSource, seed: int | Tensor, ids: Tensor, stream: Stream) -> Tensor:
    """(B,) float32 weights w of the mixture."""
    if isinstance(source.w, float):
        return torch.full(ids.shape, source.w, device=ids.device)
    if source.discrete:
        # Every k of 0..n is as likely as the next, both ends included: w = 1 is trained.
        k = (philox.random_words(seed, stream, ids)[:, 0] * (source.discrete + 1)) >> 32
        return k.to(torch.float32) / source.discrete
    return philox.uniform(seed, stream, ids)[:, 0]
