"""The block of `blocks.py` as a chain of fused operators: mode "fused".

The residual stream is carried as a pair, x and what is still to be added to it:

    x + gate (h + h_bias)

so that each addition shares one pass over memory with the norm that follows it, in the next half of
the block or in the next block (`kernels.junction`). Biases go where a kernel touches the tokens
anyway, because their gradients are sums over all tokens:

* of `attn.proj` and the MLP's last product: into the junction;
* of the MLP's first product: into the activation;
* of v: attention weights add up to 1, so attention(v + b_v) = attention(v) + b_v, and W_proj b_v
  joins proj's own bias;
* of k: q (k + b_k) adds the same number to all logits of a query, which softmax does not see. Its
  gradient is exactly zero (eager's is rounding noise). Only without RoPE and without a norm of k.

What is left is a sum over dq: a third of the pass that `nn.Linear` makes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixflow_fast.kernels.attention import attention
from mixflow_fast.kernels.gelu import gelu, gelu_again
from mixflow_fast.kernels.junction import junction, modulated_norm
from mixflow_fast.kernels.swiglu import swiglu, swiglu_again
from mixflow_fast.models.blocks import (
    Attention,
    Block,
    FinalLayer,
    Mlp,
    RMSNorm,
    SwiGLU,
    modulation_chunks,
)

# x, and (h, h_bias, gate) that are still to be added: None at the start of a chain.
Stream = tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]


class _LinearLeadingBias(torch.autograd.Function):
    """x W^T with a bias on the first columns only: its gradient sums no other columns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.leading = bias.shape[0]
        return F.linear(x, weight, F.pad(bias, (0, weight.shape[0] - bias.shape[0])))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view(x.shape)
        dbias = rows[:, : ctx.leading].sum(0)
        return dx, rows.t() @ x.flatten(0, -2), dbias


class _ActivatedProduct(torch.autograd.Function):
    """act(x + bias) W^T without keeping the activation: the pass that computes its gradient makes
    it again, for one more write.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, weight: Tensor, gated: bool, impl: str
    ) -> Tensor:
        ctx.save_for_backward(x, bias, weight)
        ctx.gated, ctx.impl = gated, impl
        return F.linear((swiglu if gated else gelu)(x, bias, impl=impl), weight)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, weight = ctx.saved_tensors
        again = swiglu_again if ctx.gated else gelu_again
        dx, dbias, y = again(dh @ weight, x, bias, impl=ctx.impl)
        return dx, dbias, dh.flatten(0, -2).t() @ y.flatten(0, -2), None, None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast would make of a linear's inputs; it does not see into a Function."""
    device = tensors[0].device.type
    # PyTorch has no answer for meta tensors.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _norm_options(norm: nn.Module) -> dict[str, Any]:
    if isinstance(norm, RMSNorm):
        return {"norm": "rms", "weight": norm.weight, "eps": norm.eps}
    return {"norm": "layer", "eps": norm.eps}


def _add_and_norm(
    stream: Stream, norm: nn.Module, shift: Tensor | None, scale: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    """(x', modulated norm of x') where x' is the stream with what was still to be added."""
    x, pending = stream
    options = _norm_options(norm) | {"impl": impl}
    if pending is None:
        return x, modulated_norm(x, shift, scale, **options)
    h, h_bias, gate = pending
    return junction(x, h, gate, shift, scale, h_bias=h_bias, **options)


def _attend(
    layer: Attention, y: Tensor, rope: tuple[Tensor, Tensor] | None, impl: str
) -> tuple[Tensor, Tensor]:
    """(product of proj, its bias)."""
    width = layer.proj.in_features
    plain = rope is None and isinstance(layer.k_norm, nn.Identity)
    leading = width if plain else 2 * width
    qkv = _LinearLeadingBias.apply(*_autocast(y, layer.qkv.weight, layer.qkv.bias[:leading]))
    packed = qkv.unflatten(-1, (3, layer.num_heads, -1))
    out = attention(packed, **layer.options(rope), backend=layer.backend, impl=impl)
    weight = layer.proj.weight
    bias = F.linear(layer.qkv.bias[2 * width :], weight, layer.proj.bias)
    return F.linear(out, weight), bias


def _feed(layer: Mlp | SwiGLU, y: Tensor, impl: str, again: bool) -> tuple[Tensor, Tensor]:
    """(product of the last linear, its bias); `again`: its input is not kept."""
    gated = isinstance(layer, SwiGLU)
    if gated:
        (first, bias, last), last_bias = layer.weights(), layer.w3.bias
    else:
        first, bias = layer.fc1.weight, layer.fc1.bias
        last, last_bias = layer.fc2.weight, layer.fc2.bias
    x = F.linear(y, first)
    if again:
        x, last = _autocast(x, last)
        return _ActivatedProduct.apply(x, bias, last, gated, impl), last_bias
    return F.linear((swiglu if gated else gelu)(x, bias, impl=impl), last), last_bias


def fused_block(
    block: Block,
    stream: Stream,
    c_silu: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    impl: str = "auto",
    again: bool = False,
) -> Stream:
    """`Block.forward` on a stream.

    Args:
        stream: see `Stream`; h (B, N, D), h_bias (D,), gate like c.
        c_silu: SiLU of the condition, (B, D) or (B, N, D): the same for all blocks.
        rope: (cos, sin), each (N, K) float32, or None.
        impl: of the operators.
        again: the MLP's activation is made again in the backward pass.
    """
    m = modulation_chunks(block.adaLN_modulation[1](c_silu), block.parts)
    x, y = _add_and_norm(stream, block.norm1, m.get("shift_msa"), m["scale_msa"], impl)
    h, bias = _attend(block.attn, y, rope, impl)
    pending = h, bias, m["gate_msa"]
    x, y = _add_and_norm((x, pending), block.norm2, m.get("shift_mlp"), m["scale_mlp"], impl)
    h, bias = _feed(block.mlp, y, impl, again)
    return x, (h, bias, m["gate_mlp"])


def fused_final(layer: FinalLayer, stream: Stream, c_silu: Tensor, impl: str = "auto") -> Tensor:
    """`FinalLayer.forward` on a stream."""
    m = modulation_chunks(layer.adaLN_modulation[1](c_silu), "shift scale")
    _, y = _add_and_norm(stream, layer.norm_final, m["shift"], m["scale"], impl)
    return layer.linear(y)


def settle(stream: Stream) -> Tensor:
    """The residual stream itself, where something other than a norm needs it."""
    x, pending = stream
    if pending is None:
        return x
    h, h_bias, gate = pending
    gate = gate.unsqueeze(1) if gate.dim() == 2 else gate
    return x + gate * (h + h_bias)
