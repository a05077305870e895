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
NORM_WARPS = 8
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


def row_parts(K: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(lanes, head, tail): the block or the two blocks that hold a head's K elements.

    Blocks are powers of two, and one for 72 elements would be 128 wide: 44% of the lanes would
    issue instructions for nothing. Such a row is a head of 64 and a tail of 8. `lanes` threads have
    128 bits of the head each, and one element of the tail or more, so that both are added up before
    threads meet.
    """
    block, vector = triton.next_power_of_2(K), 16 // dtype.itemsize
    head = block // 2
    lanes = max(head // vector, 1)
    tail = max(triton.next_power_of_2(max(K - head, 1)), lanes)
    # Rows that begin at any address are read an element at a time, where threads hold others.
    if head >= 32 and 2 * tail <= head and K % 8 == 0:
        return lanes, head, tail
    return max(block // vector, 1), block, 0


def _common(options: QkOptions, x: Tensor) -> dict[str, object]:
    """Arguments of the norm kernels that do not depend on the direction."""
    weights = dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), options.weights, strict=True))
    lanes, head, tail = row_parts(x.shape[3], x.dtype)
    return {
        **{f"{name}_ptr": x if w is None else w.contiguous() for name, w in weights.items()},
        "N": x.shape[1],
        "eps": options.eps,
        "H": x.shape[2],
        "K": x.shape[3],
        "NORM": options.norm,
        "HAS_WEIGHT": options.q_weight is not None,
        "HAS_BIAS": options.q_bias is not None,
        # In two parts, a row for each group of lanes: only so do threads hold the same of both.
        "ROWS": 32 * NORM_WARPS // lanes if tail else max(BLOCK // head, 1),
        "LANES": lanes,
        "HEAD": head,
        "TAIL": tail,
        "num_warps": NORM_WARPS,
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
    partials = [
        qkv.new_empty(2 * blocks * K if has else 0, dtype=torch.float32)
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
        weight = _sum_partials(partials[0], options.q_weight, options.k_weight, blocks)
        bias = _sum_partials(partials[1], options.q_bias, options.k_bias, blocks)
    return [weight[0], bias[0], weight[1], bias[1]]


def _sum_partials(
    partial: Tensor, q: Tensor | None, k: Tensor | None, partials: int
) -> tuple[Tensor | None, Tensor | None]:
    if q is None:
        return None, None
    out = torch.empty_like(q), torch.empty_like(k)
    K = q.numel()
    columns = min(triton.next_power_of_2(K), 32)
    _qk_weight_gradient_kernel[(2 * triton.cdiv(K, columns),)](
        partial,
        *out,
        partials,
        K=K,
        COLUMNS=columns,
        ROWS=64,
        num_warps=4,
        **runtime.OPTIONS,
    )
    return out
