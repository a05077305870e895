"""The registry of the benchmarks: for each operator its inputs, calls, truth, bytes and shapes.

| op             | variant              | shape        | one call                               |
|----------------|----------------------|--------------|----------------------------------------|
| interpolate    |                      | (B, C, H, W) | draw t, m and x0, write x_m            |
| velocity_loss  |                      | (B, C, H, W) | the loss, and its gradient             |
| objective      |                      | (B, C, H, W) | both. The prediction is given: the     |
|                |                      |              | network between them lets nothing fuse |
| residual_norm  | norm, per what       | (B, N, D)    | residual, norm and modulation          |
| modulated_norm | the same             | (B, N, D)    | the same without a branch              |
| gelu           | bias                 | (B, N, F)    | SiT's perceptron, bias and its gradient|
| swiglu         | bias                 | (B, N, 2 F)  | DiT-DH's, F = 3072 and 5461 or 5504    |
| qk_norm_rope   | norm and rotation    | (B, N, H, K) | norm and rotary positions of q and k   |
| attention      | plain, or with a     | (B, N, H, K) | softmax(q k^T) v with its gradient in  |
|                | rotation             |              | one packed tensor                      |
| step           |                      |              | `benchmarks/step.py`                   |

Modes: "full" is a forward pass and the gradients of every input, "forward" the first alone,
"backward" of the loss the same as full with an upstream gradient of 0.5 on the device: its price,
and "recompute" of the activations the gradients and the output once more, which was not kept.

Providers: eager and compile are the lines of `benchmarks/plain.py`; a bias that our operators take
was added by the matrix product before, where it costs nothing, and compile fuses it if it can.
liger are its functions where they compute the same: a modulated RMSNorm, and a SwiGLU of two
tensors. The others are `attention(backend=...)`, if the backend passed its own test.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.plain import (
    GAMMA,
    PLAIN,
    RECOMPUTE,
    BiasOfProduct,
    prepare,
    velocity_loss,
)
from mixflow_fast.diagnostics.block_cases import (
    BLOCK_OPS,
    EPS,
    VARIANTS,
    BlockCase,
    backend_verdict,
)
from mixflow_fast.diagnostics.kernel_cases import (
    Function,
    Inputs,
    Mode,
    Tensors,
    dtype_name,
    function_call,
    shape_name,
)
from mixflow_fast.kernels.activations.gelu import gelu_bytes
from mixflow_fast.kernels.activations.swiglu import swiglu_bytes
from mixflow_fast.kernels.attention.backends import BACKENDS
from mixflow_fast.kernels.attention.choice import choose_backend
from mixflow_fast.kernels.residual_norm.launch import residual_norm_bytes
from mixflow_fast.objective.mixflow import Interpolation, MixFlow

# "math" holds float32 scores: it is there to be right, and nobody would choose it for its speed.
TIMED_BACKENDS = tuple(name for name in BACKENDS if name != "math")
PRED_DTYPE = torch.bfloat16

# What a call made, by name; noise that is only drawn when it is looked at is a function.
Made = Mapping[str, "Tensor | Callable[[], Tensor]"]
Call = Callable[[], Made]
Wrap = Callable[[Function], Function]


class NotThere(RuntimeError):
    """A provider that this machine or this shape has not; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of the tables: op, mode, variant and shape as in the module's, the data's dtype."""

    op: str
    mode: Mode
    shape: tuple[int, ...]
    variant: str | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """bfloat16, or "float32 x1, bfloat16 pred" where the two differ and both are used."""
        name, pred = dtype_name(self.dtype), dtype_name(PRED_DTYPE)
        both = self.op in ("velocity_loss", "objective") and name != pred
        return f"{name} x1, {pred} pred" if both else name

    @property
    def label(self) -> str:
        words = (self.op, self.mode, self.variant, shape_name(self.shape), self.dtype_name)
        return " ".join(word for word in words if word)

    @property
    def providers(self) -> tuple[str, ...]:
        return REGISTRY[self.op].providers(self)

    @property
    def algorithmic_bytes(self) -> int:
        """Bytes that one pass over each tensor moves; "full": of both directions."""
        return REGISTRY[self.op].bytes(self)

    @property
    def flops(self) -> int | None:
        """Of attention: 4 N^2 K a head and twice that in the backward pass; of others None."""
        if self.op != "attention":
            return None
        B, N, H, K = self.shape
        return (4 if self.mode == "forward" else 12) * B * H * N * N * K


@dataclass(frozen=True)
class ObjectiveEntry:
    """interpolate, velocity_loss or both, by `MixFlow`; plain lines draw with torch's generator.

    An operator of the registry gives, for a cell: who is asked (`providers`), bytes of one call,
    the `inputs` that every provider is given, the calls (`plain`: of the plain lines, or of what
    `wrap` makes of them; `ours` and `other` with a note on how they are set up), and the `truth`.

    Attributes:
        interpolates, loses: which of the two it has.
    """

    name: str
    interpolates: bool = True
    loses: bool = True

    def providers(self, cell: Cell) -> tuple[str, ...]:
        return ("eager", "compile", "mixflow_fast")

    def bytes(self, cell: Cell) -> int:
        """Of any implementation that stores no noise: each tensor of x1's size once.

        interpolate reads x1 and writes x_m; the loss reads pred and x1 and writes the gradient.
        The (B,) tensors are not counted.
        """
        x1, pred = cell.dtype.itemsize, PRED_DTYPE.itemsize
        loss = x1 + pred + (0 if cell.mode == "forward" else pred)
        return cell.elements * (self.interpolates * 2 * x1 + self.loses * loss)

    def inputs(self, cell: Cell, device: torch.device) -> Inputs:
        """x1 of mean 0.5, so that a wrong direction of the path shows; noise for who stores it."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(dtype: torch.dtype) -> Tensor:
            return torch.randn(cell.shape, generator=generator, device=device, dtype=dtype)

        tensors = {
            "x1": normal(cell.dtype).add_(0.5),
            "x0": normal(cell.dtype),
            "pred": normal(PRED_DTYPE).requires_grad_(),
            "ids": torch.arange(cell.shape[0], device=device) + 10_000,
        }
        return Inputs(tensors, (torch.tensor(0.5, device=device),))

    def plain(self, cell: Cell, inputs: Inputs, wrap: Wrap | None = None) -> Call:
        prepare_fn, loss_fn = (f if wrap is None else wrap(f) for f in (prepare, velocity_loss))
        x1, pred = inputs.tensors["x1"], inputs.tensors["pred"]

        def call() -> Made:
            made, x0 = {}, inputs.tensors["x0"]
            if self.interpolates:
                x, t, slowed_t, x0 = prepare_fn(x1, GAMMA)
                made = {"x": x, "t": t, "slowed_t": slowed_t}
            if self.loses:
                made |= _loss(lambda: loss_fn(pred, x1, x0), cell, inputs)
            return made | {"x0": x0}

        return call

    def ours(self, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        mix = MixFlow(gamma=GAMMA, clock="data_at_1", impl=impl)
        x1, pred, ids = (inputs.tensors[name] for name in ("x1", "pred", "ids"))
        given = mix.prepare(x1, ids=ids)

        def call() -> Made:
            made, it = {}, given
            if self.interpolates:
                it = mix.prepare(x1, ids=ids)
                made = {"x": it.x, "t": it.t, "slowed_t": it.slowed_t}
            if self.loses:
                made |= _loss(lambda: mix.loss(pred, it), cell, inputs)
            return made | {"x0": it.x0}

        return call, f"MixFlow(impl={impl!r})"

    def other(self, provider: str, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        raise NotThere(f"{provider} has no {self.name}")

    def truth(self, cell: Cell, inputs: Inputs, made: Made | None) -> Tensors:
        """The reference in float64 on the noise and times which the provider itself used."""
        x0 = made["x0"]() if callable(made["x0"]) else made["x0"]
        t = torch.zeros(cell.shape[0], device=x0.device)
        t, slowed_t = (made.get(name, t).double() for name in ("t", "slowed_t"))
        exact, mix = inputs.double(), MixFlow(gamma=GAMMA, clock="data_at_1", impl="reference")
        it: Interpolation = mix.prepare(exact.tensors["x1"], x0=x0.double(), t=t, slowed_t=slowed_t)
        found = {"x": it.x} if self.interpolates else {}
        if self.loses:
            found |= _loss(lambda: mix.loss(exact.tensors["pred"], it), cell, exact)
        return found


def _loss(loss: Callable[[], Tensor], cell: Cell, inputs: Inputs) -> Tensors:
    if cell.mode == "forward":
        with torch.no_grad():
            return {"loss": loss()}
    value = loss()
    upstream = inputs.upstream[0] if cell.mode == "backward" else None
    (gradient,) = torch.autograd.grad(value, inputs.tensors["pred"], upstream)
    return {"loss": value.detach(), "dpred": gradient}


# Which argument was a matrix product, and which is its bias.
_PRODUCT = {"residual_norm": ("h", "h_bias"), "gelu": ("x", "bias"), "swiglu": ("x", "bias")}


@dataclass(frozen=True)
class BlockEntry:
    """One of `block_cases.BLOCK_OPS`; bytes: (cell, backward) -> bytes of one direction."""

    name: str
    direction_bytes: Callable[[Cell, bool], int]

    def case(self, cell: Cell) -> BlockCase:
        return BlockCase(
            op=cell.op,
            shape=cell.shape,
            variant=cell.variant,
            mode=cell.mode,
            dtype=cell.dtype,
        )

    def providers(self, cell: Cell) -> tuple[str, ...]:
        """ "liger" and the attention backends only where they do the same."""
        names = ["eager", "compile", "mixflow_fast"]
        modulates = cell.op == "modulated_norm" and VARIANTS[cell.variant].norm == "rms"
        # The backward pass of its SwiGLU writes the gradients over a and b: no call could be
        # repeated.
        if modulates or (cell.op == "swiglu" and cell.mode == "forward"):
            names.insert(2, "liger")
        return (*names, *(TIMED_BACKENDS if cell.op == "attention" else ()))

    def bytes(self, cell: Cell) -> int:
        passes = {"forward": (False,), "recompute": (True,), "full": (False, True)}[cell.mode]
        return sum(self.direction_bytes(cell, backward) for backward in passes)

    def inputs(self, cell: Cell, device: torch.device) -> Inputs:
        return self.case(cell).inputs(device)

    def plain(self, cell: Cell, inputs: Inputs, wrap: Wrap | None = None) -> Call:
        """Without `wrap` the bias is there before them; "recompute" is then both passes."""
        plain, outputs = PLAIN[self.name], BLOCK_OPS[self.name].outputs
        if wrap is not None and cell.mode == "recompute":
            recompute = wrap(RECOMPUTE[self.name])
            x, bias = (tensor.detach() for tensor in inputs.tensors.values())
            names = ("out", "dx", "dbias")
            return lambda: dict(zip(names, recompute(inputs.upstream[0], x, bias), strict=True))
        if wrap is not None or self.name not in _PRODUCT:
            function = plain if wrap is None else wrap(plain)
            return function_call(function, inputs, outputs, cell.mode)
        product, bias = _PRODUCT[self.name]
        biased = self._biased(inputs).requires_grad_()

        def with_bias(**given: Tensor) -> Tensor | tuple[Tensor, ...]:
            z = BiasOfProduct.apply(biased, given.pop(product), given.pop(bias))
            return plain(**{product: z}, **given)

        return function_call(with_bias, inputs, outputs, cell.mode)

    def _biased(self, inputs: Inputs) -> Tensor:
        product, bias = (inputs.tensors[name].detach() for name in _PRODUCT[self.name])
        return product + bias

    def ours(self, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        name = f"{self.name}{'_recompute' if cell.mode == 'recompute' else ''}"
        call = self.case(cell).call(inputs, impl)
        if self.name != "attention":
            return call, f"{name}(impl={impl!r})"
        B, N, H, K = cell.shape
        device, backward = inputs.tensors["qkv"].device, cell.mode != "forward"
        choice = choose_backend(B, N, H, K, cell.dtype, device, backward=backward)
        return call, f'attention(backend="auto", impl={impl!r}): {choice.backend}'

    def other(self, provider: str, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        if provider == "liger":
            return self._liger(cell, inputs)
        case = self.case(cell)
        found = backend_verdict(provider, case, inputs.tensors["qkv"].device)
        if not found.startswith("ok"):
            raise NotThere(found)
        return case.call(inputs, impl, provider), f"attention(backend={provider!r}): {found}"

    def _liger(self, cell: Cell, inputs: Inputs) -> tuple[Call, str]:
        if importlib.util.find_spec("liger_kernel") is None:
            raise NotThere("liger_kernel is not installed")
        try:
            from liger_kernel.ops import LigerModulatedRMSNormFunction as modulated
            from liger_kernel.ops import LigerSiLUMulFunction as silu_mul
        except ImportError as error:
            raise NotThere(f"this liger_kernel has not what is compared: {error}") from error
        outputs = BLOCK_OPS[self.name].outputs
        if self.name == "swiglu":
            a, b = (half.contiguous() for half in self._biased(inputs).chunk(2, dim=-1))
            call = function_call(lambda **_: silu_mul.apply(a, b), inputs, outputs, cell.mode)
            return call, "LigerSiLUMulFunction of two contiguous tensors, bias added before"

        def norm(x: Tensor, shift: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
            # Not in place: the upstream gradient is needed again.
            return modulated.apply(x, weight, scale, shift, EPS, 0.0, "llama", False)

        call = function_call(norm, inputs, outputs, cell.mode)
        return call, "LigerModulatedRMSNormFunction"

    def truth(self, cell: Cell, inputs: Inputs, made: Made | None) -> Tensors:
        return self.case(cell).reference(inputs.double())()


def _norm_bytes(cell: Cell, backward: bool) -> int:
    has_branch = cell.op == "residual_norm"
    return residual_norm_bytes(
        torch.empty(cell.shape, dtype=cell.dtype, device="meta"),
        per_token=VARIANTS[cell.variant].per_token,
        backward=backward,
        has_h=has_branch,
        has_h_bias=has_branch,
        has_weight=VARIANTS[cell.variant].norm == "rms",
        has_dx_new=has_branch,
        norm=VARIANTS[cell.variant].norm,
    )


def _activation_bytes(cell: Cell, backward: bool) -> int:
    """Of "recompute": upstream gradient and input read, gradient and output written."""
    count = gelu_bytes if cell.op == "gelu" else swiglu_bytes
    x = torch.empty(cell.shape, dtype=cell.dtype, device="meta")
    return count(x, x.new_empty(cell.shape[-1]), backward, cell.mode == "recompute")


def _qk_bytes(cell: Cell, backward: bool) -> int:
    """q and k read and written once each way, their upstream gradients read, qkv's gradient written
    (v's part is zeros), and q and k read again for a norm."""
    section = cell.elements * cell.dtype.itemsize
    return section * (5 + 2 * (VARIANTS[cell.variant].norm is not None) if backward else 4)


def _attention_bytes(cell: Cell, backward: bool) -> int:
    """qkv, out and their gradients once each, and in the backward pass qkv and out again; scores
    and statistics not at all."""
    return cell.elements * cell.dtype.itemsize * (8 if backward else 4)


REGISTRY: dict[str, ObjectiveEntry | BlockEntry] = {
    op.name: op
    for op in (
        ObjectiveEntry("interpolate", loses=False),
        ObjectiveEntry("velocity_loss", interpolates=False),
        ObjectiveEntry("objective"),
        BlockEntry("residual_norm", _norm_bytes),
        BlockEntry("modulated_norm", _norm_bytes),
        BlockEntry("gelu", _activation_bytes),
        BlockEntry("swiglu", _activation_bytes),
        BlockEntry("qk_norm_rope", _qk_bytes),
        BlockEntry("attention", _attention_bytes),
    )
}
OBJECTIVE_OPS = tuple(op.name for op in REGISTRY.values() if isinstance(op, ObjectiveEntry))
FAMILIES = {"objective": OBJECTIVE_OPS, "blocks": tuple(BLOCK_OPS)}
KERNEL_OPS = tuple(REGISTRY)
OPS = (*KERNEL_OPS, "step")
