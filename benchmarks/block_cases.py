"""What `compile_report` compiles of the transformer-block ops: (op, variant, call, quick) rows.

A call takes a function that forgets the launches before it, for what was only preparation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from mixflow_fast.kernels.activations.gelu import gelu, gelu_recompute
from mixflow_fast.kernels.activations.swiglu import swiglu, swiglu_recompute
from mixflow_fast.kernels.attention.qk_norm_rope import QkOptions, finish, prepare
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from mixflow_fast.kernels.residual_norm.recompute import (
    residual_norm_forward,
    residual_norm_recompute,
)

Row = tuple[str, str, Callable[[Callable[[], None]], object], bool]


def _residual_norm(
    mark: Callable[[], None],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    norm: str = "layer",
    per_token: bool = False,
    has_h: bool = True,
    has_shift: bool = True,
    has_h_bias: bool = False,
    frozen: bool = False,
    modulation_dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> None:
    """Forward and backward; gate, shift and scale are chunks of one tensor, as in the models.

    `recompute`: the backward pass that recomputes y.
    """
    B, N, D = shape
    other = modulation_dtype or dtype

    def leaf(*shape: int, dtype: torch.dtype = other) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    chunked = torch.empty((B, N, 6 * D) if per_token else (B, 6 * D), dtype=other)
    shift, scale, gate = (v.requires_grad_(not frozen) for v in chunked.chunk(6, dim=-1)[:3])
    x, h = leaf(*shape, dtype=dtype), leaf(*shape, dtype=dtype)
    options = dict(norm=norm, impl="triton", weight=leaf(D) if norm == "rms" else None)
    shift = shift if has_shift else None
    upstream = torch.empty(shape, dtype=dtype)
    h_bias = leaf(D) if has_h and has_h_bias else None
    if recompute:
        inputs = (h, gate, shift, scale) if has_h else (None, None, shift, scale)
        needs = [True, has_h, has_h, has_shift, True, has_h_bias, norm == "rms", True]
        options["h_bias"] = h_bias
        with torch.no_grad():
            x_new, _, *statistics = residual_norm_forward(x, *inputs, **options)
            mark()
            residual_norm_recompute(
                upstream, upstream, x_new, *inputs, *statistics, needs, **options
            )
        return
    if has_h:
        outputs = residual_norm(x, h, gate, shift, scale, h_bias=h_bias, **options)
    else:
        outputs = (modulated_norm(x, shift, scale, **options),)
    torch.autograd.backward(outputs, [upstream] * len(outputs))


def residual_norm_rows() -> list[Row]:
    def row(variant: str, *shape: int, quick: bool = False, **options: object) -> Row:
        call = partial(_residual_norm, shape=shape, **{"dtype": torch.bfloat16} | options)
        op = "residual_norm" if options.get("has_h", True) else "modulated_norm"
        return op, variant, call, quick

    fp32, fp16 = {"dtype": torch.float32}, {"dtype": torch.float16}
    rms, bias, alone = {"norm": "rms"}, {"has_h_bias": True}, {"has_h": False}
    token = {"per_token": True, **rms}
    return [
        row("sit xl bf16", 256, 256, 1152, quick=True),
        row("sit xl fp32", 256, 256, 1152, quick=True, **fp32),
        row("sit xl bf16, h_bias", 256, 256, 1152, quick=True, **bias),
        row("sit xl fp32, h_bias", 256, 256, 1152, **fp32, **bias),
        row(
            "sit xl fp32, modulation bf16", 256, 256, 1152, modulation_dtype=torch.bfloat16, **fp32
        ),
        row("sit xl bf16, frozen modulation", 256, 256, 1152, frozen=True),
        row("sit s bf16, h_bias", 256, 256, 384, **bias),
        row("sit b fp16, h_bias", 256, 256, 768, **bias, **fp16),
        row("sit l bf16, h_bias", 256, 256, 1024, **bias),
        row("rae encoder bf16 rms, h_bias", 64, 256, 1152, **rms, **bias),
        row(
            "rae encoder fp32 rms, h_bias, no shift",
            64,
            256,
            1152,
            has_shift=False,
            **rms,
            **bias,
            **fp32,
        ),
        row("per sample 2048 bf16, h_bias", 64, 256, 2048, **bias),
        row("per sample 2048 fp32 rms, h_bias", 64, 256, 2048, **rms, **bias, **fp32),
        row("rae head bf16 rms per token", 64, 256, 2048, quick=True, **token),
        row("rae head bf16 rms per token, h_bias", 64, 256, 2048, **token, **bias),
        row(
            "rae head fp32 rms per token, no shift", 64, 256, 2048, has_shift=False, **token, **fp32
        ),
        row("layer per token bf16", 64, 256, 2048, per_token=True),
        row("per sample 4096 bf16, h_bias", 8, 256, 4096, **bias),
        row("per sample 4096 fp32 rms, h_bias", 8, 256, 4096, **rms, **bias, **fp32),
        row("per token 4096 fp32 rms, h_bias", 8, 256, 4096, **token, **bias, **fp32),
        row("per token 4096 bf16", 8, 256, 4096, per_token=True),
        row("odd fp16, h_bias", 3, 7, 1023, **bias, **fp16),
        row("odd fp32 rms per token", 3, 7, 33, **token, **fp32),
        row(
            "sit xl bf16, h_bias, y recomputed", 256, 256, 1152, quick=True, recompute=True, **bias
        ),
        row("sit xl fp32, h_bias, y recomputed", 256, 256, 1152, recompute=True, **bias, **fp32),
        row(
            "sit xl fp32, modulation bf16, y recomputed",
            *(256, 256, 1152),
            modulation_dtype=torch.bfloat16,
            recompute=True,
            **bias,
            **fp32,
        ),
        row("sit l bf16, h_bias, y recomputed", 256, 256, 1024, recompute=True, **bias),
        row(
            "rae encoder bf16 rms, h_bias, y recomputed",
            64,
            256,
            1152,
            recompute=True,
            **rms,
            **bias,
        ),
        row(
            "rae head bf16 rms per token, y recomputed",
            64,
            256,
            2048,
            recompute=True,
            **token,
            **bias,
        ),
        row(
            "rae head fp32 rms per token, no shift, y recomputed",
            *(64, 256, 2048),
            has_shift=False,
            recompute=True,
            **token,
            **bias,
            **fp32,
        ),
        row("per sample 4096 bf16, y recomputed", 8, 256, 4096, recompute=True, **bias),
        row(
            "per sample 4096 fp32 rms, y recomputed",
            8,
            256,
            4096,
            recompute=True,
            **rms,
            **bias,
            **fp32,
        ),
        row(
            "per token 4096 fp32 rms, y recomputed",
            8,
            256,
            4096,
            recompute=True,
            **token,
            **bias,
            **fp32,
        ),
        row("odd fp16, h_bias, y recomputed", 3, 7, 1023, recompute=True, **bias, **fp16),
        row("sit xl bf16", 256, 256, 1152, quick=True, **alone),
        row("sit xl bf16, y recomputed", 256, 256, 1152, recompute=True, **alone),
        row("rae head bf16 rms per token", 64, 256, 2048, **alone, **token),
    ]


def _activation(
    mark: Callable[[], None],
    function: Callable[..., torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bias_dtype: torch.dtype | None = None,
    has_bias: bool = True,
    frozen: bool = False,
    recompute: bool = False,
) -> None:
    """Forward and backward; `recompute`: the backward pass that makes the output again."""
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    bias = None
    if has_bias:
        bias = torch.empty(shape[-1], dtype=bias_dtype or dtype, requires_grad=not frozen)
    y = function(x, bias, impl="triton")
    if recompute:
        mark()
        other = {gelu: gelu_recompute, swiglu: swiglu_recompute}[function]
        other(torch.empty(y.shape, dtype=dtype), x.detach(), bias.detach(), impl="triton")
    else:
        y.backward(torch.empty(y.shape, dtype=dtype))


def activation_rows() -> list[Row]:
    def row(op: str, variant: str, *shape: int, quick: bool = False, **options: object) -> Row:
        function = {"gelu": gelu, "swiglu": swiglu}[op]
        options = {"dtype": torch.bfloat16} | options
        return op, variant, partial(_activation, function=function, shape=shape, **options), quick

    fp32, fp16 = {"dtype": torch.float32}, {"dtype": torch.float16}
    rows = []
    for op, widths in (("gelu", (4608, 1536)), ("swiglu", (2 * 5504, 2 * 2048))):
        wide, narrow = ((32, 256, width) for width in widths)
        rows += [
            row(op, "widest bf16", *wide, quick=True),
            row(op, "widest fp32", *wide, quick=True, **fp32),
            row(op, "widest bf16, bias fp32", *wide, bias_dtype=torch.float32),
            row(op, "widest bf16, no bias", *wide, has_bias=False),
            row(op, "widest bf16, frozen bias", *wide, frozen=True),
            row(op, "narrow fp16", *narrow, **fp16),
            row(op, "one sample bf16", 1, *wide[1:]),
            row(op, "widest bf16, output again", *wide, quick=True, recompute=True),
            row(op, "widest fp32, output again", *wide, recompute=True, **fp32),
            row(op, "odd bf16, output again", 2, 7, 2 * 1023, recompute=True),
            row(op, "odd rows bf16, output again", 257, 257, wide[-1], recompute=True),
            row(op, "one row bf16, output again", 1, 1, wide[-1], recompute=True),
            row(op, "odd bf16", 2, 7, 2 * 1023 if op == "swiglu" else 1023),
        ]
    return [*rows, row("swiglu", "rae 2730 bf16", 32, 256, 2 * 2730)]


def _qk_norm_rope(
    mark: Callable[[], None],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    norm: str = "none",
    rope: bool = True,
    weight_dtype: torch.dtype | None = None,
    packed: bool = False,
    forward: bool = True,
) -> None:
    """What stands around a backend of `attention`; `packed`: which writes packed gradients."""
    B, N, H, K = shape
    qkv = torch.empty(B, N, 3, H, K, dtype=dtype)
    table = torch.empty(N, K) if rope else None
    weight = torch.empty(K, dtype=weight_dtype or dtype) if norm != "none" else None
    bias = weight if norm == "layer" else None
    options = QkOptions(table, table, weight, bias, weight, bias, norm, 1e-6)
    if forward:
        prepare(qkv, options, "triton")
    out = torch.empty_like(qkv)
    separate = tuple(torch.empty(B, N, H, K, dtype=dtype) for _ in range(3))
    finish(out.unbind(2)[:2] if packed else separate, out, qkv, options, "triton")


def attention_rows() -> list[Row]:
    def row(variant: str, *shape: int, quick: bool = False, **options: object) -> Row:
        call = partial(_qk_norm_rope, shape=shape, **{"dtype": torch.bfloat16} | options)
        return "attention", variant, call, quick

    fp32, fp16 = {"dtype": torch.float32}, {"dtype": torch.float16}
    layer, rms = {"norm": "layer", "rope": False}, {"norm": "rms"}
    return [
        row("rae encoder bf16 rope", 32, 256, 16, 72, quick=True),
        row("rae encoder bf16 rope, packed", 32, 256, 16, 72, packed=True),
        row("rae encoder fp32 rope", 32, 256, 16, 72, **fp32),
        row("rae head bf16 rope", 32, 256, 16, 128),
        row("rae b fp16 rope", 32, 256, 12, 64, **fp16),
        row("sit xl bf16 layer", 32, 256, 16, 72, quick=True, **layer),
        row(
            "sit xl bf16 layer, fp32 weights", 32, 256, 16, 72, weight_dtype=torch.float32, **layer
        ),
        row("sit xl fp32 layer, packed", 32, 256, 16, 72, packed=True, **layer, **fp32),
        row("sit b fp16 layer", 32, 256, 12, 64, **layer, **fp16),
        row("rae head bf16 rms rope", 32, 256, 16, 128, **rms),
        row("rae encoder fp32 rms rope, packed", 32, 256, 16, 72, packed=True, **rms, **fp32),
        row("sit xl bf16 pack", 32, 256, 16, 72, rope=False, forward=False),
        row("odd fp32 layer", 2, 5, 3, 33, **layer, **fp32),
        row("odd bf16 rms rope", 2, 5, 3, 10, **rms),
        row("odd fp16 rope", 2, 5, 3, 10, **fp16),
    ]


def rows() -> list[Row]:
    """Every kind of launch at least once: not every product of kinds."""
    return [*residual_norm_rows(), *activation_rows(), *attention_rows()]
