"""Norm and rotary position embedding of q and k, in one pass over a packed qkv.

    u = q                                                          (norm None)
        (q - mean) / sqrt(var + eps) * weight + bias               ("layer"; SiT's qk_norm)
        q / sqrt(mean(q^2) + eps) * weight                         ("rms")
    out = u cos + rotate_half(u) sin,   rotate_half: (x0, x1) -> (-x1, x0) on neighbouring pairs

and the same for k; mean and var over the K elements of a head, cos and sin of the token's position
(RoFormer, arXiv 2104.09864; the tables of EVA-02, arXiv 2303.11331, and LightningDiT). Everything
is computed in float32 and rounded once. The backward pass is the transposed rotation, then the
backward pass of the norm, recomputed from qkv; sums for the weights' gradients go to memory, one
row per program, and a second kernel adds them in a fixed order.

Bytes: q and k are read and written once in each direction, and the norm's backward pass reads
them once more. v is not touched.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.attention.qk_norm_rope_launch import (
    QkOptions,
    launch_backward,
    launch_forward,
)
from mixflow_fast.kernels.runtime import compute_dtype

NORMS = (None, "layer", "rms")


def rotate_half(x: Tensor) -> Tensor:
    """(x0, x1) -> (-x1, x0) on neighbouring pairs of the last dimension."""
    x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-x1, x0], dim=-1).flatten(-2)


def _rotate_transposed(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return g * cos - rotate_half(g * sin)


def _normalize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """(x normalised without weights, 1 / deviation)."""
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = (x * x).mean(-1, keepdim=True).add(eps).rsqrt()
    return x * scale, scale


def _position(table: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) -> (1, N, 1, K), beside (B, N, H, K)."""
    return table.to(dtype)[None, :, None]


def _one(x: Tensor, weight: Tensor | None, bias: Tensor | None, options: QkOptions) -> Tensor:
    """q or k, (B, N, H, K), in the compute dtype."""
    if options.norm != "none":
        x, _ = _normalize(x, options.norm, options.eps)
        if weight is not None:
            x = x * weight.to(x.dtype)
        if bias is not None:
            x = x + bias.to(x.dtype)
    if options.cos is not None:
        cos, sin = (_position(table, x.dtype) for table in (options.cos, options.sin))
        x = x * cos + rotate_half(x) * sin
    return x


def forward_reference(qkv: Tensor, options: QkOptions) -> tuple[Tensor, Tensor]:
    """q and k, each (B, N, H, K) in qkv's dtype; plain and differentiable."""
    q, k = qkv[:, :, :2].to(compute_dtype(qkv)).unbind(2)
    q = _one(q, options.q_weight, options.q_bias, options)
    k = _one(k, options.k_weight, options.k_bias, options)
    return q.to(qkv.dtype), k.to(qkv.dtype)


def backward_reference(
    gradients: tuple[Tensor, ...], out: Tensor, qkv: Tensor, options: QkOptions
) -> list[Tensor | None]:
    """`launch_backward` in plain PyTorch, in closed form: an operator cannot record its own."""
    found: list[Tensor | None] = []
    pairs = (options.weights[:2], options.weights[2:])
    for section, (weight, bias) in enumerate(pairs):
        g = gradients[section].to(compute_dtype(qkv))
        if options.cos is not None:
            cos, sin = (_position(table, g.dtype) for table in (options.cos, options.sin))
            g = _rotate_transposed(g, cos, sin)
        if options.norm != "none":
            x, scale = _normalize(qkv[:, :, section].to(g.dtype), options.norm, options.eps)
            found.append(None if weight is None else (g * x).sum((0, 1, 2)).to(weight.dtype))
            found.append(None if bias is None else g.sum((0, 1, 2)).to(bias.dtype))
            if weight is not None:
                g = g * weight.to(g.dtype)
            slope = (g * x).mean(-1, keepdim=True)
            if options.norm == "layer":
                g = g - g.mean(-1, keepdim=True)
            g = (g - x * slope) * scale
        out[:, :, section] = g.to(out.dtype)
    # Backends that pack have written v's gradient into `out` themselves.
    if len(gradients) == 3:
        out[:, :, 2] = gradients[2]
    return found or [None] * 4


def prepare(qkv: Tensor, options: QkOptions, impl: str) -> Tensor:
    """q and k after norm and rotation, a new (B, N, 2, H, K) tensor."""
    if kernels_serve(qkv, options, impl):
        return launch_forward(qkv, options)
    return torch.stack(forward_reference(qkv, options), dim=2)


def finish(
    gradients: tuple[Tensor, ...], out: Tensor, qkv: Tensor, options: QkOptions, impl: str
) -> list[Tensor]:
    """Writes the gradients of q and k before `prepare`, from (dq, dk[, dv]) after it, into `out`.

    Returns the gradients of the weights and biases, empty where there are none.
    """
    backward = launch_backward if kernels_serve(qkv, options, impl) else backward_reference
    found = backward(gradients, out, qkv, options)
    return [out.new_empty(0) if g is None else g for g in found]


def kernels_serve(qkv: Tensor, options: QkOptions, impl: str) -> bool:
    """`runtime.use_kernels` for all tensors of a call."""
    tensors = (qkv, *(t for t in options[:6] if t is not None))
    return runtime.use_kernels(impl, qkv.device, *(t.dtype for t in tensors))


@torch.library.custom_op("mixflow_fast::qk_norm_rope", mutates_args=())
def _qk_norm_rope_op(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    impl: str,
) -> Tensor:
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps)
    return prepare(qkv, options, impl)


@_qk_norm_rope_op.register_fake
def _(qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps, impl):
    B, N, _, H, K = qkv.shape
    return qkv.new_empty(B, N, 2, H, K)


@torch.library.custom_op("mixflow_fast::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward_op(
    gradient: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, dq_weight, dq_bias, dk_weight, dk_bias); v's gradient is zero."""
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps)
    out = qkv.new_empty(qkv.shape)
    if not out.numel():
        return out, *zero_weights(options, out)
    out[:, :, 2].zero_()
    return out, *finish(gradient.unbind(2), out, qkv, options, impl)


def zero_weights(options: QkOptions, like: Tensor) -> list[Tensor]:
    """Gradients of the weights for an empty batch."""
    return [like.new_empty(0) if w is None else w.new_zeros(w.shape) for w in options.weights]


def empty_weights(options: QkOptions, like: Tensor) -> list[Tensor]:
    """Gradients of the weights in shape and dtype only."""
    return [like.new_empty(0) if w is None else w.new_empty(w.shape) for w in options.weights]


@_qk_norm_rope_backward_op.register_fake
def _(gradient, qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps, impl):
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps)
    return qkv.new_empty(qkv.shape), *empty_weights(options, qkv)


def refuse_second_derivatives(name: str) -> None:
    """RuntimeError where autograd would record the backward pass."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivatives (create_graph=True): use {name}_reference"
        )


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.rest = inputs[7:]


def _backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivatives("qk_norm_rope")
    qkv, cos, sin, *weights = ctx.saved_tensors
    q_weight, q_bias, k_weight, k_bias = weights
    norm, eps, impl = ctx.rest
    dqkv, *gradients = _qk_norm_rope_backward_op(
        gradient, qkv, cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps, impl
    )
    gradients = [None if w is None else g for w, g in zip(weights, gradients, strict=True)]
    return dqkv, None, None, *gradients, None, None, None


_qk_norm_rope_op.register_autograd(_backward, setup_context=_setup_context)


def check_arguments(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weights: dict[str, Tensor | None],
    norm: str | None,
) -> None:
    """ValueError for arguments that do not fit each other; reads no device memory."""
    if not qkv.is_floating_point() or qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(
            "qkv must be a floating-point tensor (B, N, 3, H, K), e.g. "
            f"linear(x).view(B, N, 3, H, K), got {tuple(qkv.shape)} {qkv.dtype}"
        )
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    N, K = qkv.shape[1], qkv.shape[4]
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin belong together: give both, or neither for no rotation")
    # In 16 bits a rotation by a large angle would lose its fraction of a turn.
    table_dtypes = {torch.float32, compute_dtype(qkv)}
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        if table.shape != (N, K) or table.dtype not in table_dtypes or table.device != qkv.device:
            raise ValueError(
                f"{name} must be (N, K) = {(N, K)} float32 on {qkv.device}, got "
                f"{tuple(table.shape)} {table.dtype} on {table.device}: keep the tables in float32"
            )
        if K % 2:
            raise ValueError(f"a rotation needs an even head dimension, got K = {K}")
    given = {name: w for name, w in weights.items() if w is not None}
    for q, k in (("q_weight", "k_weight"), ("q_bias", "k_bias")):
        if (q in given) != (k in given):
            raise ValueError(f"{q} and {k} belong together: give both, or neither")
    if given and norm is None:
        raise ValueError(f'{", ".join(given)} need norm="layer" or norm="rms", got norm=None')
    if "q_bias" in given and (norm == "rms" or "q_weight" not in given):
        raise ValueError('biases need norm="layer" and weights')
    for name, w in given.items():
        dtype = next(iter(given.values())).dtype
        if w.shape != (K,) or w.dtype != dtype or w.device != qkv.device:
            raise ValueError(
                f"{name} must be (K,) = ({K},) on {qkv.device} and of one dtype with the others "
                f"({dtype}), got {tuple(w.shape)} {w.dtype} on {w.device}"
            )


def qk_norm_rope_reference(
    qkv: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` in plain, differentiable PyTorch; float64 data is computed in float64."""
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm or "none", eps)
    return forward_reference(qkv, options)


def qk_norm_rope(
    qkv: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    q_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_weight: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """q and k, normalised and rotated; the operator `mixflow_fast::qk_norm_rope`.

    Args:
        qkv: (B, N, 3, H, K) packed q, k and v: B samples, N tokens, H heads of K elements.
        cos, sin: (N, K) float32 tables of the token's rotation, or neither. No gradient.
        q_weight, k_weight: (K,) the norm's weights, or neither.
        q_bias, k_bias: (K,) biases for norm "layer", or neither.
        norm: None, "layer" (LayerNorm over K) or "rms" (RMSNorm over K).
        eps: added to the variance or the mean square.
        impl: "auto", "triton" or "reference".

    Returns:
        q, k: (B, N, H, K) in qkv's dtype, views of one new (B, N, 2, H, K) tensor.

    Raises:
        ValueError: shapes, dtypes or a norm that do not fit; impl="triton" where it cannot run.
    """
    weights = dict(q_weight=q_weight, q_bias=q_bias, k_weight=k_weight, k_bias=k_bias)
    check_arguments(qkv, cos, sin, weights, norm)
    kernels_serve(qkv, QkOptions(cos, sin, *weights.values(), norm or "none", eps), impl)
    out = _qk_norm_rope_op(qkv, cos, sin, *weights.values(), norm or "none", eps, impl)
    return out.unbind(2)
