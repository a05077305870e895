"""The frozen encoder whose patch tokens REPA aligns with (Yu et al., arXiv 2410.06940): DINOv2.

    image / 255 -> (image - mean) / std -> bicubic to (R, R), no antialiasing -> DINOv2
        -> last hidden state after the final LayerNorm, without class and register tokens

The order is REPA's: normalised first, resized after, so that nothing is rounded to bytes or clamped
in between. The side R gives one patch of the teacher per token of the model: 224 for 256 pixels,
448 for 512. Weights are read from a local folder and nothing is ever downloaded.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from mixflow_fast.models.dinov2 import (
    POSITIONS,
    Dinov2,
    Dinov2Files,
    Owner,
    Positions,
    Precision,
    normalise,
    resize,
)

TEACHER = Owner(
    "teacher",
    "download one first, for example `hf download facebook/dinov2-base config.json "
    "model.safetensors --local-dir dinov2-base`, and give that folder (768 channels, REPA's "
    "default; nothing is downloaded here)",
)


def preprocess(images: Tensor, resolution: int) -> Tensor:
    """REPA's preprocessing of the teacher's images.

        F.interpolate((image / 255 - mean) / std, (R, R), mode="bicubic")

    Args:
        images: (B, 3, H, H) uint8, or floating in [-1, 1] as a model of pixels sees them.
        resolution: R.

    Returns:
        (B, 3, R, R) float32 (float64 for float64 images).

    Raises:
        ValueError: another shape or an integer dtype other than uint8.
    """
    square = images.ndim == 4 and images.shape[1] == 3 and images.shape[2] == images.shape[3]
    if not square or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(
            "images must be (B, 3, H, H), uint8 or floating in [-1, 1], got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    x = images.to(dtype)
    x = x / 255.0 if images.dtype == torch.uint8 else (x + 1.0) / 2.0
    return resize(normalise(x), resolution)


def teacher_resolution(files: Dinov2Files, side: int, resolution: int | None = None) -> int:
    """Pixels that give side x side tokens; `resolution` is checked if given.

    Raises:
        ValueError: `resolution` gives another number of tokens.
    """
    expected = side * files.patch_size
    if resolution is None:
        return expected
    if resolution < 1 or resolution // files.patch_size != side:
        tokens = max(resolution // files.patch_size, 0) ** 2
        raise ValueError(
            f"the teacher's resolution {resolution} gives {tokens} tokens of "
            f"{files.patch_size} x {files.patch_size} pixels, the model has {side * side}: set "
            f"teacher.resolution={expected}, or null for just that"
        )
    return resolution


class Teacher:
    """A frozen DINOv2 from a local folder: images in, normalised patch tokens out.

    It is no `nn.Module`, so that no module can take it for a part of itself: it has no place in
    the optimizer, the EMA, DeepSpeed or a checkpoint.

    Args:
        path: folder with config.json and model.safetensors, as transformers saves a `Dinov2Model`
            or `Dinov2WithRegistersModel`.
        side: tokens along the side of the model's grid; the features have side * side.
        resolution: side in pixels of what the teacher sees; None is side * patch size, which is
            REPA's (224 for 16 x 16, 448 for 32 x 32).
        precision: "fp32" or "bf16", of the weights and activations.
        positions: how the position table becomes side x side: "repa" resamples it once, in
            float32, bicubic with antialiasing (timm's function, which REPA calls); "model" leaves
            it to transformers, which for DINOv2 without registers does not antialias.
        device: where it stays.

    Attributes:
        hidden_size: channels of the features.
        tokens: side * side.
        model: the encoder, in eval mode, without gradients.

    Raises:
        ValueError: missing or foreign files, missing weights, sizes that do not fit, transformers
            not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        side: int,
        *,
        resolution: int | None = None,
        precision: Precision = "fp32",
        positions: Positions = "repa",
        device: str | torch.device = "cpu",
    ) -> None:
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
        files = Dinov2Files.read(path, TEACHER)
        self.resolution = teacher_resolution(files, side, resolution)
        self.hidden_size, self.tokens = files.hidden_size, side * side
        self._dinov2 = Dinov2(files, precision, positions=side if positions == "repa" else None)
        self.model: nn.Module = self._dinov2.model.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: (B, 3, H, H) uint8, or floating in [-1, 1], on the teacher's device.

        Returns:
            (B, tokens, hidden_size) in the teacher's precision, without a graph.

        Raises:
            ValueError: as `preprocess`.
        """
        return self._dinov2(preprocess(images, self.resolution))
