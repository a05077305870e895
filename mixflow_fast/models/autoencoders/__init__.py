"""Frozen autoencoders between images and what a network trains on, and what all encoders offer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.interpolate import Moments


class Encoder(Protocol):
    """From images to latents, on the device, inside a training step.

    An encoder is no `nn.Module`, so that no module can take it for a part of itself: it has no
    place in the optimizer, the EMA, DeepSpeed or a checkpoint.

    Attributes:
        shape: (C, h, w) of one latent, as the network takes it: for `Moments` that of the mean.
        model: the network, in eval mode, without gradients.
    """

    shape: tuple[int, int, int]
    model: nn.Module

    def __call__(self, images: Tensor) -> Tensor | Moments:
        """Latents of a batch, without a graph and untouched by a caller's autocast.

        Args:
            images: (B, 3, H, H) uint8 on the encoder's device.

        Returns:
            (B, C, h, w) floating; or the moments of a posterior, whose mean and std are so.
        """
        ...

    def to(self, device: str | torch.device) -> Encoder:
        """Take it to a device; returns itself."""
        ...


__all__ = ["Encoder"]
