"""The velocity of a network in the engine's clock, with classifier-free guidance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, check_clock
from mixflow_fast.flow.path import per_sample
from mixflow_fast.sampling.solvers import Velocity


class Network(Protocol):
    """A network that can be sampled: model(x, t), or model(x, t, y) with class labels.

    Attributes:
        clock: "data_at_1" or "noise_at_1", of the times that it is called with.

    Others are read where a network has them: `prediction`, `null_class`, `cfg_channels`, and
    `velocity`, a call without further outputs (REPA's projections).
    """

    clock: str

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]: ...


class _Guidance(NamedTuple):
    """Classifier-free guidance where low <= t <= high, of the first `channels` (None: of all)."""

    scale: float
    channels: int | None
    low: float
    high: float


def model_velocity(
    model: Network,
    y: Tensor | None,
    cfg_scale: float = 1.0,
    cfg_channels: int | str | None = "auto",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity in the engine's clock of a network that runs in its own.

    A "noise_at_1" network (REPA, RAE, SD3) sees the time 1 - t, and its output is negated. A
    network that returns a tuple (REPA: velocity, projections) gives its first item.

    Classifier-free guidance: v = u + cfg_scale (c - u), u with the null class, both in one forward
    of 2B rows. The official SiT guides the first three channels only and the others keep c; REPA
    and RAE guide all. "auto" follows the network's own `cfg_channels`. Guidance is applied where
    lo <= t <= hi of `guidance_interval`, and where no sample is inside, the second half is not
    computed. REPA's published guidance_high = 0.7 counts from the data end: (0.3, 1.0) here. Heun's
    second velocity is guided by its own time (REPA's corrector tests the time of the first).

    Args:
        model: called as model(x, t, y), or model(x, t) when y is None; has `clock`
            ("data_at_1" | "noise_at_1") and, for guidance, `null_class` (int).
        y: (B,) int64 labels, or None for a network without classes.
        cfg_scale: 1 = no guidance, no second forward.
        cfg_channels: number of leading channels to guide; None = all; "auto" = the network's
            attribute `cfg_channels`, all without one.
        guidance_interval: (lo, hi) in the engine's clock.

    Returns:
        velocity(x, t): x (B, C, ...), t (B,) float32 -> (B, C, ...) in x's dtype.

    Raises:
        ValueError: unknown clock, a prediction that is not a velocity, no null class, no labels,
            channels or interval out of range.
    """
    call = _in_engine_clock(model)
    guidance = _check_guidance(model, cfg_scale, cfg_channels, guidance_interval)
    if cfg_scale == 1.0:
        return lambda x, t: call(x, t, y)
    null = _null_class(model)
    if y is None:
        raise ValueError("cfg_scale other than 1 needs labels y, got None")
    return _guided(call, y, null, guidance)


def _in_engine_clock(model: Network) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(x, t, labels) -> the network's velocity in the engine's clock, in x's dtype."""
    clock = check_clock(getattr(model, "clock", None))
    prediction = getattr(model, "prediction", "velocity")
    if prediction != "velocity":
        raise ValueError(f"model.prediction must be 'velocity' to be sampled, got {prediction!r}")
    network = getattr(model, "velocity", model)  # REPA's SiT: without its projectors

    def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        own_t = t if clock == DATA_AT_1 else 1.0 - t
        out = network(x, own_t) if labels is None else network(x, own_t, labels)
        out = out[0] if isinstance(out, tuple) else out
        return (out if clock == DATA_AT_1 else -out).to(x.dtype)

    return call


def _check_guidance(
    model: Network, scale: float, channels: int | str | None, interval: tuple[float, float]
) -> _Guidance:
    if not math.isfinite(scale):
        raise ValueError(f"cfg_scale must be finite, got {scale}")
    low, high = interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            "guidance_interval must be (low, high) with 0 <= low <= high <= 1, 0 = noise, "
            f"got {interval}"
        )
    if channels == "auto":
        channels = getattr(model, "cfg_channels", None)
    if isinstance(channels, str) or (channels is not None and channels < 1):
        raise ValueError(
            f'cfg_channels must be >= 1, None for all channels or "auto", got {channels!r}'
        )
    return _Guidance(scale, channels, low, high)


def _null_class(model: Network) -> int:
    null = getattr(model, "null_class", None)
    if null is None:
        raise ValueError(
            "cfg_scale other than 1 needs a network with a null class (trained with label "
            "dropout); this one has none: use cfg_scale=1"
        )
    return int(null)


def _guided(
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    y: Tensor,
    null: int,
    guidance: _Guidance,
) -> Velocity:
    scale, channels, low, high = guidance
    everywhere = low == 0.0 and high == 1.0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if channels is not None and channels > x.shape[1]:
            raise ValueError(
                f"cfg_channels must be at most the {x.shape[1]} channels of x, got {channels}"
            )
        inside = (t >= low) & (t <= high)
        # Reading `inside` waits for the device, which costs less than the second half.
        if not everywhere and not bool(inside.any()):
            return call(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null)])
        both = call(torch.cat([x, x]), torch.cat([t, t]), labels)
        cond, uncond = both.chunk(2)
        out = uncond + scale * (cond - uncond)
        if channels is not None and channels < x.shape[1]:
            out = torch.cat([out[:, :channels], cond[:, channels:]], dim=1)
        return out if everywhere else torch.where(per_sample(inside, x), out, cond)

    return velocity
