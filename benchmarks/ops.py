"""The registry of the benchmarks: for each operator its inputs, calls, truth, bytes and cells.

`interpolate` draws t, m and x0 and writes x_m, `velocity_loss` is the loss with its gradient, and
`objective` both: the prediction is given, as the network between them lets nothing fuse.
`mixed_source` is input, noise end and KL where a predictor makes the noise. Shapes are (B, C, H, W)
of x1. The other operators are those of `block_cases`, whose table has their shapes.

Modes: "full" is a forward pass and the gradients of every input, "forward" the first alone,
"backward" of the loss the same as full with an upstream gradient of 0.5 on the device: its price,
and "recompute" of the activations the gradients and the output once more, which was not kept.
`benchmarks/README.md` says what the providers are.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.plain import GAMMA
from benchmarks.source_entry import SourceEntry
from mixflow_fast.diagnostics.block_cases import (
    BLOCK_OPS,
    EPS,
    VARIANTS,
    BlockCase,
    backend_verdict,
)
from mixflow_fast.diagnostics.kernel_cases import (
    Draw,
    Function,
    Inputs,
    Mode,
    Tensors,
    dtype_name,
    function_call,
    shape_name,
)
from mixflow_fast.diagnostics.kernel_plan import CPU_TIMED, Row
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
    dtypes of results, the `inputs` that every provider is given, the calls (`plain`: of the plain
    lines, or of what `wrap` makes of them; `ours` and `other` with a note on how they are set up),
    and the `truth`.

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

    def result_dtype(self, cell: Cell, name: str) -> torch.dtype:
        """Of the result or gradient called `name`."""
        return {"x": cell.dtype, "loss": torch.float32}.get(name, PRED_DTYPE)

    def inputs(self, cell: Cell, device: torch.device) -> Inputs:
        """x1 of mean 0.5, so that a wrong direction of the path shows; noise for who stores it."""
        draw = Draw(device, cell.dtype, empty=False)
        tensors = {
            "x1": draw.normal(*cell.shape, mean=0.5),
            "x0": draw.normal(*cell.shape),
            "pred": draw.normal(*cell.shape, dtype=PRED_DTYPE).requires_grad_(),
            "ids": torch.arange(cell.shape[0], device=device) + 10_000,
        }
        return Inputs(tensors, (torch.tensor(0.5, device=device),))

    def plain(self, cell: Cell, inputs: Inputs, wrap: Wrap | None = None) -> Call:
        lines = plain.prepare, plain.velocity_loss
        prepare_fn, loss_fn = lines if wrap is None else map(wrap, lines)
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

    def truth(self, cell: Cell, inputs: Inputs, made: Made | None) -> Tensors:
        """The reference in float64 on the noise and times which the provider itself used."""
        x0 = made["x0"]() if callable(made["x0"]) else made["x0"]
        t = torch.zeros(cell.shape[0], device=x0.device)
        t, slowed_t = (made.get(name, t).double() for name in ("t", "slowed_t"))
        # The whole interval, because wrong times are a finding of the caller's.
        options = dict(clock="data_at_1", impl="reference", interval="full")
        exact, mix = inputs.double(), MixFlow(**options)
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
            op=cell.op, shape=cell.shape, variant=cell.variant, mode=cell.mode, dtype=cell.dtype
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

    def result_dtype(self, cell: Cell, name: str) -> torch.dtype:
        return cell.dtype

    def inputs(self, cell: Cell, device: torch.device) -> Inputs:
        return self.case(cell).inputs(device)

    def plain(self, cell: Cell, inputs: Inputs, wrap: Wrap | None = None) -> Call:
        """Without `wrap` the bias is there before them; "recompute" is then both passes."""
        lines, outputs = plain.PLAIN[self.name], BLOCK_OPS[self.name].outputs
        if wrap is not None and cell.mode == "recompute":
            recompute = wrap(plain.RECOMPUTE[self.name])
            x, bias = (tensor.detach() for tensor in inputs.tensors.values())
            names = ("out", "dx", "dbias")
            return lambda: dict(zip(names, recompute(inputs.upstream[0], x, bias), strict=True))
        if wrap is not None or self.name not in _PRODUCT:
            function = lines if wrap is None else wrap(lines)
            return function_call(function, inputs, outputs, cell.mode)
        product, bias = _PRODUCT[self.name]
        biased = self._biased(inputs).requires_grad_()

        def with_bias(**given: Tensor) -> Tensor | tuple[Tensor, ...]:
            z = plain.BiasOfProduct.apply(biased, given.pop(product), given.pop(bias))
            return lines(**{product: z}, **given)

        return function_call(with_bias, inputs, outputs, cell.mode)

    def _biased(self, inputs: Inputs) -> Tensor:
        product, bias = (inputs.tensors[name].detach() for name in _PRODUCT[self.name])
        return product + bias

    def ours(self, cell: Cell, inputs: Inputs, impl: str) -> tuple[Call, str]:
        name = f"{self.name}{'_recompute' if cell.mode == 'recompute' else ''}"
        call = self.case(cell).call(inputs, impl)
        if self.name != "attention":
            return call, f"{name}(impl={impl!r})"
        device, backward = inputs.tensors["qkv"].device, cell.mode != "forward"
        choice = choose_backend(*cell.shape, cell.dtype, device, backward=backward)
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
    variant, branch = VARIANTS[cell.variant], ("has_h", "has_h_bias", "has_dx_new")
    return residual_norm_bytes(
        torch.empty(cell.shape, dtype=cell.dtype, device="meta"),
        per_token=variant.per_token,
        backward=backward,
        has_weight=variant.norm == "rms",
        norm=variant.norm,
        **dict.fromkeys(branch, cell.op == "residual_norm"),
    )


def _activation_bytes(cell: Cell, backward: bool) -> int:
    """Of "recompute": upstream gradient and input read, gradient and output written."""
    count = gelu_bytes if cell.op == "gelu" else swiglu_bytes
    x = torch.empty(cell.shape, dtype=cell.dtype, device="meta")
    return count(x, x.new_empty(cell.shape[-1]), backward, cell.mode == "recompute")


def _qkv_bytes(cell: Cell, backward: bool) -> int:
    """Passes over a tensor of q's size.

    Of qk_norm_rope: q and k read and written once each way, their upstream gradients read, qkv's
    gradient written (v's part is zeros), and q and k read again for a norm. Of attention: qkv, out
    and their gradients once each, and in the backward pass qkv and out again; no scores.
    """
    passes = 4
    if backward:
        normed = VARIANTS[cell.variant].norm is not None
        passes = 8 if cell.op == "attention" else 5 + 2 * normed
    return cell.elements * cell.dtype.itemsize * passes


REGISTRY: dict[str, ObjectiveEntry | SourceEntry | BlockEntry] = {
    op.name: op
    for op in (
        ObjectiveEntry("interpolate", loses=False),
        ObjectiveEntry("velocity_loss", interpolates=False),
        ObjectiveEntry("objective"),
        SourceEntry(),
        BlockEntry("residual_norm", _norm_bytes),
        BlockEntry("modulated_norm", _norm_bytes),
        BlockEntry("gelu", _activation_bytes),
        BlockEntry("swiglu", _activation_bytes),
        BlockEntry("qk_norm_rope", _qkv_bytes),
        BlockEntry("attention", _qkv_bytes),
    )
}
OBJECTIVE_OPS = tuple(op.name for op in REGISTRY.values() if isinstance(op, ObjectiveEntry))
FAMILIES = {"objective": (*OBJECTIVE_OPS, "mixed_source"), "blocks": tuple(BLOCK_OPS)}
KERNEL_OPS = tuple(REGISTRY)
OPS = (*KERNEL_OPS, "step")

# The cells, most telling first: a deadline cuts from the end.
RAE, SIT = (768, 16, 16), (4, 32, 32)
MAIN_SHAPES = ((256, *RAE), (256, *SIT))
MORE_SHAPES = (
    *((32, *SIT), (64, *RAE), (64, 3, 256, 256), (32, 4, 64, 64), (256, 4, 64, 64)),
    *((64, 768, 32, 32), (256, 768, 32, 32)),
)
SMOKE_SHAPES = ((2, 4, 4, 4), (3, 8, 2, 2))
# Of one shape the last op comes first.
MODES: dict[str, tuple[Mode, ...]] = {
    "mixed_source": ("full", "forward"),
    "interpolate": ("forward",),
    "velocity_loss": ("full", "forward", "backward"),
    "objective": ("full",),
}
# SiT-XL at B = 256, DiT-DH-XL at B = 64.
BLOCK_MAIN: tuple[Row, ...] = (
    ("residual_norm", "full", "layer per sample", (256, 256, 1152)),
    ("attention", "full", "plain", (256, 256, 16, 72)),
    ("gelu", "full", "bias", (256, 256, 4608)),
    ("residual_norm", "full", "rms per token", (64, 256, 2048)),
    ("swiglu", "full", "bias", (64, 256, 2 * 5504)),
    ("qk_norm_rope", "full", "rope", (64, 256, 16, 72)),
    ("modulated_norm", "full", "rms per sample", (64, 256, 1152)),
)
BLOCK_MORE: tuple[Row, ...] = (
    ("attention", "full", "plain", (64, 1024, 16, 72)),
    ("attention", "full", "plain", (64, 256, 16, 128)),
    ("residual_norm", "full", "layer per sample", (32, 256, 1152)),
    ("swiglu", "full", "bias", (64, 256, 2 * 5461)),
    ("residual_norm", "full", "rms per sample", (64, 256, 1152)),
    ("attention", "full", "plain", (256, 256, 16, 64)),
    ("gelu", "recompute", "bias", (256, 256, 4608)),
    ("swiglu", "recompute", "bias", (64, 256, 2 * 5504)),
    ("swiglu", "full", "bias", (256, 256, 2 * 3072)),
    ("attention", "full", "rope", (64, 256, 16, 72)),
    ("residual_norm", "full", "layer per sample", (64, 1024, 1152)),
    ("gelu", "full", "bias", (32, 256, 4608)),
    ("qk_norm_rope", "full", "rms, rope", (64, 256, 16, 72)),
    ("qk_norm_rope", "full", "layer", (256, 256, 16, 72)),
    ("modulated_norm", "full", "layer per sample", (256, 256, 1152)),
    ("modulated_norm", "full", "rms per token", (64, 256, 2048)),
    ("attention", "full", "plain", (64, 1024, 16, 64)),
    ("attention", "full", "plain", (16, 1024, 16, 128)),
    ("residual_norm", "forward", "layer per sample", (256, 256, 1152)),
    ("swiglu", "forward", "bias", (64, 256, 2 * 5504)),
    ("gelu", "forward", "bias", (256, 256, 4608)),
    ("attention", "forward", "plain", (256, 256, 16, 72)),
    ("modulated_norm", "forward", "rms per sample", (64, 256, 1152)),
    ("qk_norm_rope", "forward", "rope", (64, 256, 16, 72)),
)
BLOCK_SMOKE: tuple[Row, ...] = (
    *CPU_TIMED,
    ("qk_norm_rope", "full", "rms, rope", (2, 4, 2, 8)),
    ("attention", "full", "rope", (2, 4, 2, 8)),
    ("swiglu", "forward", "bias", (2, 3, 16)),
)


def kernel_cells(ops: Collection[str], smoke: bool = False) -> list[Cell]:
    """The cells of the kernel suite for `ops`, the most telling first.

    Of the objective: bf16 at every shape in the first of its modes, the other modes at the main
    shapes, and last float32 data there.
    """

    def first_mode(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[Cell]:
        return [
            Cell(op=op, mode=MODES[op][0], shape=shape, dtype=dtype)
            for shape in shapes
            for op in reversed(MODES)
        ]

    main, more, single = MAIN_SHAPES, MORE_SHAPES, MAIN_SHAPES
    if smoke:
        main, more, single = SMOKE_SHAPES[:1], (), SMOKE_SHAPES[1:]
    cells = first_mode(main, torch.bfloat16)
    cells += [
        Cell(op=op, mode=mode, shape=shape)
        for shape in main
        for op, modes in MODES.items()
        for mode in modes[1:]
    ]
    cells += [
        Cell(op=op, mode=mode, variant=variant, shape=shape)
        for op, mode, variant, shape in (BLOCK_SMOKE if smoke else (*BLOCK_MAIN, *BLOCK_MORE))
    ]
    cells += [*first_mode(more, torch.bfloat16), *first_mode(single, torch.float32)]
    return [cell for cell in cells if cell.op in ops]
