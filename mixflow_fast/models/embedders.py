"""What turns latents, times, labels and positions into tokens and conditions.

Shapes by suffix: B batch, N tokens, D width, K head dim, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

TIME_FEATURES = 256


def timestep_sinusoid(t: Tensor, features: int = TIME_FEATURES) -> Tensor:
    """[cos(t f), sin(t f)] with f_j = 10000^(-j / (features / 2)), cosines first.

    Args:
        t: (B,) times in [0, 1], unscaled.
        features: even number of features.

    Returns:
        (B, features) float32, or float64 for float64 times.
    """
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    half = features // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=dtype, device=t.device) * (-math.log(10000.0) / half)
    )
    angles = t.to(dtype)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_position_embedding(width: int, side: int) -> Tensor:
    """The fixed 2-D sine-cosine table: the first half of the width encodes the column.

    Each half of size d is [sin(p w_k), cos(p w_k)] with w_k = 10000^(-k / (d / 2)), p = 0..side-1,
    computed in float64.

    Returns:
        (side * side, width) float32 on the CPU, rows first.
    """
    half = width // 2
    # float64, as the official NumPy code computes: in float32 the table would differ in last bits.
    position = torch.arange(side, dtype=torch.float64, device="cpu")
    k = torch.arange(half // 2, dtype=torch.float64, device="cpu")
    angles = position[:, None] * 10000.0 ** (-k / (half / 2))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    by_column = axis[None, :, :].expand(side, side, half)
    by_row = axis[:, None, :].expand(side, side, half)
    return torch.cat([by_column, by_row], dim=-1).reshape(side * side, width).float()


def rope_tables(head_dim: int, side: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of 2-D axial RoPE (EVA-02's layout, as RAE uses it).

    The first half of a head turns with the row, the second with the column. An axis of a = K / 2
    features has the frequencies 10000^(-2 j / a), j < a / 2, each for a pair of neighbours.

    Returns:
        (cos, sin), each (side * side, head_dim) float32 on the CPU, rows first.
    """
    axis = head_dim // 2
    # float32 all through, as RAE computes its tables; they are part of its state dicts.
    j = torch.arange(0, axis, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / 10000.0 ** (j / axis)
    position = torch.arange(side, dtype=torch.float32, device="cpu")
    angles = (position[:, None] * frequencies).repeat_interleave(2, dim=1)
    by_row = angles[:, None, :].expand(side, side, axis)
    by_column = angles[None, :, :].expand(side, side, axis)
    table = torch.cat([by_row, by_column], dim=-1).reshape(side * side, head_dim)
    return table.cos(), table.sin()


class PatchEmbed(nn.Module):
    """(B, C, side, side) -> (B, N, D) contiguous, tokens row by row."""

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        # The transposed view would pass its strides on to every later token tensor.
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()


class TimestepEmbedder(nn.Module):
    """Sinusoid in float32, then a two-layer perceptron in the dtype of its weights."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_sinusoid(t).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """A table of class embeddings; its last row is the null class where there is one."""

    def __init__(self, rows: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class _Float32Tensors(nn.Module):
    """Keeps its own tensors float32 when the network is cast to half precision.

    A frequency or an angle of 8 bits is another function, not a rounder one.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # Taken before the cast, because what the cast rounds away does not come back.
        before = {n: t.detach() for n, t in [*self._parameters.items(), *self._buffers.items()]}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.bfloat16, torch.float16):
                now.data = tensor.to(now.device)
        return self


class GaussianFourierEmbedder(_Float32Tensors):
    """MLP([sin(2 pi t W), cos(2 pi t W)]), sines first, with W ~ N(0, 1) drawn once and saved.

    W and the angles are float32 whatever the dtype of the other weights.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(TIME_FEATURES), requires_grad=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * TIME_FEATURES, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, t: Tensor) -> Tensor:
        # The order of the factors is the official one: another rounds differently.
        angles = t[:, None] * self.W.to(t.dtype) * 2 * math.pi
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class RotaryEmbedding(_Float32Tensors):
    """The tables of `rope_tables` as persistent buffers, under their official names."""

    def __init__(self, head_dim: int, side: int) -> None:
        super().__init__()
        shape = (side * side, head_dim)
        self._side = side
        self.register_buffer("freqs_cos", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("freqs_sin", torch.empty(shape, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Compute the tables."""
        cos, sin = rope_tables(self.freqs_cos.shape[1], self._side)
        self.freqs_cos.copy_(cos)
        self.freqs_sin.copy_(sin)
