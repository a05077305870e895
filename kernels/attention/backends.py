"""Backends that compute softmax(q k^T / sqrt(K)) v: how each is called, and what it refuses.

All take q, k, v (B, N, H, K) with any strides whose last is 1, and give out (B, N, H, K) and the
natural logarithm of the softmax's denominator, lse (B, H, N) float32, both contiguous: one
backend's forward pass and another's backward pass fit together. There is no mask and no dropout.

* flash3: `flash_attn_interface` (Hopper; compiled from source). flash2: the package `flash_attn`.
  They write dq, dk, dv where they are told: into one packed buffer.
* efficient: PyTorch's memory-efficient kernels, whose backward pass allocates its three gradients
  as one packed buffer if asked to.
* cudnn, flash: PyTorch's; three separate gradients. flash serves CPUs as well.
* math: here, in float32 (float64 for float64), over slices of the batch.

Where a backend wants the head dimension in multiples of 8, zeros are appended (exact: they add
nothing to a product), and the gradients come back separate.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.kernels.attention.packages import flash2_module, flash3_module, package_pair
from mixflow_fast.kernels.runtime import compute_dtype

# (dq, dk, dv), or all of them in one (B, N, 3, H, K).
Gradients = Tensor | tuple[Tensor, Tensor, Tensor]
HALF = (torch.bfloat16, torch.float16)
# Scores that "math" holds at a time: 256 MiB in float32, whatever the batch.
MATH_SCORES = 2**26
aten = torch.ops.aten
# In order of preference.
BackendName = Literal["flash3", "flash2", "cudnn", "flash", "efficient", "math"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: as in `BACKENDS`.
        missing: (device, dtype) -> why it cannot serve them, or "".
        forward: (q, k, v, scale) -> (out, lse), in any strides, lse of at least N.
        backward: (dout, q, k, v, out, lse, scale) -> gradients.
        packs: whether the gradients come in one packed buffer.
        multiple: the head dimension must be a multiple of this number; not on CPUs.
    """

    name: BackendName
    missing: Callable[[torch.device, torch.dtype], str]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., Gradients]
    packs: bool = False
    multiple: int = 1

    def padding(self, head_dim: int, device: torch.device) -> int:
        """Zeros that are appended to each head."""
        return 0 if device.type == "cpu" else -head_dim % self.multiple


def run_forward(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) as the module's docstring defines them."""
    N, K = q.shape[1], q.shape[3]
    padding = backend.padding(K, q.device)
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    out, lse = backend.forward(q, k, v, K**-0.5)
    return out[..., :K].contiguous(), lse[..., :N].contiguous()


def run_backward(
    backend: Backend, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Gradients:
    """Gradients of q, k and v; out and lse may come from another backend's `run_forward`."""
    K = q.shape[3]
    padding = backend.padding(K, q.device)
    # `out` is padded too: its products with dout then sum to the same numbers.
    if not padding:
        return backend.backward(dout, q, k, v, out, lse, K**-0.5)
    wide = [F.pad(x, (0, padding)) for x in (dout, q, k, v, out)]
    gradients = backend.backward(*wide, lse, K**-0.5)
    parts = gradients.unbind(2) if isinstance(gradients, Tensor) else gradients
    return tuple(x[..., :K] for x in parts)


def _slices(batch: int, heads: int, tokens: int) -> list[slice]:
    step = max(1, MATH_SCORES // (heads * tokens * tokens))
    return [slice(start, start + step) for start in range(0, batch, step)]


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.transpose(1, 2).to(dtype)


def math_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse), computed in `dtype` (None: float32 or float64)."""
    dtype = dtype or compute_dtype(q)
    B, N, H, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(B, H, N, dtype=compute_dtype(q))
    for part in _slices(B, H, N):
        q_, k_, v_ = (_by_head(x[part], dtype) for x in (q, k, v))
        scores = (q_ * scale) @ k_.transpose(-1, -2)
        lse[part] = scores.to(lse.dtype).logsumexp(-1)
        out[part] = (scores.softmax(-1) @ v_).transpose(1, 2).to(out.dtype)
    return out, lse


def math_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """P = softmax(s), dP = do v^T, ds = P (dP - sum(P dP)), dq = ds k, dk = ds^T q, dv = P^T do.

    P is recomputed from q, k and v and not taken from lse: rows of ds then sum to zero as exactly
    as they can.
    """
    dtype = dtype or compute_dtype(q)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    for part in _slices(q.shape[0], q.shape[2], q.shape[1]):
        do, q_, k_, v_ = (_by_head(x[part], dtype) for x in (dout, q, k, v))
        p = ((q_ * scale) @ k_.transpose(-1, -2)).softmax(-1)
        dp = do @ v_.transpose(-1, -2)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dv[part] = (p.transpose(-1, -2) @ do).transpose(1, 2).to(dv.dtype)
        dq[part] = ((ds @ k_) * scale).transpose(1, 2).to(dq.dtype)
        dk[part] = ((ds.transpose(-1, -2) @ q_) * scale).transpose(1, 2).to(dk.dtype)
    return dq, dk, dv


def _cuda_half(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "needs a CUDA device"
    return "" if dtype in HALF else f"computes bfloat16 and float16, not {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aten_missing(*names: str) -> str:
    missing = [name for name in names if not hasattr(aten, name)]
    return f"this PyTorch has no {missing[0]}" if missing else ""


def _flash_missing(device: torch.device, dtype: torch.dtype) -> str:
    suffix = "_for_cpu" if device.type == "cpu" else ""
    name = f"_scaled_dot_product_flash_attention{suffix}"
    if device.type != "cpu" and _cuda_half(device, dtype):
        return _cuda_half(device, dtype)
    return _aten_missing(name, f"{name}_backward")


def _heads(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _tokens(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(_heads(*gradients))


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention
    if q.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu
    out, lse, *_ = op(*_heads(q, k, v), 0.0, False, scale=scale)
    return out.transpose(1, 2), lse


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    tensors = _heads(dout, q, k, v, out)
    if q.device.type == "cpu":
        op = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return _tokens(op(*tensors, lse, 0.0, False, scale=scale))
    # The random state is read only for dropout, but the operator insists on tensors.
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)
    offset = seed.new_empty(())
    dout, q, k, v, out = tensors
    op = aten._scaled_dot_product_flash_attention_backward
    N = q.shape[2]
    return _tokens(
        op(dout, q, k, v, out, lse, None, None, N, N, 0.0, False, seed, offset, scale=scale)
    )


def _cudnn_missing(device: torch.device, dtype: torch.dtype) -> str:
    name = "_scaled_dot_product_cudnn_attention"
    return _cuda_half(device, dtype) or _aten_missing(name, f"{name}_backward")


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    op = aten._scaled_dot_product_cudnn_attention
    out, lse, *_ = op(*_heads(q, k, v), None, True, 0.0, False, scale=scale)
    return out.transpose(1, 2), lse.squeeze(-1) if lse.dim() == 4 else lse


def _cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    # The random state is read only for dropout, but the operator insists on tensors.
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    N, lse = q.shape[1], lse[..., None]
    dout, q, k, v, out = _heads(dout, q, k, v, out)
    op = aten._scaled_dot_product_cudnn_attention_backward
    return _tokens(
        op(dout, q, k, v, out, lse, seed, seed, None, None, None, N, N, 0.0, False, scale=scale)
    )


def _efficient_missing(device: torch.device, dtype: torch.dtype) -> str:
    if device.type != "cuda":
        return "needs a CUDA device"
    if dtype not in (*HALF, torch.float32):
        return f"computes bfloat16, float16 and float32, not {_name(dtype)}"
    return _aten_missing("_efficient_attention_forward", "_efficient_attention_backward")


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    op = aten._efficient_attention_forward
    out, lse, *_ = op(q, k, v, None, None, None, None, None, 0.0, 0, True, scale=scale)
    return out, lse


def _efficient_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    # The kernels read lse in rows of 32, with infinity (a softmax of zero) behind the last token.
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=math.inf)
    seed = torch.empty((), dtype=torch.int64, device=q.device)
    gradients = aten._efficient_attention_backward(
        dout,
        q,
        k,
        v,
        None,  # bias
        out,
        None,  # cumulative lengths of q and k
        None,
        q.shape[1],
        k.shape[1],
        lse,
        0.0,  # dropout
        seed,
        seed,
        0,  # kind of mask
        False,
        scale=scale,
        shared_storage_dqdkdv=True,
    )
    return as_packed(*gradients[:3])


def as_packed(dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    """One (B, N, 3, H, K) where the gradients are slices of such a tensor, else all three."""
    B, N, H, K = dq.shape
    width, first = H * K, dq.storage_offset()
    strides = (3 * N * width, 3 * width, K, 1)
    # Three tensors next to each other by chance have another storage, or another offset.
    for place, x in enumerate((dq, dk, dv)):
        same = x.untyped_storage()._cdata == dq.untyped_storage()._cdata
        if not same or x.stride() != strides or x.storage_offset() != first + place * width:
            return dq, dk, dv
    return dq.as_strided((B, N, 3, H, K), (3 * N * width, 3 * width, width, K, 1))


def _package_missing(*names: str) -> Callable[[torch.device, torch.dtype], str]:
    def missing(device: torch.device, dtype: torch.dtype) -> str:
        if all(importlib.util.find_spec(name) is None for name in names):
            return "not installed"
        return _cuda_half(device, dtype)

    return missing


_FLASH3, _FLASH2 = package_pair(flash3_module), package_pair(flash2_module)
REGISTRY = {
    backend.name: backend
    for backend in (
        Backend(
            "flash3",
            _package_missing("flash_attn_interface", "flash_attn_3"),
            *_FLASH3,
            packs=True,
            multiple=8,
        ),
        Backend(
            "flash2",
            _package_missing("flash_attn"),
            *_FLASH2,
            packs=True,
            multiple=8,
        ),
        Backend("cudnn", _cudnn_missing, _cudnn_forward, _cudnn_backward, multiple=8),
        Backend("flash", _flash_missing, _flash_forward, _flash_backward, multiple=8),
        Backend(
            "efficient",
            _efficient_missing,
            _efficient_forward,
            _efficient_backward,
            packs=True,
            multiple=8,
        ),
        Backend("math", lambda device, dtype: "", math_forward, math_backward),
    )
}
