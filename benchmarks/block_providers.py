"""The implementations of the transformer-block ops that are compared, as calls without arguments.

* eager: the lines of the networks' own eager mode, with PyTorch's fused norms and attention. The
  bias that our ops take was added by the matrix product before it, where it costs nothing; its
  gradient is the sum that `nn.Linear` makes.
* compile: the same lines under torch.compile, which fuses the bias, and its gradient if it can.
* liger: `LigerModulatedRMSNormFunction` and `LigerSiLUMulFunction`, if they are installed, where
  they compute the same: a modulated RMSNorm, and a SwiGLU without bias of two tensors. Its RMSNorm
  and LayerNorm alone are parts of the ops here, and neither adds a branch.
* mixflow_fast: the ops. Of attention with the backend that "auto" chose.
* flash3, flash2, cudnn, flash, efficient: `attention` with that backend, if it passed its test.

In the mode "recompute" eager is a forward and a backward pass, which is how a checkpoint makes it;
compile is the closed form of both (`RECOMPUTE`), and ours `gelu_recompute` and `swiglu_recompute`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_ops import BlockCase
from benchmarks.block_providers_plain import EPS, PLAIN, RECOMPUTE, BiasOfProduct
from benchmarks.verify import STORED, relative_rms
from mixflow_fast.kernels.activations.gelu import gelu, gelu_recompute, gelu_reference
from mixflow_fast.kernels.activations.swiglu import swiglu, swiglu_recompute, swiglu_reference
from mixflow_fast.kernels.attention.choice import choose_backend
from mixflow_fast.kernels.attention.op import attention, attention_reference
from mixflow_fast.kernels.attention.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from mixflow_fast.kernels.residual_norm.op import (
    modulated_norm,
    modulated_norm_reference,
    residual_norm,
    residual_norm_reference,
)
from mixflow_fast.models.embedders import rope_tables

OUTPUTS = {"residual_norm": ("x'", "y"), "qk_norm_rope": ("q", "k")}
# Relative RMS error against float64, in units of one rounding of the dtype. It tells a wrong result
# from a right one at the timed shape; `benchmarks.checks` holds ours to twice eager's error. Plain
# bf16 lines round after each operation, attention rounds its weights.
OURS, OTHERS = 2.0, 6.0

Call = Callable[[], dict[str, Any]]
Tensors = dict[str, Tensor]


class NotThere(RuntimeError):
    """A provider that this machine or this shape has not; the message says why."""


@dataclass(frozen=True)
class BlockInputs:
    """What every provider of a cell is given.

    Attributes:
        tensors: the op's arguments by name; shift, scale and gate are chunks of one tensor.
        biased: the argument that has a bias with the bias added, as its matrix product gives it.
        upstream: a gradient for each output.
        scratch: what `verify` keeps between providers.
    """

    tensors: Tensors
    biased: Tensor | None
    upstream: tuple[Tensor, ...]
    scratch: Tensors = field(default_factory=dict)

    @property
    def trained(self) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.requires_grad]


# Which argument was a matrix product, and which is its bias.
_PRODUCT = {"residual_norm": ("h", "h_bias"), "gelu": ("x", "bias"), "swiglu": ("x", "bias")}


def make_inputs(case: BlockCase, device: torch.device, seed: int = 0) -> BlockInputs:
    """Random tensors of the cell's shapes and dtype, every one that can be is trained."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, around: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device, dtype=case.dtype)
        return values if not around else values.mul_(0.1).add_(around)

    tensors: Tensors = {}
    outputs = [case.shape]
    width = case.shape[-1]
    if case.op in ("residual_norm", "modulated_norm"):
        B, N, D = case.shape
        tensors["x"] = normal(B, N, D)
        chunked = normal(B, N, 6 * D) if case.per_token else normal(B, 6 * D)
        chunked.requires_grad_()
        shift, scale, gate = chunked.chunk(6, dim=-1)[:3]
        if case.op == "residual_norm":
            tensors |= {"h": normal(B, N, D), "gate": gate, "h_bias": normal(D)}
            outputs = [case.shape] * 2
        tensors |= {"shift": shift, "scale": scale}
        if case.norm == "rms":
            tensors["weight"] = normal(D, around=1.0)
    elif case.op in ("gelu", "swiglu"):
        tensors |= {"x": normal(*case.shape), "bias": normal(width)}
        outputs = [case.shape if case.op == "gelu" else (*case.shape[:-1], width // 2)]
    else:
        B, N, H, K = case.shape
        tensors["qkv"] = normal(B, N, 3, H, K)
        for name in ("q_weight", "k_weight") if case.norm else ():
            tensors[name] = normal(K, around=1.0)
        for name in ("q_bias", "k_bias") if case.norm == "layer" else ():
            tensors[name] = normal(K)
        outputs = [case.shape] * 2 if case.op == "qk_norm_rope" else [(B, N, H * K)]
    for tensor in tensors.values():
        tensor.requires_grad_() if tensor.is_leaf else None
    if case.op in ("qk_norm_rope", "attention") and case.rotates:
        tensors |= dict(zip(("cos", "sin"), _tables(N, K, device), strict=True))
    biased = None
    if case.op in _PRODUCT:
        product, bias = (tensors[name].detach() for name in _PRODUCT[case.op])
        biased = (product + bias).requires_grad_()
    return BlockInputs(tensors, biased, tuple(normal(*shape) for shape in outputs))


def _tables(tokens: int, head_dim: int, device: torch.device) -> list[Tensor]:
    side = round(tokens**0.5)
    # Toy shapes have no square of tokens, nor need one.
    side += side * side < tokens
    return [table[:tokens].to(device) for table in rope_tables(head_dim, side)]


OPS = {
    "residual_norm": (residual_norm, residual_norm_reference),
    "modulated_norm": (modulated_norm, modulated_norm_reference),
    "gelu": (gelu, gelu_reference),
    "swiglu": (swiglu, swiglu_reference),
    "qk_norm_rope": (qk_norm_rope, qk_norm_rope_reference),
    "attention": (attention, attention_reference),
}
# (gradient of the output, x, bias) -> (dx, dbias, the output recomputed)
OURS_RECOMPUTE = {"gelu": gelu_recompute, "swiglu": swiglu_recompute}


_RECOMPUTE = ("out", "dx", "dbias")


def op_options(case: BlockCase) -> dict[str, Any]:
    """What else our op and its reference take."""
    has_norm = case.op not in ("gelu", "swiglu")
    return {"norm": case.norm, "eps": EPS} if has_norm else {}


def _call(
    case: BlockCase,
    inputs: BlockInputs,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Tensors,
    **options: Any,
) -> Call:
    names = OUTPUTS.get(case.op, ("out",))

    def forward() -> dict[str, Any]:
        made = function(**tensors, **options)
        return dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))

    def without_gradient() -> dict[str, Any]:
        with torch.no_grad():
            return forward()

    def full() -> dict[str, Any]:
        made = forward()
        wanted = [inputs.tensors[name] for name in inputs.trained]
        gradients = torch.autograd.grad(list(made.values()), wanted, inputs.upstream)
        found = {f"d{n}": g for n, g in zip(inputs.trained, gradients, strict=True)}
        return {name: value.detach() for name, value in made.items()} | found

    return without_gradient if case.mode == "forward" else full


def plain_call(
    case: BlockCase, inputs: BlockInputs, wrap: Callable[[Any], Any] | None = None
) -> Call:
    """A call of the plain lines, the bias added before them; of what `wrap` makes of them with."""
    tensors, plain = dict(inputs.tensors), PLAIN[case.op]
    if wrap is not None and case.mode == "recompute":
        recompute = wrap(RECOMPUTE[case.op])
        x, bias = (tensor.detach() for tensor in tensors.values())
        return lambda: dict(zip(_RECOMPUTE, recompute(*inputs.upstream, x, bias), strict=True))
    if wrap is not None:
        return _call(case, inputs, wrap(plain), tensors)
    if inputs.biased is None:
        return _call(case, inputs, plain, tensors)
    product, bias = _PRODUCT[case.op]
    rest = {name: tensor for name, tensor in tensors.items() if name not in (product, bias)}

    def with_bias(**given: Tensor) -> Any:
        z = BiasOfProduct.apply(inputs.biased, tensors[product], tensors[bias])
        return plain(**{product: z}, **given)

    return _call(case, inputs, with_bias, rest)


def mixflow_call(
    case: BlockCase, inputs: BlockInputs, impl: str = "triton", backend: str = "auto"
) -> Call:
    """A call of our op."""
    if case.mode == "recompute":
        x, bias = (tensor.detach() for tensor in inputs.tensors.values())

        def recompute() -> dict[str, Any]:
            dx, dbias, y = OURS_RECOMPUTE[case.op](*inputs.upstream, x, bias, impl=impl)
            return dict(zip(_RECOMPUTE, (y, dx, dbias), strict=True))

        return recompute
    options = op_options(case) | {"impl": impl}
    if case.op == "attention":
        options["backend"] = backend
    return _call(case, inputs, OPS[case.op][0], inputs.tensors, **options)


def reference_call(case: BlockCase, inputs: BlockInputs) -> Call:
    """A call of our op's reference: on float64 tensors, the truth."""
    return _call(case, inputs, OPS[case.op][1], inputs.tensors, **op_options(case))


def other_call(provider: str, case: BlockCase, inputs: BlockInputs, impl: str) -> tuple[Call, str]:
    """The call of "liger" or of an attention backend, and a sentence on how it is set up.

    Raises:
        NotThere: it is not installed, or did not pass its test here.
    """
    if provider == "liger":
        return _liger_call(case, inputs)
    found = verdict(provider, case, inputs)
    if not found.startswith("ok"):
        raise NotThere(found)
    return mixflow_call(case, inputs, impl, provider), f"attention(backend={provider!r}): {found}"


def verdict(backend: str, case: BlockCase, inputs: BlockInputs) -> str:
    """What the backend's own test at this shape found."""
    B, N, H, K = case.shape
    key = B, N, H, K, case.dtype, inputs.tensors["qkv"].device
    try:
        choice = choose_backend(*key, backward=case.mode != "forward", candidates=(backend,))
    except ValueError as error:
        return str(error).partition(f"{backend}: ")[2].partition(" (")[0] or str(error)
    return choice.tested[backend]


def note(case: BlockCase, inputs: BlockInputs, impl: str) -> str:
    """How our own call is set up."""
    if case.op != "attention":
        return f"{case.op}{'_recompute' if case.mode == 'recompute' else ''}(impl={impl!r})"
    B, N, H, K = case.shape
    key = B, N, H, K, case.dtype, inputs.tensors["qkv"].device
    choice = choose_backend(*key, backward=case.mode != "forward")
    return f'attention(backend="auto", impl={impl!r}): {choice.backend}'


def _liger_call(case: BlockCase, inputs: BlockInputs) -> tuple[Call, str]:
    if importlib.util.find_spec("liger_kernel") is None:
        raise NotThere("liger_kernel is not installed")
    try:
        from liger_kernel.ops import LigerModulatedRMSNormFunction as modulated
        from liger_kernel.ops import LigerSiLUMulFunction as silu_mul
    except ImportError as error:
        raise NotThere(f"this liger_kernel has not what is compared: {error}") from error
    if case.op == "swiglu":
        a, b = (half.contiguous() for half in inputs.biased.detach().chunk(2, dim=-1))
        how = "LigerSiLUMulFunction of two contiguous tensors, bias added before"
        return _call(case, inputs, lambda: silu_mul.apply(a, b), {}), how

    def norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        # Not in place: the upstream gradient is needed again.
        return modulated.apply(x, weight, scale, shift, EPS, 0.0, "llama", False)

    return _call(case, inputs, norm, inputs.tensors), "LigerModulatedRMSNormFunction"


def as_double(inputs: BlockInputs, samples: list[int] | None = None) -> BlockInputs:
    """The same numbers in float64, tables as they are; of some samples of qkv alone if given."""

    def double(name: str, tensor: Tensor) -> Tensor:
        if name in ("cos", "sin"):
            return tensor
        picked = tensor[samples] if samples is not None and name == "qkv" else tensor
        return picked.detach().double().requires_grad_(tensor.requires_grad)

    tensors = {name: double(name, tensor) for name, tensor in inputs.tensors.items()}
    upstream = tuple(g if samples is None else g[samples] for g in inputs.upstream)
    return BlockInputs(tensors, None, tuple(g.double() for g in upstream))


def verify(case: BlockCase, inputs: BlockInputs, made: dict[str, Any], provider: str) -> list[str]:
    """What is wrong with the tensors that a call returned: one line each, empty if nothing is.

    Of attention the first and the last sample are looked at.
    """
    samples = [0, case.shape[0] - 1] if case.op == "attention" else None
    if not inputs.scratch:
        inputs.scratch.update(reference_call(case, as_double(inputs, samples))())
    exact = provider == "mixflow_fast" and case.op != "attention"
    wrong = []
    for name, truth in inputs.scratch.items():
        value = made[name] if samples is None or truth.dim() == 1 else made[name][samples]
        if value.shape != truth.shape or value.dtype != case.dtype:
            wrong.append(f"{name} is {value.dtype} {tuple(value.shape)}")
            continue
        # Samples apart, a weight's gradient is that of another batch.
        if samples is not None and truth.dim() == 1:
            continue
        allowed = (OURS if exact else OTHERS) * STORED[case.dtype]
        error = relative_rms(value, truth)
        if not error <= allowed:
            wrong.append(f"{name}: {error:.3g}, allowed {allowed:.3g}")
    return wrong
