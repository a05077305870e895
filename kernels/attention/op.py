"""Self-attention of a packed qkv: norm and rotation of q and k, softmax, and a packed gradient.

    q', k' = norm and rotation of q, k                       (`qk_norm_rope.py`)
    out = softmax(q' k'^T / sqrt(K)) v,   heads side by side

One operator for each direction. Forward: q' and k' are written to a buffer of their own, only where
norm or rotation changes them; v stays where the linear layer left it, and so do q and k otherwise.
Then one of the tested backends runs (`choice.py`). Backward: the gradient of qkv is one
(B, N, 3, H, K) tensor, as the linear layer's backward pass wants it. Some backends write it so; the
gradients of q' and k' are then turned into those of q and k in place. The three gradients of the
others are read once and written once, by the same kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels.attention import choice
from mixflow_fast.kernels.attention.backends import (
    BACKENDS,
    REGISTRY,
    run_backward,
    run_forward,
)
from mixflow_fast.kernels.attention.choice import slots
from mixflow_fast.kernels.attention.qk_norm_rope import (
    QkOptions,
    check_arguments,
    empty_weights,
    finish,
    forward_reference,
    kernels_serve,
    prepare,
    refuse_second_derivatives,
    zero_weights,
)
from mixflow_fast.kernels.runtime import compute_dtype


def attention_reference(
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
) -> Tensor:
    """`attention` in plain, differentiable PyTorch: scores and softmax in qkv's dtype."""
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm or "none", eps)
    q, k = forward_reference(qkv, options) if options.changes else qkv.unbind(2)[:2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, qkv[:, :, 2]))
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def _no_autocast(x: Tensor) -> torch.autocast:
    """No casts inside of the operators: their tests ran without."""
    return torch.autocast(x.device.type, enabled=False)


def _shapes(qkv: Tensor, options: QkOptions, with_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, q' and k'): the same for every backend, so that "auto" can be traced."""
    B, N, _, H, K = qkv.shape
    lse = (B, H, N) if with_state else (0,)
    qk = (B, N, 2, H, K) if with_state and options.changes else (0,)
    return (
        qkv.new_empty(B, N, H * K),
        qkv.new_empty(lse, dtype=compute_dtype(qkv)),
        qkv.new_empty(qk),
    )


@torch.library.custom_op("mixflow_fast::attention", mutates_args=())
def _attention_op(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    backend: str,
    with_state: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, q' and k'); the last two are empty without `with_state`."""
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps)
    if not qkv.numel():
        return _shapes(qkv, options, with_state)
    with _no_autocast(qkv):
        core = choice.resolve(backend, qkv, with_state)
        q, k, v = qkv.unbind(2)
        state = qkv.new_empty(0)
        if options.changes:
            prepared = prepare(qkv, options, impl)
            q, k = prepared.unbind(2)
            state = prepared if with_state else state
        out, lse = run_forward(core, q, k, v)
    return out.flatten(2), lse if with_state else lse.new_empty(0), state


@_attention_op.register_fake
def _(qkv, *rest):
    *options, _, with_state, _ = rest
    options = QkOptions(*options)
    return _shapes(qkv, options, with_state)


@torch.library.custom_op("mixflow_fast::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    qk: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    q_bias: Tensor | None,
    k_weight: Tensor | None,
    k_bias: Tensor | None,
    norm: str,
    eps: float,
    backend: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dqkv, dq_weight, dq_bias, dk_weight, dk_bias); dqkv is contiguous."""
    options = QkOptions(cos, sin, q_weight, q_bias, k_weight, k_bias, norm, eps)
    if not qkv.numel():
        return qkv.new_empty(qkv.shape), *zero_weights(options, qkv)
    with _no_autocast(qkv):
        core = choice.resolve(backend, qkv, True)
        q, k, v = qkv.unbind(2)
        if options.changes:
            q, k = qk.unbind(2)
        # Gradients of a sum or a mean arrive expanded, which no backend takes.
        dout, out = (x.contiguous().view(q.shape) for x in (dout, out))
        gradients = run_backward(core, dout, q, k, v, out, lse)
        packed = isinstance(gradients, Tensor)
        # The backend has written the answer already.
        if packed and not options.changes:
            return gradients, *empty_weights(options, qkv)
        dqkv = gradients if packed else qkv.new_empty(qkv.shape)
        parts = slots(gradients)[:2] if packed else slots(gradients)
        return dqkv, *finish(parts, dqkv, qkv, options, impl)


@_attention_backward_op.register_fake
def _(dout, out, lse, qk, qkv, *options):
    options = QkOptions(*options[:8])
    return qkv.new_empty(qkv.shape), *empty_weights(options, qkv)


def _setup_context(ctx, inputs, output) -> None:
    out, lse, qk = output
    ctx.mark_non_differentiable(lse, qk)
    ctx.set_materialize_grads(False)
    norm, eps, backend, _, impl = inputs[7:]
    ctx.rest = norm, eps, backend, impl
    ctx.save_for_backward(out, lse, qk, *inputs[:7])


def _backward(ctx, dout: Tensor | None, _lse, _qk) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 12
    refuse_second_derivatives("attention")
    out, lse, qk, qkv, cos, sin, *weights = ctx.saved_tensors
    q_weight, q_bias, k_weight, k_bias = weights
    norm, eps, backend, impl = ctx.rest
    dqkv, *gradients = _attention_backward_op(
        dout,
        out,
        lse,
        qk,
        qkv,
        cos,
        sin,
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        norm,
        eps,
        backend,
        impl,
    )
    gradients = [None if w is None else g for w, g in zip(weights, gradients, strict=True)]
    return dqkv, None, None, *gradients, None, None, None, None, None


_attention_op.register_autograd(_backward, setup_context=_setup_context)


def attention(
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
    backend: str = "auto",
    impl: str = "auto",
) -> Tensor:
    """Self-attention; the operator `mixflow_fast::attention`.

    Args:
        qkv: (B, N, 3, H, K) packed q, k and v: B samples, N tokens, H heads of K elements.
        cos, sin: (N, K) float32 tables of the rotation, or neither. They get no gradient.
        q_weight, k_weight, q_bias, k_bias, norm, eps: as `qk_norm_rope`.
        backend: one of `choice.BACKENDS`, or "auto". Tested at the first call with a
            shape; that call synchronises.
        impl: of norm, rotation and packing: "auto", "triton" or "reference".

    Returns:
        (B, N, H K) in qkv's dtype, contiguous.

    Raises:
        ValueError: arguments that do not fit; a backend that did not pass its test.
        RuntimeError: second derivatives; a shape first seen inside the capture of a CUDA graph.
    """
    weights = (q_weight, q_bias, k_weight, k_bias)
    named = dict(zip(("q_weight", "q_bias", "k_weight", "k_bias"), weights, strict=True))
    check_arguments(qkv, cos, sin, named, norm)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f'backend must be "auto" or one of {BACKENDS}, got {backend!r}')
    # An `impl` that cannot serve is refused here, where the caller's line is in the traceback.
    kernels_serve(qkv, QkOptions(cos, sin, *weights, norm or "none", eps), impl)
    # Inference keeps neither lse nor q' and k', and may take a backend that fails backward.
    needed = any(x is not None and x.requires_grad for x in (qkv, *weights))
    with_state = needed and torch.is_grad_enabled()
    out, _, _ = _attention_op(
        qkv, cos, sin, *weights, norm or "none", eps, backend, with_state, impl
    )
    return out


def attention_bytes(
    batch: int,
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    backend: str,
    norm: str | None = None,
    rope: bool = False,
    backward: bool = False,
) -> int:
    """Bytes that the kernels around the backend read and write, without those of the backend.

    Forward: q and k once each way, if they change. Backward: the gradients of q and k once each
    way, and v's where the backend does not pack them; q and k once more for a norm. The tables of
    a rotation count once. Weights and partial sums, which do not grow with the batch, do not.
    """
    section = batch * tokens * heads * head_dim * dtype.itemsize
    tables = 2 * tokens * head_dim * 4 if rope else 0
    changes = rope or norm is not None
    if not backward:
        return (4 * section + tables) if changes else 0
    core = REGISTRY[backend]
    packed = core.packs and not core.padding(head_dim, torch.device("cuda"))
    moved = (4 if changes else 0) if packed else 6
    return moved * section + (2 * section if norm is not None else 0) + tables
