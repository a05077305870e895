"""Inputs and plain runs for tests of attention and of what is done to q and k."""

from __future__ import annotations

import torch

from mixflow_fast.kernels.attention.op import attention_reference
from tests.support.kernels import DEVICE


def run(function, qkv, weights, upstream, **options) -> dict[str, torch.Tensor]:
    """The output and all gradients, by name."""
    qkv = qkv.detach().requires_grad_()
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    out = function(qkv, **weights, **options)
    gradients = torch.autograd.grad(out, [qkv, *weights.values()], upstream)
    names = ["out", "dqkv", *(f"d{name}" for name in weights)]
    return dict(zip(names, [out.detach(), *gradients], strict=True))


def problem(shape, dtype=torch.float32, norm=None, rotated=False):
    """(qkv, weights, upstream, options)."""
    B, N, H, K = shape
    options = {"norm": norm, **(tables(N, K) if rotated else {})}
    qkv = data(B, N, 3, H, K, dtype=dtype) * 1.5
    return qkv, leaves(norm, K, dtype), data(B, N, H * K, dtype=dtype, seed=3) * 1.7, options


def exact(qkv, weights, upstream, options) -> dict[str, torch.Tensor]:
    floats = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return run(attention_reference, qkv.double(), doubled(weights), upstream.double(), **floats)


WEIGHTS = {
    None: (),
    "layer": ("q_weight", "q_bias", "k_weight", "k_bias"),
    "rms": ("q_weight", "k_weight"),
}


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def angles(N: int, K: int) -> torch.Tensor:
    """(N, K / 2), any: a rotation only needs each pair to share one."""
    return torch.rand(N, K // 2, generator=torch.Generator().manual_seed(5)).to(DEVICE) * 6.28


def tables(N: int, K: int) -> dict[str, torch.Tensor]:
    theta = angles(N, K).double().repeat_interleave(2, dim=1)
    return {"cos": theta.cos().float(), "sin": theta.sin().float()}


def leaves(norm: str | None, K: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    found = {}
    for seed, name in enumerate(WEIGHTS[norm]):
        found[name] = data(K, seed=10 + seed).mul(0.3).add(name.endswith("weight")).to(dtype)
    return {name: w.requires_grad_() for name, w in found.items()}


def doubled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.detach().double() for name, x in tensors.items()}
