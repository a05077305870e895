"""Copies of a training state in host memory, which stay as they are while training goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State")


def host_copy(state: State) -> State:
    """A copy of nested dicts, lists and tuples with all tensors in memory of their own on the host.

    A view is copied without the rest of its storage. What is not a tensor is copied deeply. Copies
    from a GPU go into pinned memory, one after the other without a wait between them; all are
    complete when this returns.

    Args:
        state: what `torch.save` can write.

    Raises:
        RuntimeError: there is not enough memory.
    """
    copies: dict[int, Tensor] = {}
    devices = set()
    for tensor in _tensors(state):
        if id(tensor) not in copies:
            copies[id(tensor)] = _on_host(tensor.detach())
            devices.add(tensor.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    # deepcopy takes what its memo holds in place of the object with that id.
    return copy.deepcopy(state, dict(copies))


def _on_host(tensor: Tensor) -> Tensor:
    layout = torch.contiguous_format
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True, memory_format=layout)
    try:
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError:  # the system may limit how much can be pinned
        target = torch.empty(tensor.shape, dtype=tensor.dtype)
    return target.copy_(tensor, non_blocking=True)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
