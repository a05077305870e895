"""The adaLN-Zero transformer block of SiT, REPA and DiT-DH, in plain PyTorch.

This is the definition: mode "eager" runs it as it stands, mode "compile" through torch.compile,
and `fused/block.py` computes the same with the fused operators.

Shapes by suffix: B batch, N tokens, D width, H heads, K head dim, F inner width of the MLP.
"""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.kernels.attention.op import attention

# What a matrix product of the padded width may count on; 5461 becomes 5504 = 43 * 128.
PAD_TO = 64
EPS = 1e-6


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) in float32, cast back, times a learned weight."""

    def __init__(self, features: int, eps: float = EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)  # float64 stays float64
        x32 = x.to(dtype)
        return (x32 * (x32.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(
            x.dtype
        ) * self.weight


def _norm(features: int, rms: bool) -> nn.Module:
    return RMSNorm(features) if rms else nn.LayerNorm(features, elementwise_affine=False, eps=EPS)


def modulation_chunks(mods: Tensor, names: str) -> dict[str, Tensor]:
    """Equal parts of the last dimension by name, each (B, D) or, per token, (B, N, D)."""
    keys = names.split()
    return dict(zip(keys, mods.chunk(len(keys), dim=-1), strict=True))


def _over_tokens(m: Tensor) -> Tensor:
    """(B, D) -> (B, 1, D); what is per token already stays."""
    return m.unsqueeze(1) if m.dim() == 2 else m


def modulate(x_BND: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with scale and shift per sample or per token."""
    y = x_BND * (1 + _over_tokens(scale))
    return y if shift is None else y + _over_tokens(shift)


def rotate(x_BHNK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    """RoPE on neighbouring pairs: (a, b) -> (a cos - b sin, b cos + a sin), in float32."""
    # The tables are float32, so the products are too, whatever the dtype of q and k.
    pairs = x_BHNK.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return (x_BHNK * cos_NK + turned * sin_NK).to(x_BHNK.dtype)


class AttentionOptions(TypedDict, total=False):
    """Norms and RoPE of an attention layer, as `kernels.attention` takes them."""

    cos: Tensor | None
    sin: Tensor | None
    q_weight: Tensor
    k_weight: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    norm: str
    eps: float


class Attention(nn.Module):
    """Multi-head self-attention: biased fused qkv, optional norms of q and k, optional RoPE.

    Attributes:
        backend: "auto" leaves the choice to PyTorch; a name of `kernels.attention.BACKENDS` is
            forced. Set by `Transformer.set_execution`.
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = "auto"
        head_dim = hidden_size // num_heads
        norm = RMSNorm if rms_norm else nn.LayerNorm
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        qkv_BN3HK = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        # A forced backend takes the packed qkv and does norms and RoPE itself.
        if self.backend != "auto":
            out = attention(qkv_BN3HK, **self.options(rope), backend=self.backend)
            return self.proj(out)
        q_BHNK, k_BHNK, v_BHNK = qkv_BN3HK.permute(2, 0, 3, 1, 4).unbind(0)
        q_BHNK, k_BHNK = self.q_norm(q_BHNK), self.k_norm(k_BHNK)
        if rope is not None:
            q_BHNK, k_BHNK = rotate(q_BHNK, *rope), rotate(k_BHNK, *rope)
        out_BHNK = F.scaled_dot_product_attention(q_BHNK, k_BHNK, v_BHNK)
        return self.proj(out_BHNK.transpose(1, 2).flatten(2))

    def options(self, rope: tuple[Tensor, Tensor] | None) -> AttentionOptions:
        """Norms and RoPE as arguments of `kernels.attention.attention`."""
        cos, sin = rope or (None, None)
        if isinstance(self.q_norm, nn.Identity):
            return {"cos": cos, "sin": sin}
        return {
            "cos": cos,
            "sin": sin,
            "q_weight": self.q_norm.weight,
            "k_weight": self.k_norm.weight,
            "q_bias": getattr(self.q_norm, "bias", None),
            "k_bias": getattr(self.k_norm, "bias", None),
            "norm": "rms" if isinstance(self.q_norm, RMSNorm) else "layer",
            "eps": self.q_norm.eps,
        }


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """w3(silu(a) b), (a, b) = w12(x), with F = int(2/3 of the usual inner width).

    Attributes:
        padded: whether the products run at a multiple of 64 columns, by zeros that no gradient
            leaves. DiT-DH's head has F = 5461, whose rows of 10,922 bytes are aligned to nothing.
            Set by `Transformer.set_execution`.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        inner_size = int(2 / 3 * inner_size)
        self.padded = False
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        w12, bias12, w3 = self.weights()
        a, b = F.linear(x, w12, bias12).chunk(2, dim=-1)
        return F.linear(F.silu(a) * b, w3, self.w3.bias)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight and bias of w12, weight of w3), filled up with zeros where `padded` is set."""
        inner = self.w3.in_features
        # Rows of a multiple of 8 columns begin at multiples of 16 bytes in bf16: aligned enough.
        more = -inner % PAD_TO if self.padded and inner % 8 else 0
        if not more:
            return self.w12.weight, self.w12.bias, self.w3.weight
        w12 = F.pad(self.w12.weight.unflatten(0, (2, inner)), (0, 0, 0, more)).flatten(0, 1)
        bias12 = F.pad(self.w12.bias.unflatten(0, (2, inner)), (0, more)).flatten()
        return w12, bias12, F.pad(self.w3.weight, (0, more))


class Block(nn.Module):
    """x += gate f(norm(x) (1 + scale) + shift), for attention and then for the MLP.

    Args:
        hidden_size, num_heads, mlp_ratio: D, H, F / D.
        qk_norm: norms on q and k.
        swiglu: SwiGLU instead of the GELU perceptron.
        rms_norm: RMSNorm with a weight instead of LayerNorm without.
        shift: False leaves the shifts out of the modulation (RAE's `wo_shift`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool = False,
        swiglu: bool = False,
        rms_norm: bool = False,
        shift: bool = True,
    ) -> None:
        super().__init__()
        # In the order of the official classes: optimizer states number their parameters by it.
        self.norm1 = _norm(hidden_size, rms_norm)
        self.norm2 = _norm(hidden_size, rms_norm)
        self.attn = Attention(hidden_size, num_heads, qk_norm, rms_norm)
        self.mlp = (SwiGLU if swiglu else Mlp)(hidden_size, int(hidden_size * mlp_ratio))
        parts = "shift_msa scale_msa gate_msa shift_mlp scale_mlp gate_mlp"
        self.parts = parts if shift else "scale_msa gate_msa scale_mlp gate_mlp"
        width = len(self.parts.split()) * hidden_size
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, width))

    def forward(
        self, x_BND: Tensor, c: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """c is (B, D) per sample or (B, N, D) per token."""
        m = modulation_chunks(self.adaLN_modulation(c), self.parts)
        attended = self.attn(modulate(self.norm1(x_BND), m.get("shift_msa"), m["scale_msa"]), rope)
        x_BND = x_BND + _over_tokens(m["gate_msa"]) * attended
        fed = self.mlp(modulate(self.norm2(x_BND), m.get("shift_mlp"), m["scale_mlp"]))
        return x_BND + _over_tokens(m["gate_mlp"]) * fed


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches: (B, N, D) -> (B, N, patch * patch * channels)."""

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, rms_norm: bool = False
    ) -> None:
        super().__init__()
        self.norm_final = _norm(hidden_size, rms_norm)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BND: Tensor, c: Tensor) -> Tensor:
        m = modulation_chunks(self.adaLN_modulation(c), "shift scale")
        return self.linear(modulate(self.norm_final(x_BND), m["shift"], m["scale"]))
