"""How a network is run while it is sampled: eagerly, compiled, in CUDA graphs; in which precision.

The network that was given is not changed: what runs otherwise is a copy of its modules, on the same
weights, or on half as many bytes.
"""

from __future__ import annotations

import copy
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from mixflow_fast.models import network as models
from mixflow_fast.sampling.guidance import Network

Mode = Literal["auto", "eager", "compile", "graph"]
MODES: tuple[Mode, ...] = get_args(Mode)
Precision = Literal["fp32", "bf16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Calls of the network below which a compilation of its blocks (tens of seconds) is not worth it.
_WORTH_COMPILING = 1000


def choose_mode(mode: Mode, network: Network, device: torch.device, calls: int | None) -> Mode:
    """What "auto" is here, and any other mode itself, if it can be had.

    On the CPU "auto" is eager. On a GPU it is compile, where so many calls come that compiling
    pays, and never graph: no GPU has run the graphs yet.

    Args:
        calls: of the network, all batches together; None if the method does not know.

    Raises:
        ValueError: an unknown mode; compile for a network that is not one of
            `mixflow_fast.models`; graph without a GPU.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    ours, on_gpu = isinstance(network, models.Network), device.type == "cuda"
    if mode == "auto":
        return "compile" if ours and on_gpu and (calls or 0) >= _WORTH_COMPILING else "eager"
    if mode == "compile" and not ours:
        raise ValueError(
            "mode='compile' compiles the blocks of mixflow_fast.models, got "
            f"{type(network).__name__}: use mode='eager' with a network that you compiled yourself"
        )
    if mode == "graph" and not on_gpu:
        raise ValueError(
            f"mode='graph' captures CUDA graphs, and the device is {device}: use mode='eager' or "
            "'compile'"
        )
    return mode


def network_for(network: Network, compiled: bool, precision: Precision | None) -> Network:
    """The network in a mode and a precision; itself where nothing of it changes.

    Args:
        compiled: whether its blocks go through torch.compile, if it is one of
            `mixflow_fast.models`. Blocks that are compiled or fused already stay as they are.
        precision: of weights and activations, None: as the weights are. Times stay float32, and so
            does what `float32_names` names.

    Raises:
        ValueError: an unknown precision, or one for what is no module.
    """
    dtype = None
    if precision is not None:
        if precision not in DTYPES:
            raise ValueError(f"precision must be one of {', '.join(DTYPES)}, got {precision!r}")
        if not isinstance(network, models.Network):
            raise ValueError(
                f"precision casts the networks of mixflow_fast.models, got "
                f"{type(network).__name__}: cast it yourself, and leave precision out"
            )
        dtype = DTYPES[precision]
        dtype = None if dtype == network.product_dtype else dtype
    ours = isinstance(network, models.Network)
    compiles = compiled and ours and network.execution.mode == "eager"
    if dtype is None and not compiles:
        return network
    own = _copy(network, dtype)
    return own.set_execution(mode="compile") if compiles else own


def _copy(network: models.Network, dtype: torch.dtype | None) -> models.Network:
    """The modules anew, on the same tensors, or on floating ones of another dtype."""
    taken: dict[int, Tensor] = {}
    for buffer in network.buffers():  # tables, which stay float32
        taken[id(buffer)] = buffer
    for name, value in network.named_parameters():
        if dtype is None or name in network.float32_names:
            taken[id(value)] = value
        else:
            taken[id(value)] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
    return copy.deepcopy(network, taken)
