"""The residual norm in plain PyTorch, which runs where kernels do not and defines their results.

Formulas stand in `op.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels.runtime import compute_dtype


def _per_token(v: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D) as (B, 1, D), (B, N, D) as it is."""
    return (v.unsqueeze(1) if v.dim() == 2 else v).to(dtype)


def _statistics(x: Tensor, norm: str, eps: float) -> tuple[Tensor | None, Tensor]:
    """(mean or None, rstd) over the last dimension, which stays as 1."""
    mean = x.mean(dim=-1, keepdim=True) if norm == "layer" else None
    centred = x if mean is None else x - mean
    return mean, torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)


def _normed(x: Tensor, mean: Tensor | None, rstd: Tensor) -> Tensor:
    return (x if mean is None else x - mean) * rstd


def _modulated(
    normed: Tensor, shift: Tensor | None, scale: Tensor, weight: Tensor | None
) -> Tensor:
    dtype = normed.dtype
    y = normed if weight is None else normed * weight.to(dtype)
    y = y * (1 + _per_token(scale, dtype))
    return y if shift is None else y + _per_token(shift, dtype)


def modulated_norm_reference(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> Tensor:
    """`modulated_norm` in plain, differentiable PyTorch.

    Computes in float32, or in float64 for float64 data; returns x's dtype.
    """
    wide = x.to(compute_dtype(x))
    normed = _normed(wide, *_statistics(wide, norm, eps))
    return _modulated(normed, shift, scale, weight).to(x.dtype)


def residual_norm_reference(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    shift: Tensor | None,
    scale: Tensor,
    *,
    h_bias: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`residual_norm` in plain, differentiable PyTorch: (x', y).

    Computes in float32, or in float64 for float64 data; returns x's dtype.
    """
    dtype = compute_dtype(x)
    h = h.to(dtype)
    if h_bias is not None:
        h = h + h_bias.to(dtype)
    x_new = (x.to(dtype) + _per_token(gate, dtype) * h).to(x.dtype)
    return x_new, modulated_norm_reference(x_new, shift, scale, weight=weight, norm=norm, eps=eps)


def gradients_reference(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    h_bias: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    with_y: bool,
) -> tuple[Tensor | None, ...]:
    """All gradients in closed form and y recomputed, unrounded; None where an input is missing."""
    dtype = compute_dtype(x_new)
    dy, modulated = dy.to(dtype), 1 + _per_token(scale, dtype)
    mean = mean.unsqueeze(-1) if norm == "layer" else None
    normed = _normed(x_new.to(dtype), mean, rstd.unsqueeze(-1))
    y = _modulated(normed, shift, scale, weight) if with_y else None
    weight = torch.ones((), dtype=dtype, device=dy.device) if weight is None else weight.to(dtype)
    g = dy * modulated * weight
    total = g - normed * (g * normed).mean(dim=-1, keepdim=True)
    if norm == "layer":
        total = total - g.mean(dim=-1, keepdim=True)
    total = total * rstd.unsqueeze(-1)
    if dx_new is not None:
        total = total + dx_new.to(dtype)
    dh = None if gate is None else _per_token(gate, dtype) * total
    dgate = None
    if h is not None:
        dgate = total * (h.to(dtype) if h_bias is None else h.to(dtype) + h_bias.to(dtype))
    dscale, dweight = dy * normed * weight, (dy * normed * modulated).sum(dim=(0, 1))
    per_sample = dgate, dy, dscale
    if scale.dim() == 2:
        per_sample = (None if v is None else v.sum(dim=1) for v in per_sample)
    dh_bias = None if dh is None else dh.sum(dim=(0, 1))
    return total, dh, *per_sample, dh_bias, dweight, y


def stored_statistics(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) of x as the operators return them: (B, N), the mean empty for norm="rms"."""
    mean, rstd = _statistics(x.to(compute_dtype(x)), norm, eps)
    return rstd.new_empty((0,)) if mean is None else mean.squeeze(-1), rstd.squeeze(-1)
