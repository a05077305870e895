"""Closed-form networks for tests of samplers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixflow_fast.kernels.philox import Stream, normal


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


class Net(nn.Module):
    """A small network with labels in the engine's clock; batch rows do not interact."""

    def __init__(self, classes: int = 5, channels: int = 4, null: bool = True) -> None:
        super().__init__()
        self.clock = "data_at_1"
        self.null_class = classes if null else None
        self.config = {"in_channels": channels, "input_size": 6, "num_classes": classes}
        weight = normal(3, Stream.INIT, torch.arange(channels), channels * 9)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv.weight.data = weight.view(channels, channels, 3, 3) * 0.2
        self.conv.bias.data.zero_()
        self.embed = nn.Embedding(classes + 1, channels)
        self.embed.weight.data = normal(4, Stream.INIT, torch.arange(classes + 1), channels)
        self.dropout = nn.Dropout(0.5)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        condition = self.embed(y)[:, :, None, None]
        return self.dropout(torch.tanh(self.conv(x)) + condition * t[:, None, None, None])


class Mirrored(nn.Module):
    """The same network as a REPA user has it: t = 1 is noise, velocity x0 - x1, output a pair."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.clock = net, "noise_at_1"
        self.null_class, self.config = net.null_class, net.config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        return -self.net(x, 1 - t, y), [x]


class Toy:
    """The closed-form network of the golden files of samplers, in its repository's clock.

    v(x, t, y) = tanh(0.7 x) + 0.3 t + 0.05 y, computed in float32; 10 is the null class.
    """

    null_class = 10

    def __init__(self, clock: str, channels: int | None = None) -> None:
        self.clock, self.cfg_channels = clock, channels
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        constant = 0.3 * t.float() + 0.05 * y
        return torch.tanh(0.7 * x.float()) + constant[:, None, None, None]
