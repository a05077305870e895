"""The block of `blocks.py` as a chain of fused operators: mode "fused".

The residual stream is carried as a pair, x and what is still to be added to it:

    x + gate (h + h_bias)

so that each addition shares one pass over memory with the norm that follows it, in the next half of
the block or in the next block (`kernels.residual_norm`). Biases go where a kernel touches the
tokens anyway, because their gradients are sums over all tokens:

* of `attn.proj` and the MLP's last product: into the residual norm;
* of the MLP's first product: into the activation;
* of v: attention weights add up to 1, so attention(v + b_v) = attention(v) + b_v, and W_proj b_v
  joins proj's own bias;
* of k: q (k + b_k) adds the same number to all logits of a query, which softmax does not see. Its
  gradient is exactly zero (eager's is rounding noise). Only without RoPE and without a norm of k.

What is left is a sum over dq: a third of the pass that `nn.Linear` makes.
"""

from __future__ import annotations

from typing import TypedDict

import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.kernels.activations.gelu import gelu
from mixflow_fast.kernels.activations.swiglu import swiglu
from mixflow_fast.kernels.attention.op import attention
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from mixflow_fast.models.blocks import (
    Attention,
    Block,
    FinalLayer,
    Mlp,
    RMSNorm,
    SwiGLU,
    modulation_chunks,
)
from mixflow_fast.models.fused.autograd import (
    Pending,
    activated_product,
    linear_leading_bias,
    normed_product,
)

# x, and what is still to be added: None at the start of a chain.
ResidualStream = tuple[Tensor, Pending | None]


class _NormOptions(TypedDict, total=False):
    norm: str
    weight: Tensor
    eps: float
    impl: str


def _norm_options(norm: nn.Module, impl: str) -> _NormOptions:
    if isinstance(norm, RMSNorm):
        return {"norm": "rms", "weight": norm.weight, "eps": norm.eps, "impl": impl}
    return {"norm": "layer", "eps": norm.eps, "impl": impl}


def _add_and_norm(
    residual: ResidualStream, norm: nn.Module, shift: Tensor | None, scale: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """(x', modulated norm of x') where x' is x with what was still to be added."""
    x, pending = residual
    options = _norm_options(norm, impl)
    if pending is None:
        return x, modulated_norm(x, shift, scale, **options)
    h, h_bias, gate = pending
    return residual_norm(x, h, gate, shift, scale, h_bias=h_bias, **options)


def _normed_product(
    residual: ResidualStream,
    norm: nn.Module,
    modulation: tuple[Tensor | None, Tensor],
    product: tuple[Tensor, Tensor | None],
    impl: str,
    recompute: bool,
) -> tuple[Tensor, Tensor]:
    """(x', product of x's modulated norm with a weight and a bias of its first columns or None).

    modulation: (shift, scale). `recompute`: the norm is not kept.
    """
    shift, scale = modulation
    if recompute:
        x, pending = residual
        options = _norm_options(norm, impl)
        return normed_product(x, pending, shift, scale, product, **options)
    x, y = _add_and_norm(residual, norm, shift, scale, impl)
    weight, bias = product
    return x, F.linear(y, weight) if bias is None else linear_leading_bias(y, weight, bias)


def _leading_bias(layer: Attention, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """Bias of q, and of k where it has a gradient."""
    width = layer.proj.in_features
    # RoPE and a norm of k let the logits see k's bias.
    plain = rope is None and isinstance(layer.k_norm, nn.Identity)
    return layer.qkv.bias[: width if plain else 2 * width]


def _attend(
    layer: Attention, qkv: Tensor, rope: tuple[Tensor, Tensor] | None, impl: str
) -> tuple[Tensor, Tensor]:
    """(product of proj without a bias, the bias that is still to be added to it)."""
    packed = qkv.unflatten(-1, (3, layer.num_heads, -1))
    out = attention(packed, **layer.options(rope), backend=layer.backend, impl=impl)
    weight = layer.proj.weight
    # v's bias goes through attention unchanged, so it joins proj's: one vector for all tokens.
    bias = F.linear(layer.qkv.bias[2 * layer.proj.in_features :], weight, layer.proj.bias)
    return F.linear(out, weight), bias


def _mlp_weights(layer: Mlp | SwiGLU) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weight, bias) of the first linear layer and (weight, bias) of the last, in one tuple."""
    if isinstance(layer, SwiGLU):
        return *layer.weights(), layer.w3.bias
    return layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias


def fused_block(
    block: Block,
    residual: ResidualStream,
    c_silu: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    impl: str = "auto",
    recompute: bool = False,
) -> ResidualStream:
    """`Block.forward` on a residual stream.

    Args:
        residual: see `ResidualStream`; h (B, N, D), h_bias (D,), gate like c.
        c_silu: SiLU of the condition, (B, D) or (B, N, D): the same for all blocks.
        rope: (cos, sin), each (N, K) float32, or None.
        impl: implementation of the operators.
        recompute: norms and the MLP's activation are recomputed in the backward pass.
    """
    m = modulation_chunks(block.adaLN_modulation[1](c_silu), block.parts)
    modulation = m.get("shift_msa"), m["scale_msa"]
    product = block.attn.qkv.weight, _leading_bias(block.attn, rope)
    x, qkv = _normed_product(residual, block.norm1, modulation, product, impl, recompute)
    # The branch is not added here: the next norm adds it in the pass that it makes anyway.
    h, h_bias = _attend(block.attn, qkv, rope, impl)
    residual = x, (h, h_bias, m["gate_msa"])
    modulation = m.get("shift_mlp"), m["scale_mlp"]
    first, bias, last, last_bias = _mlp_weights(block.mlp)
    x, z = _normed_product(residual, block.norm2, modulation, (first, None), impl, recompute)
    gated = isinstance(block.mlp, SwiGLU)
    if recompute:
        h = activated_product(z, bias, last, gated, impl)
    else:
        h = F.linear((swiglu if gated else gelu)(z, bias, impl=impl), last)
    return x, (h, last_bias, m["gate_mlp"])


def fused_final(
    layer: FinalLayer, residual: ResidualStream, c_silu: Tensor, impl: str = "auto"
) -> Tensor:
    """`FinalLayer.forward` on a residual stream."""
    m = modulation_chunks(layer.adaLN_modulation[1](c_silu), "shift scale")
    _, y = _add_and_norm(residual, layer.norm_final, m["shift"], m["scale"], impl)
    return layer.linear(y)


def resolve(residual: ResidualStream) -> Tensor:
    """The residual stream as one tensor, where something other than a norm needs it."""
    x, pending = residual
    if pending is None:
        return x
    h, h_bias, gate = pending
    gate = gate.unsqueeze(1) if gate.dim() == 2 else gate
    return x + gate * (h + h_bias)
