"""Predictors of a mixed source: from the signal kappa to mean and log-variance of the noise end.

Both return (B, 2 C, H, W): the first C channels are the mean, the others the log-variance of
q(x0 | kappa) (MixFlow, arXiv 2604.09181). `SourceUNet` has the names of the official predictor,
which is made of diffusers' blocks, without their prefix `network.`; the blocks are written here in
plain PyTorch, because diffusers is an optional package and a training run must not need it.

Shapes by suffix: B batch, C channels, H height, W width, N places (H W), D heads' width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixflow_fast.models.network import check, check_sizes

EPS = 1e-5


class SourceUNetConfig(TypedDict):
    """Arguments of `SourceUNet` with the defaults filled in, in the order in which files keep
    them."""

    channels: int
    in_channels: int
    widths: list[int]
    layers: int
    attention_levels: list[int]
    head_dim: int
    groups: int
    num_classes: int | None
    size: int | None
    zero_init: bool


class SourceTableConfig(TypedDict):
    """Arguments of `SourceTable`, in the order in which files keep them."""

    num_classes: int
    channels: int
    size: int
    low_resolution: int | None


class _ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution of x to another width."""

    def __init__(self, in_width: int, width: int, groups: int) -> None:
        super().__init__()
        # In the order of diffusers' class, which numbers the parameters in optimizer states.
        self.norm1 = nn.GroupNorm(groups, in_width, eps=EPS)
        self.conv1 = nn.Conv2d(in_width, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, width, eps=EPS)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_width, width, 1) if in_width != width else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class _SelfAttention(nn.Module):
    """x + attention over the places of norm(x)."""

    def __init__(self, width: int, head_dim: int, groups: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.group_norm = nn.GroupNorm(groups, width, eps=EPS)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        h_BNC = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (
            layer(h_BNC).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out_BNC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out[0](out_BNC).transpose(1, 2).reshape(x.shape)


class _Resampler(nn.Module):
    """The convolution between two levels, under diffusers' name."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class _Level(nn.Module):
    """Blocks of one resolution, each with its attention where the level has it."""

    def __init__(self, in_widths: Sequence[int], width: int, head_dim: int | None, groups: int):
        super().__init__()
        self.attentions: nn.ModuleList | None = None
        if head_dim is not None:
            self.attentions = nn.ModuleList(
                _SelfAttention(width, head_dim, groups) for _ in in_widths
            )
        self.resnets = nn.ModuleList(
            _ResnetBlock(in_width, width, groups) for in_width in in_widths
        )
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None

    def block(self, number: int, x: Tensor) -> Tensor:
        x = self.resnets[number](x)
        return x if self.attentions is None else self.attentions[number](x)


class SourceUNet(nn.Module):
    """U-Net without a time, from an image (or noise, or both, or a class) to mean | log-variance.

    The defaults are the released network of 1,899,910 parameters. It is convolutional: the same
    weights take any height and width, but for classes, whose table has one resolution.

    Args:
        channels: C of the data; the network returns 2 C.
        in_channels: channels of what it is given: C (None), or 2 C for data and noise together.
        widths: channels of each level; each is half as high and wide as the one before.
        layers: blocks of a level on the way down; one more on the way up.
        attention_levels: levels with self-attention, from 0; None: the deepest.
        head_dim: width of an attention head.
        groups: groups of the norms; each width must be a multiple.
        num_classes: gives the network a table of images, one a class, and `forward` takes labels
            instead of images. Count the null class in, where labels are dropped.
        size: height and width of those images; with `num_classes` alone.
        zero_init: the last convolution begins at zero, so that the source begins at N(0, I); else
            PyTorch's own initialisation, as released.

    Attributes:
        config: the arguments as a JSON-able dict; `SourceUNet(**net.config)` rebuilds it.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self,
        channels: int = 3,
        in_channels: int | None = None,
        widths: Sequence[int] = (32, 64, 64, 64),
        layers: int = 2,
        attention_levels: Sequence[int] | None = None,
        head_dim: int = 8,
        groups: int = 32,
        num_classes: int | None = None,
        size: int | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        widths = list(widths)
        if attention_levels is None:
            attention_levels = [len(widths) - 1]
        self.config: SourceUNetConfig = {
            "channels": channels,
            "in_channels": channels if in_channels is None else in_channels,
            "widths": widths,
            "layers": layers,
            "attention_levels": list(attention_levels),
            "head_dim": head_dim,
            "groups": groups,
            "num_classes": num_classes,
            "size": size,
            "zero_init": zero_init,
        }
        _check_unet(self.config)
        self._build_layers()
        if zero_init:
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)

    def _build_layers(self) -> None:
        c, widths, layers = self.config, self.config["widths"], self.config["layers"]
        channels, last = c["in_channels"], len(widths) - 1
        self.conv_in = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        # Widths of what the way down leaves for the way up, which takes it from the end.
        left = [widths[0]]
        for number, width in enumerate(widths):
            level = self._level([left[-1], *[width] * (layers - 1)], number)
            left += [width] * layers
            if number < last:
                level.downsamplers = nn.ModuleList([_Resampler(width, stride=2)])
                left.append(width)
            self.down_blocks.append(level)
        current = widths[-1]
        for number in reversed(range(len(widths))):
            in_widths = []
            for _ in range(layers + 1):
                in_widths.append(current + left.pop())
                current = widths[number]
            level = self._level(in_widths, number)
            if number > 0:
                level.upsamplers = nn.ModuleList([_Resampler(current, stride=1)])
            self.up_blocks.append(level)
        self.conv_norm_out = nn.GroupNorm(c["groups"], widths[0], eps=EPS)
        self.conv_out = nn.Conv2d(widths[0], 2 * c["channels"], 3, padding=1)
        self.class_embedding: nn.Embedding | None = None
        if c["num_classes"] is not None:
            self.class_embedding = nn.Embedding(c["num_classes"], channels * c["size"] ** 2)

    def _level(self, in_widths: Sequence[int], number: int) -> _Level:
        c = self.config
        head_dim = c["head_dim"] if number in c["attention_levels"] else None
        return _Level(in_widths, c["widths"][number], head_dim, c["groups"])

    def forward(self, kappa: Tensor) -> Tensor:
        """Mean and log-variance of the source.

        Args:
            kappa: (B, in_channels, H, W) in the weights' dtype; with `num_classes` (B,) int64
                labels.

        Returns:
            (B, 2 channels, H, W) in the weights' dtype: mean, then log-variance.

        Raises:
            ValueError: for another shape or dtype, or labels out of range (on the CPU only: on a
                GPU the check would be a synchronisation).
        """
        h = self.conv_in(self._image(kappa))
        left = [h]
        for level in self.down_blocks:
            for number in range(len(level.resnets)):
                h = level.block(number, h)
                left.append(h)
            if level.downsamplers is not None:
                h = level.downsamplers[0](h)
                left.append(h)
        for level in self.up_blocks:
            for number in range(len(level.resnets)):
                h = level.block(number, torch.cat([h, left.pop()], dim=1))
            if level.upsamplers is not None:
                # To the size that the way down had: an odd one was rounded up when it was halved.
                h = F.interpolate(h, size=left[-1].shape[-2:], mode="nearest")
                h = level.upsamplers[0](h)
        return self.conv_out(F.silu(self.conv_norm_out(h)))

    def _image(self, kappa: Tensor) -> Tensor:
        channels, size = self.config["in_channels"], self.config["size"]
        if self.class_embedding is not None:
            _check_labels(kappa, self.config["num_classes"])
            return self.class_embedding(kappa).view(-1, channels, size, size)
        check(
            kappa.ndim == 4 and kappa.shape[1] == channels and kappa.is_floating_point(),
            f"kappa must be a floating (B, C, H, W) with C = in_channels = {channels}, got "
            f"{kappa.dtype} {tuple(kappa.shape)}: SourceUNet(in_channels=...) takes another width, "
            "SourceUNet(num_classes=..., size=...) labels",
        )
        return kappa


class SourceTable(nn.Module):
    """A table of means and log-variances, a row a class; zeros at first, so the source is N(0, I).

    Args:
        num_classes: rows. Count the null class in, where labels are dropped.
        channels: C of the data.
        size: height and width of the data.
        low_resolution: height and width of the rows, which are then upsampled (bilinear): fewer
            parameters, smoother sources. None: `size`.

    Attributes:
        config: the arguments as a JSON-able dict; `SourceTable(**table.config)` rebuilds it.

    Raises:
        ValueError: sizes that do not fit together.
    """

    def __init__(
        self, num_classes: int, channels: int, size: int, low_resolution: int | None = None
    ) -> None:
        super().__init__()
        self.config: SourceTableConfig = {
            "num_classes": num_classes,
            "channels": channels,
            "size": size,
            "low_resolution": low_resolution,
        }
        check_sizes(self.config, ("num_classes", "channels", "size"))
        side = size
        if low_resolution is not None:
            check_sizes(self.config, ("low_resolution",))
            check(
                low_resolution <= size,
                f"low_resolution must be at most size={size}, got {low_resolution}",
            )
            side = low_resolution
        self._shape = (2 * channels, side, side)
        self.table = nn.Embedding(num_classes, 2 * channels * side * side)
        nn.init.zeros_(self.table.weight)

    def forward(self, y: Tensor) -> Tensor:
        """Mean and log-variance of the source.

        Args:
            y: (B,) int64 labels.

        Returns:
            (B, 2 channels, size, size) in the table's dtype: mean, then log-variance.

        Raises:
            ValueError: for another shape or dtype, or labels out of range (on the CPU only: on a
                GPU the check would be a synchronisation).
        """
        _check_labels(y, self.config["num_classes"])
        rows = self.table(y).view(-1, *self._shape)
        size, side = self.config["size"], self._shape[-1]
        if side == size:
            return rows
        # Bilinear upsampling as two products: PyTorch's own has a backward pass on GPUs that
        # repeats its bits nowhere.
        unit = torch.eye(side, dtype=rows.dtype, device=rows.device)
        weights = F.interpolate(unit[None], size=size, mode="linear")[0]
        return weights.T @ rows @ weights


def _check_labels(y: Tensor, num_classes: int) -> None:
    check(
        y.ndim == 1 and y.dtype == torch.int64,
        f"kappa must be (B,) int64 labels, got {tuple(y.shape)} {y.dtype}",
    )
    # Reading a label on a GPU would wait for the device in every step.
    if y.device.type != "cpu" or torch.compiler.is_compiling() or len(y) == 0:
        return
    low, high = int(y.min()), int(y.max())
    check(
        low >= 0 and high < num_classes,
        f"kappa must be in 0..{num_classes - 1} (num_classes={num_classes}), got {low}..{high}: a "
        "network with a null class needs num_classes + 1 rows",
    )


def _check_unet(config: SourceUNetConfig) -> None:
    widths, groups, head_dim = config["widths"], config["groups"], config["head_dim"]
    check_sizes(config, ("channels", "in_channels", "layers", "head_dim", "groups"))
    check(len(widths) > 0, "widths must hold one width a level, got []")
    for number, width in enumerate(widths):
        name = f"widths[{number}]"
        check_sizes({name: width}, (name,))
        check(width % groups == 0, f"{name} must be a multiple of groups={groups}, got {width}")
    for number in config["attention_levels"]:
        check(
            number in range(len(widths)),
            f"attention_levels must be in 0..{len(widths) - 1}, got {number}",
        )
        check(
            widths[number] % head_dim == 0,
            f"widths[{number}] must be a multiple of head_dim={head_dim}, got {widths[number]}",
        )
    classes, size = config["num_classes"], config["size"]
    check(
        (classes is None) == (size is None),
        f"num_classes and size belong together, got {classes} and {size}: the classes' images "
        "have one resolution, which is the data's",
    )
    if classes is not None:
        check_sizes(config, ("num_classes", "size"))
