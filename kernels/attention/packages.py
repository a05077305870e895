"""Calls of the flash-attn packages, whose functions take other arguments in every other version."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def flash2_module() -> object:
    """FlashAttention-2, the package `flash_attn`."""
    return importlib.import_module("flash_attn.flash_attn_interface")


@functools.cache
def flash3_module() -> object:
    """FlashAttention-3, which is installed under one of two names."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        return importlib.import_module("flash_attn_3.flash_attn_interface")
    return importlib.import_module("flash_attn_interface")


@functools.cache
def _parameters(function: Callable) -> list[inspect.Parameter]:
    # A `torch.library.custom_op` keeps the function with the arguments' names.
    function = getattr(function, "_init_fn", function)
    return list(inspect.signature(function).parameters.values())


def call_by_name(function: Callable, **known: object) -> object:
    """Calls `function` with those of `known` that it takes, and None for what it needs besides."""
    given = []
    for parameter in _parameters(function):
        if parameter.name in known:
            given.append(known[parameter.name])
        else:
            needed = parameter.default is inspect.Parameter.empty
            given.append(None if needed else parameter.default)
    return function(*given)


def _options(scale: float) -> dict[str, object]:
    """No mask, no window, no dropout, in the words of all versions."""
    window = dict(window_size=(-1, -1), window_size_left=-1, window_size_right=-1)
    flags = dict(causal=False, is_causal=False, return_softmax=False, return_attn_probs=False)
    return dict(softmax_scale=scale, dropout_p=0.0, softcap=0.0, **window, **flags)


def package_pair(module: Callable[[], object]) -> tuple[Callable, Callable]:
    """(forward, backward) of a module that has `_flash_attn_forward` and `_flash_attn_backward`."""

    def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        found = call_by_name(module()._flash_attn_forward, q=q, k=k, v=v, **_options(scale))
        # Between out and lse, older versions return their padded inputs.
        lse = next(x for x in found[1:] if x.dim() == 3 and x.dtype == torch.float32)
        return found[0], lse

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
    ) -> Tensor:
        B, N, H, K = q.shape
        packed = q.new_empty(B, N, 3, H, K)
        dq, dk, dv = packed.unbind(2)
        call_by_name(
            module()._flash_attn_backward,
            dout=dout,
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            dq=dq,
            dk=dk,
            dv=dv,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **_options(scale),
        )
        return packed

    return forward, backward
