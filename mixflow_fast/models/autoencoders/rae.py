"""RAE's encoder (Zheng et al., arXiv 2510.11690): DINOv2 with registers, and its statistics.

    image / 255 -> bicubic to (R, R), no antialiasing -> (image - mean) / std -> DINOv2
        -> last hidden state after a final LayerNorm without weight and bias, without class and
        register tokens -> (D, h, w) -> (z - mean) / sqrt(var + 1e-5)

R is 14 pixels a token: 224 for images of 256 pixels, 448 for 512, so that a token stands for
16 x 16 pixels of the image. Resized first and normalised after, and nothing is clamped: the order
of the official code (REPA's teacher has the other one). Its noise is for training the decoder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixflow_fast.files import existing_path
from mixflow_fast.messages import shorten
from mixflow_fast.models.dinov2 import (
    Dinov2,
    Dinov2Files,
    Owner,
    Precision,
    normalise,
    resize,
)
from mixflow_fast.models.weights.files import WeightsFile

PIXELS_PER_TOKEN = 16
EPS = 1e-5
RAE = Owner(
    "encoder",
    "download one first, for example `hf download facebook/dinov2-with-registers-base config.json "
    "model.safetensors --local-dir dinov2-with-registers-base`, and give that folder (768 "
    "channels, RAE's; nothing is downloaded here)",
)


def rae_files(path: str | os.PathLike[str]) -> Dinov2Files:
    """What the config.json of an encoder says.

    Raises:
        ValueError: no such files, or another network than DINOv2 with registers.
    """
    files = Dinov2Files.read(path, RAE)
    if files.model_type != "dinov2_with_registers":
        raise ValueError(
            f"{str(path)!r} is a {files.model_type}, RAE's encoder is a dinov2_with_registers: "
            f"{RAE.download}"
        )
    return files


@dataclass(frozen=True)
class Statistics:
    """What latents are normalised by, float32.

    Attributes:
        mean, std: (D, h, w), or 1 in place of a size; std = sqrt(var + 1e-5).
    """

    mean: Tensor
    std: Tensor

    @classmethod
    def read(cls, path: str | os.PathLike[str], shape: tuple[int, int, int]) -> Statistics:
        """Read the official file: {"mean", "var"}, of which one may be missing (0, or 1).

        Args:
            path: the file, `stat.pt`.
            shape: (D, h, w) of the latents.

        Raises:
            ValueError: a missing, damaged or foreign file, or statistics of other latents.
        """
        file = WeightsFile.open(existing_path(path, "encoder.stats"))
        found = {k: v for k, v in file.entries.items() if isinstance(v, Tensor)}
        if not found or set(file.entries) - {"mean", "var"} or len(found) < len(file.entries):
            raise ValueError(
                f"{str(path)!r} must hold the tensors mean and var, of RAE's latents, got "
                f"{shorten(map(str, file.entries)) or 'nothing'}: give encoder.stats the stat.pt "
                "of the encoder (stats/dinov2/wReg_base/... of RAE's files)"
            )
        file.check_values("", found)
        for name, value in found.items():
            fits = value.ndim == 3 and all(
                n in (1, m) for n, m in zip(value.shape, shape, strict=True)
            )
            if not fits or not value.is_floating_point():
                raise ValueError(
                    f"{name} of {str(path)!r} is {value.dtype} {tuple(value.shape)}, the latents "
                    f"are {shape}: give encoder.stats the statistics of this encoder at this size"
                )
        mean, var = found.get("mean", torch.zeros(1, 1, 1)), found.get("var", torch.ones(1, 1, 1))
        if (var < 0).any():
            raise ValueError(f"var of {str(path)!r} has negative values: it is not a variance")
        # Clones: the file is mapped.
        return cls(mean.float().clone(), (var.float() + EPS).sqrt())

    def normalise(self, z: Tensor) -> Tensor:
        """(B, D, h, w) -> float32 of mean 0 and variance 1."""
        return (z.float() - self.mean) / self.std

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return z.float() * self.std + self.mean

    def to(self, device: str | torch.device) -> Statistics:
        """The same on a device."""
        return Statistics(self.mean.to(device), self.std.to(device))


class RAEEncoder:
    """Images in, RAE's normalised latents out; see `Encoder`.

    Args:
        path: folder with config.json and model.safetensors of a `Dinov2WithRegistersModel`.
        side: tokens along the side of a latent: 16 for 256 pixels, 32 for 512.
        stats: the file `stat.pt`; None leaves the latents as they are.
        precision: "fp32", as the official code, or "bf16", of the network; images are resized and
            normalised, and latents normalised, in float32 either way.
        device: where it stays.

    Attributes:
        shape: (D, side, side).
        resolution: pixels along the side of what the network sees.
        model: the network, in eval mode, without gradients.

    Raises:
        ValueError: missing or foreign files, missing weights, statistics of another shape,
            transformers not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        side: int,
        *,
        stats: str | os.PathLike[str] | None = None,
        precision: Precision = "fp32",
        device: str | torch.device = "cpu",
    ) -> None:
        files = rae_files(path)
        self.resolution = side * files.patch_size
        self.shape = (files.hidden_size, side, side)
        self._statistics = None if stats is None else Statistics.read(stats, self.shape)
        self._dinov2 = Dinov2(files, precision, affine_norm=False)
        self.model: nn.Module = self._dinov2.model
        self.to(device)

    def to(self, device: str | torch.device) -> RAEEncoder:
        """Take it to a device; returns itself."""
        self.model.to(device)
        if self._statistics is not None:
            self._statistics = self._statistics.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Latents of a batch.

        Args:
            images: (B, 3, H, H) uint8 on the encoder's device.

        Returns:
            (B, D, side, side) float32, without a graph.

        Raises:
            ValueError: another shape or dtype.
        """
        square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
        if not square or images.dtype != torch.uint8:
            raise ValueError(
                f"images must be (B, 3, H, H) uint8, got {images.dtype} {tuple(images.shape)}"
            )
        return self.encode(images.float() / 255.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents of images in [0, 1], (B, 3, H, H) float32; see `__call__`."""
        if x.shape[-1] != self.resolution:
            x = resize(x, self.resolution)
        z = self._dinov2(normalise(x)).mT.unflatten(-1, self.shape[1:])
        z = z.float() if self._statistics is None else self._statistics.normalise(z)
        return z.contiguous()
