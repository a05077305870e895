"""Stand-ins for backends that only a GPU can run: they bind their arguments to the real signatures.

They compute as `math` does, and check how they are called.
"""

from types import SimpleNamespace

import torch

from mixflow_fast.kernels.attention.backends import math_backward, math_forward


def bound(op, arguments: tuple, keywords: dict) -> SimpleNamespace:
    """Arguments by name, as the operator's schema has them; TypeError where they do not fit."""
    schema = op.default._schema.arguments
    positional = [a.name for a in schema if not a.kwarg_only]
    if len(arguments) > len(positional):
        raise TypeError("too many arguments")
    given = dict(zip(positional, arguments, strict=False))
    for name in keywords:
        if name in given or name not in {a.name for a in schema}:
            raise TypeError(name)
    given |= keywords
    for a in schema:
        if a.name not in given and not a.has_default_value():
            raise TypeError(f"{a.name} is missing")
        value, kind = given.get(a.name, a.default_value), str(a.type)
        fits = {"Tensor": torch.Tensor, "float": float, "int": int, "bool": bool}.get(kind)
        if fits and value is not None and not isinstance(value, fits):
            raise TypeError(f"{a.name} is {kind}, got {value!r}")
        given[a.name] = value
    return SimpleNamespace(**given)


def efficient_forward(*arguments, **keywords):
    a = bound(torch.ops.aten._efficient_attention_forward, arguments, keywords)
    assert a.compute_log_sumexp and a.custom_mask_type == 0 and a.dropout_p == 0
    out, lse = math_forward(a.query, a.key, a.value, a.scale)
    padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), torch.inf)
    padded[..., : lse.shape[2]] = lse
    return out, padded, None, None, None, None


def efficient_backward(*arguments, **keywords):
    a = bound(torch.ops.aten._efficient_attention_backward, arguments, keywords)
    assert a.shared_storage_dqdkdv and a.logsumexp.shape[-1] % 32 == 0
    N = a.query.shape[1]
    assert a.logsumexp[..., N:].isposinf().all() and a.max_seqlen_q == a.max_seqlen_k == N
    B, _, H, K = a.query.shape
    gradients = math_backward(
        a.grad_out_, a.query, a.key, a.value, a.out, a.logsumexp[..., :N], a.scale
    )
    chunk = torch.stack(gradients, dim=2)
    return *(chunk.select(2, i) for i in range(3)), None


def by_head(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def cudnn_forward(*arguments, **keywords):
    a = bound(torch.ops.aten._scaled_dot_product_cudnn_attention, arguments, keywords)
    assert a.compute_log_sumexp and a.attn_bias is None
    out, lse = math_forward(*by_head(a.query, a.key, a.value), a.scale)
    return out.transpose(1, 2), lse[..., None], *[None] * 7


def cudnn_backward(*arguments, **keywords):
    a = bound(torch.ops.aten._scaled_dot_product_cudnn_attention_backward, arguments, keywords)
    assert a.logsumexp.dim() == 4 and a.attn_bias is None
    gradients = math_backward(
        *by_head(a.grad_out, a.query, a.key, a.value, a.out), a.logsumexp[..., 0], a.scale
    )
    return tuple(by_head(*gradients))


def package(style: str) -> SimpleNamespace:
    """A `flash_attn` with the low-level functions of one of its versions."""

    def write(given, dq, dk, dv):
        for target, value in zip((dq, dk, dv), math_backward(*given), strict=True):
            target.copy_(value)

    def old_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert window_size == (-1, -1) and not causal and softcap == 0.0 and not return_softmax
        out, lse = math_forward(q, k, v, softmax_scale)
        return out, q, k, v, out, lse, None, None

    def old_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert deterministic is False and dropout_p == 0.0
        write((dout, q, k, v, out, softmax_lse, softmax_scale), dq, dk, dv)

    def new_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert window_size_left == window_size_right == -1
        return *math_forward(q, k, v, softmax_scale), None, None

    def new_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert window_size_left == window_size_right == -1
        write((dout, q, k, v, out, softmax_lse, softmax_scale), dq, dk, dv)

    def hopper_forward(q, k, v, k_new=None, cu_seqlens_q=None, softmax_scale=None, causal=False,
                       window_size_left=-1, attention_chunk=0, num_splits=1):  # fmt: skip
        assert attention_chunk == 0 and num_splits == 1
        return *math_forward(q, k, v, softmax_scale), torch.tensor([]), torch.tensor([])

    def hopper_backward(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, max_seqlen_q=None,
                        dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
                        deterministic=False, sm_margin=0):  # fmt: skip
        assert is_causal is False and sm_margin == 0
        write((dout, q, k, v, out, softmax_lse, softmax_scale), dq, dk, dv)

    forward, backward = {
        "old": (old_forward, old_backward),
        "new": (new_forward, new_backward),
        "hopper": (hopper_forward, hopper_backward),
    }[style]
    if style == "new":  # where a custom operator stands for the function
        forward, backward = (_Operator(f) for f in (forward, backward))
    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


class _Operator:
    def __init__(self, function) -> None:
        self._init_fn = function

    def __call__(self, *arguments, **keywords):
        return self._init_fn(*arguments, **keywords)
