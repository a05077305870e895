"""Parameters that are updated together in a step of `AdamWEMA`, and the step's numbers.

The numbers are computed in float64 on the host. A step hands them over with its calls; a step that
is captured in a CUDA graph, which would repeat them, reads them from memory on the device, where
they are written before each replay. Rounded to float32 they are the same either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from mixflow_fast.optim.power_ema import power_decay, sigma_rel_to_gamma

# As many as one call of the operator in `csrc/` updates.
MAX_EMAS = 16
# Numbers of a step that is captured: seven of AdamW, and one for each EMA.
CONSTANTS = 7 + MAX_EMAS


class State(TypedDict, total=False):
    """State of a parameter; besides "ema" there may be "ema_1", ... and "ema_power_0", ..."""

    step: int
    exp_avg: Tensor
    exp_avg_sq: Tensor
    ema: Tensor


class Group(TypedDict, total=False):
    """Settings of a parameter group, as the arguments of `AdamWEMA`."""

    params: list[Tensor]
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    ema_decay: float | tuple[float, ...]
    ema_sigma_rel: tuple[float, ...]


@dataclass
class Call:
    """Parameters of one group that are alike, in one step.

    Attributes:
        step: its number, from 1 on.
        csrc: whether the operator updates them, or foreach calls.
        params, states, copies: of the same order; no copies where none are wanted.
        constants: the step's numbers in device memory, of a step that is captured. None where the
            host hands them over.
    """

    group: Group
    step: int
    csrc: bool
    params: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    copies: list[Tensor] = field(default_factory=list)
    constants: Tensor | None = None


def ema_names(group: Group) -> list[str]:
    """State keys of the group's EMAs: those of the fixed decays, then the power functions."""
    decays = group["ema_decay"]
    count = 1 if isinstance(decays, int | float) else len(decays)
    names = ["ema", *(f"ema_{i}" for i in range(1, count))][:count]
    return names + [f"ema_power_{i}" for i in range(len(group.get("ema_sigma_rel", ())))]


def ema_decays(group: Group, step: int) -> dict[str, float]:
    """Decay of each of the group's EMAs in step number `step`."""
    powers = [power_decay(sigma_rel_to_gamma(width), step) for width in _widths(group)]
    return dict(zip(ema_names(group), _fixed_decays(group) + powers, strict=True))


def _fixed_decays(group: Group) -> list[float]:
    decays = group["ema_decay"]
    return [decays] if isinstance(decays, int | float) else list(decays)


def _widths(group: Group) -> tuple[float, ...]:
    return group.get("ema_sigma_rel", ())


def ema_shares(call: Call) -> dict[str, float | Tensor]:
    """1 - decay of each EMA; those that change from step to step are tensors in a captured step."""
    shares = {name: 1 - decay for name, decay in ema_decays(call.group, call.step).items()}
    if call.constants is not None:
        powers = [name for name in shares if name.startswith("ema_power_")]
        shares |= zip(powers, call.constants[3:], strict=False)
    return shares


def csrc_settings(call: Call) -> dict[str, float | list[float]]:
    """The numbers of a step as the operators of `csrc/` take them."""
    group = call.group
    return dict(
        step=call.step,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        ema_decays=list(ema_decays(group, call.step).values()),
    )


def foreach_constants(call: Call) -> list[float]:
    """[sqrt(1 - beta2^k), lr wd, lr / (1 - beta1^k), 1 - decay of each power-function EMA]."""
    group, step = call.group, call.step
    (beta1, beta2), lr = group["betas"], group["lr"]
    root, size = math.sqrt(1 - beta2**step), lr / (1 - beta1**step)
    decays = ema_decays(group, step)
    powers = [1 - decays[name] for name in decays if name.startswith("ema_power_")]
    return [root, lr * group["weight_decay"], size, *powers]


def send_constants(call: Call) -> None:
    """Writes the constants of a call's step to its device."""
    if call.csrc:
        torch.ops.mixflow_fast.adamw_constants_(call.constants, **csrc_settings(call))
        return
    for place, value in zip(call.constants, foreach_constants(call), strict=False):
        place.fill_(value)


def frozen_in_graphs(call: Call) -> tuple[object, ...]:
    """What stays in a graph as it was at the capture: settings, and where tensors lie."""
    group = call.group
    keys = ("exp_avg", "exp_avg_sq", *ema_names(group))
    tensors = [
        (p, p.grad, *(s[k] for k in keys)) for p, s in zip(call.params, call.states, strict=True)
    ]
    places = [[t.data_ptr() for t in some] for some in (*tensors, call.copies)]
    layouts = [(p.grad.dtype, p.grad.stride()) for p in call.params]
    fixed = [group["betas"], group["eps"], bool(group["weight_decay"]), _fixed_decays(group)]
    return call.csrc, fixed, layouts, places
