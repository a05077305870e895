"""A stand-in for a CUDA graph's capture: operators recorded once, and run again on the same memory.

Like a graph it knows no Python: numbers are those of the recording, tensors are read where they lay
then. Like a capture it refuses what the host would have to wait for, and leaves memory as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What reads the device's memory from the host.
_WAITS = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal", "_assert_async")


@dataclass
class RecordedStep(TorchDispatchMode):
    """The operators of one run of a step."""

    calls: list[tuple[Callable[..., object], tuple, dict, object]] = field(default_factory=list)
    before: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    made: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> object:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _WAITS:
            raise AssertionError(f"{func} makes the host wait for the device")
        named = [argument for argument in func._schema.arguments if argument.name in kwargs]
        values = [*args, *(kwargs[argument.name] for argument in named)]
        for argument, value in zip(
            (*func._schema.arguments[: len(args)], *named), values, strict=True
        ):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for written in tree_leaves(value):
                    self._keep(written)
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        old = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.made |= {_place(leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)} - old
        return out

    def _keep(self, written: Tensor) -> None:
        part = written.data_ptr(), written.shape, written.stride()
        if _place(written) not in self.made and part not in self.before:
            self.before[part] = written.detach(), written.detach().clone()

    def restore(self) -> None:
        # Parts that overlap: what was kept first is what was there first.
        for written, value in reversed(self.before.values()):
            written.copy_(value)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            fresh = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(fresh), strict=True):
                if isinstance(old, Tensor) and _place(old) != _place(new):
                    old.copy_(new)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step, which is not run in effect; what comes back runs it."""
    recorded = RecordedStep()
    with recorded:
        step()
    recorded.restore()
    return recorded.replay
