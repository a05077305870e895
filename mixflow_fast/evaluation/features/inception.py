"""Inception-v3 as FID uses it: TensorFlow's network of 2015-12-05 (Szegedy et al., 1512.00567).

    uint8 -> float32 -> TF1 bilinear to 299 x 299 -> (x - 128) / 128 -> network

| output | what | for |
|---|---|---|
| pool | (2048,) mean of the last maps | FID, KID, precision, recall |
| logits | (1008,) pool @ W^T, without the bias | IS |
| spatial | (2023,) channels 0..6 of Mixed_6d.branch1x1, 17 x 17, as (H, W, C) | sFID |

It differs from torchvision's: batch norm has epsilon 1e-3, average pools do not count their
padding, the pool branch of the last block is a max pool, and there are 1008 classes. The spatial
features are those of TensorFlow's mixed_6/conv, which counts its blocks otherwise: mixed_4 to
mixed_7 are Mixed_6b to Mixed_6e here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.evaluation.features.extractor import ExtractorId, sha256_of
from mixflow_fast.models.weights.files import WeightsFile

SIDE = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
# What the name of the public file says of its content.
KNOWN_SHA256_PREFIX = "6726825d"
_WAY_OUT = (
    f"give the public {WEIGHTS} (release v0.2.0 of github.com/toshas/torch-fidelity; nothing is "
    "downloaded here)"
)

Size = int | tuple[int, int]


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; "same" padding at stride 1 unless `valid`."""

    def __init__(
        self, inputs: int, outputs: int, size: Size, stride: int = 1, valid: bool = False
    ) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = (0, 0) if valid or stride > 1 else (height // 2, width // 2)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _max_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class BlockA(nn.Module):
    """35 x 35 maps."""

    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = Conv(inputs, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Conv(inputs, 48, 1), Conv(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3)
        self.branch_pool = Conv(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))], 1)


class BlockB(nn.Module):
    """From 35 x 35 to 17 x 17."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Conv(288, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(288, 64, 1), Conv(64, 96, 3)
        self.branch3x3dbl_3 = Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, _max_pool(x)], 1)


class BlockC(nn.Module):
    """17 x 17 maps; 7 x 7 convolutions as rows and columns."""

    def __init__(self, width: int) -> None:
        super().__init__()
        row, column = (1, 7), (7, 1)
        self.branch1x1 = Conv(768, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Conv(768, width, 1), Conv(width, width, row)
        self.branch7x7_3 = Conv(width, 192, column)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Conv(768, width, 1), Conv(width, width, column)
        self.branch7x7dbl_3 = Conv(width, width, row)
        self.branch7x7dbl_4 = Conv(width, width, column)
        self.branch7x7dbl_5 = Conv(width, 192, row)
        self.branch_pool = Conv(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch1x1(x))

    def join(self, x: Tensor, one: Tensor) -> Tensor:
        """The block's output, of its input and of its first branch."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, self.branch_pool(_mean_pool(x))], 1)


class BlockD(nn.Module):
    """From 17 x 17 to 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Conv(768, 192, 1), Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Conv(768, 192, 1), Conv(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Conv(192, 192, (7, 1)), Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, _max_pool(x)], 1)


class BlockE(nn.Module):
    """8 x 8 maps; the pool branch of the second one is a max pool."""

    def __init__(self, inputs: int, max_pool: bool) -> None:
        super().__init__()
        row, column = (1, 3), (3, 1)
        self._max_pool = max_pool
        self.branch1x1 = Conv(inputs, 320, 1)
        self.branch3x3_1 = Conv(inputs, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Conv(inputs, 448, 1), Conv(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Conv(384, 384, row), Conv(384, 384, column)
        self.branch_pool = Conv(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self._max_pool else _mean_pool(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return torch.cat([*parts, self.branch_pool(pooled)], 1)


class InceptionV3(nn.Module):
    """The network under the names of the public file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, valid=True)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, valid=True)
        self.Mixed_5b, self.Mixed_5c = BlockA(192, 32), BlockA(256, 64)
        self.Mixed_5d, self.Mixed_6a = BlockA(288, 64), BlockB()
        self.Mixed_6b, self.Mixed_6c = BlockC(128), BlockC(160)
        self.Mixed_6d, self.Mixed_6e = BlockC(160), BlockC(192)
        self.Mixed_7a = BlockD()
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, False), BlockE(2048, True)
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """pool (B, 2048), logits (B, 1008), spatial (B, 2023) of (B, 3, 299, 299) in [-1, 1]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_max_pool(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_max_pool(x))))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        one = self.Mixed_6d.branch1x1(x)
        spatial = one[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(self.Mixed_6d.join(x, one))
        pool = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean(dim=(2, 3))
        return pool, pool @ self.fc.weight.T, spatial


def resize_tf1(images: Tensor, side: int = SIDE) -> Tensor:
    """(B, C, H, W) floating -> (B, C, side, side): TensorFlow 1's bilinear resize.

    Output pixel i takes position i H / side, without half-pixel offset and antialiasing; beyond the
    last pixel is the last pixel.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        place = torch.arange(side, device=images.device, dtype=images.dtype) * (length / side)
        low = place.long().clamp_(max=length - 1)
        high = (low + 1).clamp_(max=length - 1)
        part = (place - low).view((-1, 1) if axis == 2 else (-1,))
        first = images.index_select(axis, low)
        images = first + (images.index_select(axis, high) - first) * part
    return images


class Inception:
    """The extractor "inception" from a file of weights.

    Args:
        path: the weights of torch-fidelity's layout.
        device: where it stays.
        dtype: float32, or float64 for cross-checks.
        allow_unknown: take weights whose hash is not that of the public file.

    Raises:
        ValueError: no such file, another hash, another layout.
    """

    outputs = ("pool", "logits", "spatial")

    def __init__(
        self,
        path: Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        allow_unknown: bool = False,
    ) -> None:
        if not path.is_file():
            raise ValueError(f"the Inception weights {str(path)!r} are not there: {_WAY_OUT}")
        sha256 = sha256_of(path)
        if not sha256.startswith(KNOWN_SHA256_PREFIX) and not allow_unknown:
            raise ValueError(
                f"{str(path)!r} has the sha256 {sha256[:8]}..., FID's weights have "
                f"{KNOWN_SHA256_PREFIX}...: {_WAY_OUT}, or take these with "
                "--allow-unknown-weights, which makes another number than FID"
            )
        name = str(dtype).removeprefix("torch.")
        self.id = ExtractorId("inception", sha256, f"TF1 bilinear to {SIDE}", name)
        self.device, self._dtype = torch.device(device), dtype
        # Made without values: PyTorch's initial ones would take seconds and be overwritten.
        with torch.device("meta"):
            network = InceptionV3()
        network.load_state_dict(read_state(path, network), assign=True)
        self.network = network.eval().requires_grad_(False).to(self.device, dtype)

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """As `Extractor`."""
        x = (resize_tf1(images.to(self._dtype)) - 128) / 128
        return dict(zip(self.outputs, self.network(x), strict=True))


def read_state(path: Path, network: nn.Module) -> dict[str, Tensor]:
    """The state dict of a feature network's file, read without executing anything in it.

    Counters of batch norm, which features do not depend on, may be missing.

    Raises:
        ValueError: entries that are missing, too many or of another shape.
    """
    entries = WeightsFile.open(path).entries
    expected = network.state_dict()
    state = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    for name in expected:
        if name.endswith(".num_batches_tracked"):
            state.setdefault(name, torch.tensor(0))
    wrong = [n for n in expected if n not in state or state[n].shape != expected[n].shape]
    wrong += [n for n in state if n not in expected]
    if wrong:
        raise ValueError(
            f"{str(path)!r} has another layout than {type(network).__name__}: {len(wrong)} entries "
            f"are missing, too many or of another shape, such as {wrong[0]!r}"
        )
    return state
