"""DINOv2's class token as EDM2's FD-DINOv2 uses it (Stein et al., arXiv 2306.04675).

    uint8 -> float32 -> bicubic, antialiased, to 224 x 224 on the 0..255 scale, neither clipped nor
    rounded -> / 255 -> (x - mean) / std -> DINOv2 -> class token after the final LayerNorm

FD-DINOv2 means ViT-L/14 without registers. Weights come from a local folder of transformers, and
the position table is resampled as the network of torch.hub does it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.evaluation.features.extractor import ExtractorId, sha256_of
from mixflow_fast.models.dinov2 import Dinov2, Dinov2Files, Owner, normalise

SIDE = 224
LARGE = 1024  # channels of ViT-L
_OWNER = Owner(
    "DINOv2",
    "download it first, for example `hf download facebook/dinov2-large config.json "
    "model.safetensors --local-dir dinov2-large`, and give that folder (nothing is downloaded "
    "here)",
)


class DinoV2Features:
    """The extractor "dinov2" from a local folder.

    Args:
        path: folder with config.json and model.safetensors, as transformers saves a `Dinov2Model`.
        device: where it stays.
        allow_unknown: take another DINOv2 than ViT-L/14 without registers.

    Raises:
        ValueError: missing or foreign files, another network, transformers not installed.
    """

    outputs = ("cls",)

    def __init__(
        self, path: Path, device: str | torch.device = "cpu", allow_unknown: bool = False
    ) -> None:
        files = Dinov2Files.read(path, _OWNER)
        found = (files.model_type, files.hidden_size, files.patch_size)
        if found != ("dinov2", LARGE, 14) and not allow_unknown:
            raise ValueError(
                f"{str(path)!r} is a {found[0]} of {found[1]} channels and patches of {found[2]} "
                f"pixels, FD-DINOv2 is measured with dinov2, {LARGE} and 14: {_OWNER.download}, or "
                "take this one with --allow-unknown-weights, which makes another number"
            )
        self._network = Dinov2(files, "fp32", positions=SIDE // files.patch_size, rule="hub")
        self._network.model.to(device)
        self.device = torch.device(device)
        self.id = ExtractorId(
            "dinov2", _digest(files.path), f"bicubic antialiased to {SIDE}, not rounded"
        )

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """As `Extractor`."""
        return {"cls": self._network.class_token(preprocess(images))}


def preprocess(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 224, 224) float32, resized and normalised."""
    x = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return normalise(x / 255)


def _digest(folder: Path) -> str:
    """SHA-256 of the weights' file, or of the digests of several."""
    digests = [sha256_of(file) for file in sorted(folder.glob("model*.safetensors"))]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()
