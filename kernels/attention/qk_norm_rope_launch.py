"""Launches of the kernels in `qk_norm_rope_kernels.py`: grids, strides and partial sums."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.attention.qk_norm_rope_kernels import (
    _qk_norm_backward_kernel,
    _qk_norm_forward_kernel,
    _qk_weight_gradient_kernel,
    _rope_kernel,
)
from mixflow_fast.kernels.runtime import triton

BLOCK = 2048
# Programs of a section, each with one row of partial sums: more rows take longer to add up.
MAX_PARTIALS = 1024


class QkOptions(NamedTuple):
    """Norm and rotation of q and k, with their parameters.

    Attributes:
        cos, sin: (N, K) tables of the rotation, or None.
        q_weight, q_bias, k_weight, k_bias: (K,) parameters of the norm, or None.
        norm: "layer", "rms" or "none".
        eps: added to the variance or the mean square.
    """

    cos: Tensor | None
    sin: Tensor | None
    q_weight: Tensor | None
    q_bias: Tensor | None
    k_weight: Tensor | None
    k_bias: Tensor | None
    norm: str
    eps: float

    @property
    def changes(self) -> bool:
        """Whether q and k are other tensors afterwards."""
        return self.norm != "none" or self.cos is not None

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """(q_weight, q_bias, k_weight, k_bias)."""
        return self[2:6]


def with_token_stride(x: Tensor) -> tuple[Tensor, int]:
    """(x, stride) such that token b N + n of x (B, N, H, K) starts at (b N + n) stride.

    x is copied if it does not lie so.
    """
    B, N, H, K = x.shape
    stride = x.stride(1) if N > 1 else x.stride(0)
    wanted = (N * stride, stride, K, 1)
    pairs = zip(x.shape, x.stride(), wanted, strict=True)
    if all(size == 1 or step == want for size, step, want in pairs):
        return x, stride
    return x.contiguous(), H * K


def _common(options: QkOptions, x: Tensor) -> dict[str, object]:
    """Arguments of the norm kernels that do not depend on the direction."""
    weights = dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), options.weights, strict=True))
    block_k = triton.next_power_of_2(x.shape[3])
    return {
        **{f"{name}_ptr": x if w is None else w.contiguous() for name, w in weights.items()},
        "N": x.shape[1],
        "eps": options.eps,
        "H": x.shape[2],
        "K": x.shape[3],
        "NORM": options.norm,
        "HAS_WEIGHT": options.q_weight is not None,
        "HAS_BIAS": options.q_bias is not None,
        "ROWS": max(BLOCK // block_k, 1),
        "BLOCK_K": block_k,
        "num_warps": 8,
        **_tables(options, x),
        **runtime.OPTIONS,
    }


def _tables(options: QkOptions, x: Tensor) -> dict[str, object]:
    rope = options.cos is not None
    return {
        "cos_ptr": options.cos.contiguous() if rope else x,
        "sin_ptr": options.sin.contiguous() if rope else x,
        "ROPE": rope,
    }


def _launch_rope(sections: list[Tensor], out: Tensor, options: QkOptions, *, inverse: bool) -> None:
    """Sections (B, N, H, K) into the first slots of `out` (B, N, 2 or 3, H, K)."""
    B, N, H, K = sections[0].shape
    width = H * K
    # Tokens whose sections fill whole blocks, if not too many are needed for it.
    group = min(BLOCK // math.gcd(width, BLOCK), max(16, triton.cdiv(BLOCK, width)))
    blocks = triton.cdiv(B * N, group) * triton.cdiv(group * width, BLOCK)
    placed = [with_token_stride(x) for x in sections]
    (q, q_stride), (k, k_stride), (v, v_stride) = [*placed, placed[0]][:3]
    with runtime.on_device(out):
        _rope_kernel[(runtime.check_grid(blocks * len(sections), B),)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            out_ptr=out,
            q_stride=q_stride,
            k_stride=k_stride,
            v_stride=v_stride,
            out_stride=out.shape[2] * width,
            tokens=B * N,
            N=N,
            blocks=blocks,
            WIDTH=width,
            K=K,
            GROUP=group,
            VECTOR=math.gcd(K, 8),
            INVERSE=inverse,
            BLOCK=BLOCK,
            num_warps=8,
            **_tables(options, q),
            **runtime.OPTIONS,
        )


def launch_forward(qkv: Tensor, options: QkOptions) -> Tensor:
    """(B, N, 3, H, K) -> q and k, (B, N, 2, H, K)."""
    B, N, _, H, K = qkv.shape
    out = qkv.new_empty(B, N, 2, H, K)
    sections = list(qkv.unbind(2)[:2])
    if not out.numel():
        return out
    if options.norm == "none":
        _launch_rope(sections, out, options, inverse=False)
        return out
    (q, q_stride), (k, k_stride) = (with_token_stride(x) for x in sections)
    common, rows = _common(options, q), B * N * H
    blocks = triton.cdiv(rows, common["ROWS"])
    with runtime.on_device(out):
        _qk_norm_forward_kernel[(runtime.check_grid(2 * blocks, B),)](
            q_ptr=q,
            k_ptr=k,
            out_ptr=out,
            q_stride=q_stride,
            k_stride=k_stride,
            out_stride=2 * H * K,
            rows=rows,
            blocks=blocks,
            **common,
        )
    return out


def launch_backward(
    gradients: tuple[Tensor, ...], out: Tensor, qkv: Tensor, options: QkOptions
) -> list[Tensor | None]:
    """Writes gradients (dq, dk) or (dq, dk, dv) into `out` (B, N, 3, H, K).

    dq and dk may be the slices of `out` that they go to. Returns the gradients of the weights.
    """
    if options.norm == "none":
        _launch_rope(list(gradients), out, options, inverse=True)
        return [None] * 4
    B, N, _, H, K = qkv.shape
    placed = [with_token_stride(x) for x in gradients]
    (dq, dq_stride), (dk, dk_stride), (dv, dv_stride) = [*placed, placed[0]][:3]
    (q, q_stride), (k, k_stride) = (with_token_stride(x) for x in qkv.unbind(2)[:2])
    common, rows = _common(options, q), B * N * H
    tiles = triton.cdiv(rows, common["ROWS"])
    # A program walks over several tiles where there would be too many partial sums.
    loops = triton.cdiv(tiles, MAX_PARTIALS)
    blocks = triton.cdiv(tiles, loops)
    block_k = common["BLOCK_K"]
    partials = [
        qkv.new_empty(2 * blocks * block_k if has else 0, dtype=torch.float32)
        for has in (common["HAS_WEIGHT"], common["HAS_BIAS"])
    ]
    # Gradients do not depend on the biases.
    del common["q_bias_ptr"], common["k_bias_ptr"]
    with runtime.on_device(out):
        _qk_norm_backward_kernel[(runtime.check_grid(len(gradients) * blocks, B),)](
            dq_ptr=dq,
            dk_ptr=dk,
            dv_ptr=dv,
            q_ptr=q,
            k_ptr=k,
            out_ptr=out,
            weight_partial_ptr=partials[0],
            bias_partial_ptr=partials[1],
            dq_stride=dq_stride,
            dk_stride=dk_stride,
            dv_stride=dv_stride,
            q_stride=q_stride,
            k_stride=k_stride,
            out_stride=3 * H * K,
            rows=rows,
            blocks=blocks,
            loops=loops,
            **common,
        )
        weight = _sum_partials(partials[0], options.q_weight, options.k_weight, blocks, block_k)
        bias = _sum_partials(partials[1], options.q_bias, options.k_bias, blocks, block_k)
    return [weight[0], bias[0], weight[1], bias[1]]


def _sum_partials(
    partial: Tensor, q: Tensor | None, k: Tensor | None, partials: int, block_k: int
) -> tuple[Tensor | None, Tensor | None]:
    if q is None:
        return None, None
    out = torch.empty_like(q), torch.empty_like(k)
    columns = min(block_k, 32)
    _qk_weight_gradient_kernel[(2 * block_k // columns,)](
        partial,
        *out,
        partials,
        q.numel(),
        BLOCK_K=block_k,
        COLUMNS=columns,
        ROWS=64,
        num_warps=4,
        **runtime.OPTIONS,
    )
    return out
