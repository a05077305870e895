"""What the network trains on, made from a batch on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.data import Batch
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.models.autoencoders import Encoder


class Inputs:
    """What the network trains on, from a batch on the device.

    Scaling to floats happens here, so that all loaders share one rounding, and the images travel
    as bytes.

    Args:
        encoder: makes latents of the images; None where the network trains on what the data give.
    """

    def __init__(self, encoder: Encoder | None = None) -> None:
        self.encoder = encoder

    def move_encoder(self, device: torch.device) -> None:
        """Take the encoder to the device, once it is sure that the run begins there."""
        if self.encoder is not None:
            self.encoder.to(device)

    def __call__(self, batch: Batch) -> Tensor | Moments:
        """The batch's x; of images their latents, or images / 127.5 - 1, (B, 3, H, H) float32.

        Raises:
            ValueError: an encoder without images, a batch without either.
        """
        if self.encoder is not None:
            if batch.images is None:
                raise ValueError(
                    "the encoder needs images, which these data do not give: set data.kind=images, "
                    "folder or webdataset, or encoder.kind=none"
                )
            return self.encoder(batch.images)
        if batch.x is not None:
            return batch.x
        if batch.images is None:
            raise ValueError("a batch must have x or images, got one with neither")
        return batch.images.float() / 127.5 - 1.0
