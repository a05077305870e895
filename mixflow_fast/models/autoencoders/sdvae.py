"""Stable Diffusion's autoencoders (Rombach et al., arXiv 2112.10752), of diffusers.

    mean, logvar = encode(image / 127.5 - 1)        logvar clamped to [-30, 20]
    x1 = scale ((mean - shift) + exp(logvar / 2) eps),  eps ~ N(0, I)
    image = decode(x1 / scale + shift)              around [-1, 1]

Stable Diffusion 1 and 2 have 4 channels, scale 0.18215 and no shift; Stable Diffusion 3 has 16,
1.5305 and 0.0609. Moments hold the mean without the shift, so that nothing behind them knows of it.

Weights are read from a local folder, and nothing is ever downloaded. Float32 with PyTorch's own
choice of TF32, as the encodings of SiT and REPA were made. Never in tiles: their seams change the
latents.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mixflow_fast.files import sha256
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.models.autoencoders.sdvae_files import (
    WEIGHTS,
    SDVAEFiles,
    load_autoencoder,
    quiet_diffusers,
)
from mixflow_fast.models.dinov2 import PRECISIONS, Precision
from mixflow_fast.models.execution import Execution, runner
from mixflow_fast.models.text_to_image.adapter import LatentMap

__all__ = ["SDVAE", "ImageVAE", "SDVAEDecoder", "SDVAEFiles"]

# Mean and std of a posterior, by the network, of images.
_Forward = Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]


class ImageVAE:
    """A frozen `AutoencoderKL` from a local folder: images of any size in, `Moments` out.

    Args:
        path: folder with config.json and diffusion_pytorch_model.safetensors.
        precision: "fp32", or "bf16" of weights and activations: about 1% off in the mean.
        name: what `path` is called where it was given, for errors.

    Attributes:
        files: what its config.json says.
        scale: factor of the latents, which the moments carry and which is not applied.
        model: the network without its decoder, in eval mode, without gradients, channels last.

    Raises:
        ValueError: missing, foreign or damaged files, diffusers not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Precision = "fp32",
        name: str = "encoder.path",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        self.files = SDVAEFiles.read(path, name)
        self.scale = self.files.scale
        self.precision: Precision = precision
        model = load_autoencoder(self.files)
        # What decodes is no part of encoding: it would take 200 MB of the device.
        model.decoder = model.post_quant_conv = None
        self._dtype = PRECISIONS[precision]
        model = model.eval().requires_grad_(False)
        with quiet_diffusers():
            self.model: nn.Module = model.to(self._dtype, memory_format=torch.channels_last)

    def to(self, device: str | torch.device) -> ImageVAE:
        """Take it to a device; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Moments:
        """Moments of the latents of a batch, without a graph.

        Args:
            images: (B, 3, H, W) uint8 on the device of the weights; sides are multiples of
                `files.downsampling`.

        Returns:
            mean without the shift and std, (B, C, h, w) float32 each, and `scale`.

        Raises:
            ValueError: another shape or dtype.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        self.files.shape(images.shape[2], images.shape[3])
        return self._moments(images, _mean_and_std)

    def _moments(self, images: Tensor, forward: _Forward) -> Moments:
        x = images.to(torch.float32, memory_format=torch.channels_last) / 127.5 - 1.0
        # The bits must not depend on a caller's autocast.
        with torch.autocast(x.device.type, enabled=False):
            mean, std = forward(self.model, x.to(self._dtype))
        return self.files.latents.moments(mean, std)

    def record(self) -> dict[str, str]:
        """What identifies the encoder: `SDVAEFiles.record`."""
        return self.files.record()


class SDVAE(ImageVAE):
    """One for square images of one size, compiled on CUDA devices.

    Args:
        size: side of the images in pixels; the others as `ImageVAE`.

    Attributes:
        shape: (C, h, w) of a latent.

    Raises:
        ValueError: as `ImageVAE`, and a size that does not fit.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        precision: Precision = "fp32",
        name: str = "encoder.path",
    ) -> None:
        if precision in PRECISIONS:
            # Before the weights are read.
            SDVAEFiles.read(path, name).shape(size)
        super().__init__(path, precision=precision, name=name)
        self.shape = self.files.shape(size)
        self._compiled = runner(_mean_and_std, Execution(mode="compile"), ())

    def to(self, device: str | torch.device) -> SDVAE:
        """Take it to a device; returns itself."""
        super().to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Moments:
        """As `ImageVAE`, of (B, 3, size, size) alone; on CUDA devices by torch.compile."""
        side = self.shape[1] * self.files.downsampling
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (3, side, side):
            raise ValueError(
                f"images must be uint8 (B, 3, {side}, {side}), got {images.dtype} "
                f"{tuple(images.shape)}"
            )
        on_gpu = images.device.type == "cuda"
        return self._moments(images, self._compiled if on_gpu else _mean_and_std)


class SDVAEDecoder:
    """The other half of a frozen `AutoencoderKL`: latents in, images around [-1, 1] out.

    Args:
        path: folder with config.json and diffusion_pytorch_model.safetensors.
        precision: "fp32", or "bf16" of weights and activations.
        scale: what the latents were multiplied by; None: the file's scaling_factor.
        name: what `path` is called where it was given, for errors.

    Attributes:
        kind: "sdvae", of a protocol.
        low: what black is, of images that reach to 1.
        channels: C of a latent; its sides are free.
        upsampling: pixels along the side of a place of the latent.
        scale: as above.
        shift: the file's, which is added after the division by the scale.
        model: the network without its encoder, in eval mode, without gradients, channels last.

    Raises:
        ValueError: missing, foreign or damaged files, a scale that is not positive, diffusers not
            installed.
    """

    kind, low = "sdvae", -1.0

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        precision: Precision = "fp32",
        scale: float | None = None,
        name: str = "--decoder",
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
        self.files = SDVAEFiles.read(path, name)
        self.scale = self.files.scale if scale is None else scale
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"the scale of latents must be a number > 0, got {scale!r}")
        self.channels, self.upsampling = self.files.latent_channels, self.files.downsampling
        self.precision: Precision = precision
        self.shift = self.files.shift
        model = load_autoencoder(self.files)
        model.encoder = model.quant_conv = None
        self._dtype = PRECISIONS[precision]
        model = model.eval().requires_grad_(False)
        with quiet_diffusers():
            self.model: nn.Module = model.to(self._dtype, memory_format=torch.channels_last)

    def to(self, device: str | torch.device) -> SDVAEDecoder:
        """Take it to a device; returns itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents as a network makes them, at their `scale`.

        Args:
            latents: (B, C, h, w) floating, on the device of the weights.

        Returns:
            (B, 3, H, W) float32 in NCHW, around [-1, 1], not clamped.

        Raises:
            ValueError: another number of channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"latents must be (B, {self.channels}, h, w) for {str(self.files.path)!r}, got "
                f"{tuple(latents.shape)}"
            )
        z = LatentMap(self.shift, self.scale).decode(latents.float())
        z = z.to(self._dtype, memory_format=torch.channels_last)
        with torch.autocast(z.device.type, enabled=False):
            return self.model.decode(z).sample.float().contiguous()

    def record(self) -> dict[str, str | float]:
        """Of a protocol: kind, SHA-256 of the weights, scale, and shift where there is one."""
        record: dict[str, str | float] = {
            "kind": self.kind,
            "sha256": sha256(self.files.path / WEIGHTS),
            "scale": self.scale,
        }
        return record | ({"shift": self.shift} if self.shift else {})


def _mean_and_std(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float32 in NCHW."""
    posterior = model.encode(x).latent_dist
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return mean.contiguous(), torch.exp(0.5 * logvar).contiguous()
