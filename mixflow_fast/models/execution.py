"""How a network is run: eager, compiled, or compiled with fused operators; what is recomputed.

Blocks are compiled one by one: all blocks of a width share one compilation, which takes seconds
where the whole network takes minutes, and costs the GPU little because the operators end at the
blocks' borders anyway. What it costs is the host, at each call: two for every block and step. Where
the host is what a step waits for, all blocks can be one call (`compile_unit="all_blocks"`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Generic, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from mixflow_fast.kernels.attention.backends import BACKENDS, BackendName
from mixflow_fast.kernels.runtime import IMPLS, Impl
from mixflow_fast.models.inductor import block_options

_NUMBERS = itertools.count()
Mode = Literal["eager", "compile", "fused", "graph"]
CompileUnit = Literal["block", "all_blocks"]
Checkpointing = Literal["none", "elementwise", "selective", "full"]
# The result of a block function: a tensor, or a residual stream of the fused block.
_Out = TypeVar("_Out")
_Function = Callable[..., _Out]
_Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a network is run. It changes rounding, speed and memory, never the function.

    Attributes:
        mode: "eager" (plain PyTorch), "compile" (the same, each block through torch.compile),
            "fused" (blocks of fused operators, compiled) or "graph" ("compile", of which training
            records both passes as CUDA graphs; elsewhere it is "compile").
        attention: "auto" or a name of `kernels.attention.choice.BACKENDS`. "auto" is PyTorch's
            own choice in the modes eager and compile; in mode fused the fastest backend that
            passes its test.
        checkpointing: what is recomputed in the backward pass instead of kept: "none";
            "elementwise" (mode fused only: the outputs of the norms and of the MLP's activation,
            by the passes that compute their gradients, which costs no more than their writes);
            "selective" (all but the outputs of attention and of the MLP's first product, the two
            that cost most to make); "full" (everything inside a block: least memory, about a
            third more time).
        compile_unit: what is compiled at once: "block", one compilation for all blocks of a width
            (seconds), or "all_blocks" (minutes for deep networks, one call a pass and width).
        compiled: False runs mode "fused" without torch.compile.
        impl: implementation of the fused operators: "auto", "triton" or "reference".
    """

    mode: Mode = "eager"
    attention: Literal["auto", BackendName] = "auto"
    checkpointing: Checkpointing = "none"
    compile_unit: CompileUnit = "block"
    compiled: bool = True
    impl: Impl = "auto"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, get_args(Mode)),
            ("attention", self.attention, ("auto", *BACKENDS)),
            ("checkpointing", self.checkpointing, get_args(Checkpointing)),
            ("compile_unit", self.compile_unit, get_args(CompileUnit)),
            ("impl", self.impl, IMPLS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if self.checkpointing == "elementwise" and self.mode != "fused":
            raise ValueError(
                f'checkpointing="elementwise" is the fused operators\', got mode={self.mode!r}: '
                'use mode="fused", or checkpointing="selective"'
            )

        if self.compile_unit != "block" and not self.compiles:
            raise ValueError(
                f"compile_unit={self.compile_unit!r} needs torch.compile, got mode={self.mode!r}"
                f'{"" if self.compiled else " and compiled=False"}: use mode="compile" or '
                '"fused", or compile_unit="block"'
            )

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is used."""
        return self.mode in ("compile", "graph") or (self.mode == "fused" and self.compiled)


def runner(
    fn: _Function[_Out],
    execution: Execution,
    saved_widths: tuple[int, ...],
    around: Callable[[_Function[_Out]], _Function[_Out]] | None = None,
) -> _Function[_Out]:
    """`fn` with the checkpointing and the compilation of `execution`.

    Args:
        fn: a module-level function.
        saved_widths: columns of the products that "selective" keeps.
        around: makes of `fn`, checkpointing and all, the function that is compiled; None: itself.
    """
    make = partial(_made, fn, execution, saved_widths, around)
    return _Compiled(make) if execution.compiles else make()


def _made(
    fn: _Function[_Out],
    execution: Execution,
    saved_widths: tuple[int, ...],
    around: Callable[[_Function[_Out]], _Function[_Out]] | None,
) -> _Function[_Out]:
    own = _plain(fn, execution, saved_widths)
    return own if around is None else _with_own_code(around(own))


class _Compiled(Generic[_Out]):
    """A compiled copy of a function for each way of calling it.

    torch.compile compiles anew for other modes of autograd, other shapes and frozen weights, and
    refuses (`fullgraph`) after eight times for one piece of code: training, validation and
    sampling in one process would get there.
    """

    def __init__(self, make: Callable[[], _Function[_Out]]) -> None:
        self._make = make
        self._plain = make()
        self._copies: dict[tuple[bool | int | str, ...], _Function[_Out]] = {}

    def __call__(self, *args: object, **named: object) -> _Out:
        if torch.compiler.is_compiling():  # the whole network, by somebody else
            return self._plain(*args, **named)
        # What torch.compile guards on and what changes within a process.
        way = (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cuda"),
            torch.is_autocast_enabled("cpu"),
            len(args),
            *named,
        )
        if way not in self._copies:
            options = block_options()
            self._copies[way] = torch.compile(self._make(), fullgraph=True, options=options)
        return self._copies[way](*args, **named)


def _plain(
    fn: _Function[_Out], execution: Execution, saved_widths: tuple[int, ...]
) -> _Function[_Out]:
    fn = _with_own_code(fn)
    if execution.checkpointing in ("selective", "full"):
        # Nothing inside draws from torch's generators, so there is no state to restore.
        options: dict[str, bool | Callable[[], _Contexts]] = {
            "use_reentrant": False,
            "preserve_rng_state": False,
        }
        if execution.checkpointing == "selective":
            options["context_fn"] = _contexts_keeping(saved_widths)
            if not execution.compiles:
                fn = _with_pytorchs_linear(fn)
        fn = _with_own_code(_checkpointed(fn, options))
    return fn


def _with_own_code(fn: _Function[_Out]) -> _Function[_Out]:
    """A copy of a function: torch.compile's cache, and its limit of recompilations, hang on the
    code object, and what it knows of changing shapes on the code's name. Networks in one process
    must not use up, or learn from, each other's.
    """
    code = fn.__code__.replace(co_name=f"{fn.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)


def _checkpointed(
    fn: _Function[_Out], options: Mapping[str, bool | Callable[[], _Contexts]]
) -> _Function[_Out]:
    def checkpointed(*args: object) -> _Out:
        # Without gradients there is nothing to recompute for.
        return checkpoint(fn, *args, **options) if torch.is_grad_enabled() else fn(*args)

    return checkpointed


def _with_pytorchs_linear(fn: _Function[_Out]) -> _Function[_Out]:
    """DeepSpeed's ZeRO 3 replaces F.linear in the whole process by one that adds the bias in
    place: to a product that is kept it would be added again in the backward pass.
    """

    def checked(*args: object) -> _Out:
        if nn.functional.linear is not torch._C._nn.linear:
            raise RuntimeError(
                'checkpointing="selective" needs PyTorch\'s own torch.nn.functional.linear, got '
                f"{nn.functional.linear.__module__}.{nn.functional.linear.__name__}: use "
                'checkpointing="full"'
            )
        return fn(*args)

    return checked


def _contexts_keeping(saved_widths: tuple[int, ...]) -> Callable[[], _Contexts]:
    policy = partial(_policy, saved_widths)

    # A function: torch.compile does not take every `partial` for a constant.
    def contexts() -> _Contexts:
        return create_selective_checkpoint_contexts(policy)

    return contexts


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _policy(
    saved_widths: tuple[int, ...],
    ctx: SelectiveCheckpointContext,
    op: torch._ops.OperatorBase,
    *args: object,
    **kwargs: object,
) -> CheckpointPolicy:
    """Keep what attention returns, and the products with the given numbers of columns."""
    name = op.name() if hasattr(op, "name") else str(op)
    kept = "scaled_dot_product" in name or name == "mixflow_fast::attention"
    if op in _PRODUCTS:
        second: Tensor = args[-1]  # of (bias, a, b) and of (a, b)
        kept = second.shape[1] in saved_widths
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
