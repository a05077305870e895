"""The operators of a transformer block with inputs.

| op             | variants                           | shape        |                          |
|----------------|------------------------------------|--------------|--------------------------|
| residual_norm  | norm, per sample or token          | (B, N, D)    | residual, norm,          |
|                |                                    |              | modulation: twice a block|
| modulated_norm | the same                           | (B, N, D)    | the same without a branch|
| gelu           | bias                               | (B, N, F)    | SiT's perceptron         |
| swiglu         | bias                               | (B, N, 2 F)  | DiT-DH's                 |
| qk_norm_rope   | norm and rotation of q and k       | (B, N, H, K) |                          |
| attention      | plain, or with norm and rotation   | (B, N, H, K) | softmax(q k^T) v         |

Every argument that can have a gradient has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from mixflow_fast.diagnostics.kernel_cases import (
    Call,
    Draw,
    Function,
    Inputs,
    Mode,
    Tensors,
    dtype_name,
    function_call,
    shape_name,
)
from mixflow_fast.kernels.activations.gelu import gelu, gelu_recompute, gelu_reference
from mixflow_fast.kernels.activations.swiglu import swiglu, swiglu_recompute, swiglu_reference
from mixflow_fast.kernels.attention.choice import choose_backend
from mixflow_fast.kernels.attention.op import attention, attention_reference
from mixflow_fast.kernels.attention.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from mixflow_fast.kernels.residual_norm.op import modulated_norm, residual_norm
from mixflow_fast.kernels.residual_norm.recompute import (
    residual_norm_forward,
    residual_norm_recompute,
)
from mixflow_fast.kernels.residual_norm.reference import (
    modulated_norm_reference,
    residual_norm_reference,
)

EPS = 1e-6


@dataclass(frozen=True)
class BlockOp:
    """An operator of a transformer block.

    Attributes:
        ours, reference: functions of the arguments by name, and norm and eps where it has a norm;
            ours takes `impl`, too.
        outputs: names of what they return.
        recompute: (inputs, impl, options) -> the call of the mode "recompute".
    """

    ours: Function
    reference: Function
    outputs: tuple[str, ...] = ("out",)
    recompute: Callable[[Inputs, str, Mapping[str, object]], Call] | None = None


def _recompute_activation(function: Function) -> Callable[..., Call]:
    def make(inputs: Inputs, impl: str, options: Mapping[str, object]) -> Call:
        x, bias = (tensor.detach() for tensor in inputs.tensors.values())

        def call() -> Tensors:
            dx, dbias, out = function(inputs.upstream[0], x, bias, impl=impl)
            return {"out": out, "dx": dx, "dbias": dbias}

        return call

    return make


def _recompute_norm(inputs: Inputs, impl: str, options: Mapping[str, object]) -> Call:
    """The backward pass after a forward pass whose y was not kept."""
    names = ("x", "h", "gate", "shift", "scale", "h_bias", "weight")
    x, *given, h_bias, weight = (inputs.tensors.get(name) for name in names)
    shared = {"norm": options["norm"], "impl": impl, "h_bias": h_bias, "weight": weight}
    *of_x, of_y = inputs.upstream
    needs = [name in inputs.tensors for name in names] + [True]
    with torch.no_grad():
        forward = residual_norm_forward(x, *given, eps=options["eps"], **shared)
    x_new, _, mean, rstd = forward

    def call() -> Tensors:
        with torch.no_grad():
            found = residual_norm_recompute(
                of_y, of_x[0] if of_x else None, x_new, *given, mean, rstd, needs, **shared
            )
        *gradients, y = found
        made = {f"d{n}": g for n, g in zip(names, gradients, strict=True) if g is not None}
        return made | ({"x'": x_new, "y": y} if of_x else {"out": y})

    return call


BLOCK_OPS = {
    "residual_norm": BlockOp(
        residual_norm, residual_norm_reference, ("x'", "y"), recompute=_recompute_norm
    ),
    "modulated_norm": BlockOp(modulated_norm, modulated_norm_reference, recompute=_recompute_norm),
    "gelu": BlockOp(gelu, gelu_reference, recompute=_recompute_activation(gelu_recompute)),
    "swiglu": BlockOp(swiglu, swiglu_reference, recompute=_recompute_activation(swiglu_recompute)),
    "qk_norm_rope": BlockOp(qk_norm_rope, qk_norm_rope_reference, ("q", "k")),
    "attention": BlockOp(attention, attention_reference),
}


@dataclass(frozen=True)
class Variant:
    """What of a block's operator a case switches on."""

    norm: str | None = None
    per_token: bool = False
    rotates: bool = False


VARIANTS = {
    "layer per sample": Variant("layer"),
    "layer per token": Variant("layer", per_token=True),
    "rms per sample": Variant("rms"),
    "rms per token": Variant("rms", per_token=True),
    "bias": Variant(),
    "plain": Variant(),
    "rope": Variant(rotates=True),
    "rms, rope": Variant("rms", rotates=True),
    "rms": Variant("rms"),
    "layer": Variant("layer"),
}
_SHARED = frozenset(
    ("weight", "bias", "h_bias", "cos", "sin", "q_weight", "k_weight", "q_bias", "k_bias")
)


@dataclass(frozen=True, kw_only=True)
class BlockCase:
    """One of `BLOCK_OPS` at a shape.

    Attributes:
        variant: a key of `VARIANTS`.
        without: optional arguments that are left out.
        frozen: arguments that get no gradient.
        vector_dtype: of shift, scale, gate, weights and biases; None: the data's.
    """

    op: str
    shape: tuple[int, ...]
    variant: str
    mode: Mode = "full"
    dtype: torch.dtype = torch.bfloat16
    without: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    vector_dtype: torch.dtype | None = None

    @property
    def ops(self) -> tuple[str, ...]:
        return (self.op,)

    @property
    def name(self) -> str:
        mode = "" if self.mode == "full" else f"{self.mode} "
        return f"{self.op} {mode}{self.variant} {shape_name(self.shape)}"

    @property
    def label(self) -> str:
        return f"{self.name} {dtype_name(self.dtype)}"

    @property
    def options(self) -> dict[str, object]:
        """What the operator takes besides the inputs."""
        left_out = dict.fromkeys(self.without)
        if self.op in ("gelu", "swiglu"):
            return left_out
        return {"norm": VARIANTS[self.variant].norm, "eps": EPS, **left_out}

    def op_of(self, tensor: str) -> str:
        return self.op

    def inputs(self, device: torch.device, empty: bool = False) -> Inputs:
        """Every argument that can be is trained."""
        draw = Draw(device, self.dtype, empty)
        outputs = [self.shape]
        if self.op in ("residual_norm", "modulated_norm"):
            tensors = self._norm_tensors(draw)
            outputs = [self.shape] * len(BLOCK_OPS[self.op].outputs)
        elif self.op in ("gelu", "swiglu"):
            bias = draw.normal(self.shape[-1], dtype=self.vector_dtype)
            tensors = {"x": draw.normal(*self.shape), "bias": bias}
            if self.op == "swiglu":
                outputs = [(*self.shape[:-1], self.shape[-1] // 2)]
        else:
            B, N, H, K = self.shape
            tensors = self._qkv_tensors(draw)
            outputs = [self.shape] * 2 if self.op == "qk_norm_rope" else [(B, N, H * K)]
        tensors = {name: x for name, x in tensors.items() if name not in self.without}
        for name, tensor in tensors.items():
            if name in self.frozen:
                tensors[name] = tensor.detach()
            elif tensor.is_leaf:
                tensor.requires_grad_()
        if VARIANTS[self.variant].rotates:
            tensors |= _rotation(self.shape, device)
        return Inputs(tensors, tuple(draw.normal(*shape) for shape in outputs), _SHARED)

    def _norm_tensors(self, draw: Draw) -> Tensors:
        B, N, D = self.shape
        variant = VARIANTS[self.variant]
        wide = (B, N, 6 * D) if variant.per_token else (B, 6 * D)
        chunked = draw.normal(*wide, dtype=self.vector_dtype).requires_grad_()
        shift, scale, gate = chunked.chunk(6, dim=-1)[:3]
        tensors = {"x": draw.normal(B, N, D)}
        if self.op == "residual_norm":
            h_bias = draw.normal(D, dtype=self.vector_dtype)
            tensors |= {"h": draw.normal(B, N, D), "gate": gate, "h_bias": h_bias}
        tensors |= {"shift": shift, "scale": scale}
        if variant.norm == "rms":
            tensors["weight"] = draw.normal(D, mean=1.0, std=0.1, dtype=self.vector_dtype)
        return tensors

    def _qkv_tensors(self, draw: Draw) -> Tensors:
        B, N, H, K = self.shape
        norm, dtype = VARIANTS[self.variant].norm, self.vector_dtype
        tensors = {"qkv": draw.normal(B, N, 3, H, K)}
        for name in ("q_weight", "k_weight") if norm else ():
            tensors[name] = draw.normal(K, mean=1.0, std=0.1, dtype=dtype)
        for name in ("q_bias", "k_bias") if norm == "layer" else ():
            tensors[name] = draw.normal(K, dtype=dtype)
        return tensors

    def call(self, inputs: Inputs, impl: str, backend: str = "auto") -> Call:
        op, options = BLOCK_OPS[self.op], self.options
        if self.mode == "recompute":
            return op.recompute(inputs, impl, options)
        options["impl"] = impl
        if self.op == "attention":
            options["backend"] = backend
        return function_call(op.ours, inputs, op.outputs, self.mode, **options)

    def reference(self, inputs: Inputs) -> Call:
        op = BLOCK_OPS[self.op]
        return function_call(op.reference, inputs, op.outputs, self.mode, **self.options)

    def parts(self, inputs: Inputs, found: Tensors) -> Tensors:
        return found


def _rotation(shape: tuple[int, ...], device: torch.device) -> Tensors:
    """Tables of angles for any even head_dim; those of the networks need one that 4 divides."""
    _, N, _, K = shape
    angles = torch.outer(torch.arange(N), 10.0 ** -torch.linspace(0, 3, K // 2)).repeat(1, 2)
    return {"cos": angles.cos().to(device), "sin": angles.sin().to(device)}


def backend_verdict(backend: str, case: BlockCase, device: torch.device) -> str:
    """What attention's own test of a backend found at the case's shape; "ok ..." if it serves."""
    options = {"backward": case.mode != "forward", "candidates": (backend,)}
    try:
        choice = choose_backend(*case.shape, case.dtype, device, **options)
    except ValueError as error:
        return str(error).partition(f"{backend}: ")[2].partition(" (")[0] or str(error)
    return choice.tested[backend]
