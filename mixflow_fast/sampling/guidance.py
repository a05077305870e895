"""The velocity of a network in the engine's clock, with classifier-free guidance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, check_clock
from mixflow_fast.sampling.solvers import Velocity


def _null_class(model: Any) -> int:
    null = getattr(model, "null_class", None)
    if null is None:
        raise ValueError(
            "cfg_scale other than 1 needs a network with a null class (trained with label "
            "dropout); this one has none: use cfg_scale=1"
        )
    return int(null)


def model_velocity(
    model: Any,
    y: Tensor | None,
    cfg_scale: float = 1.0,
    cfg_channels: int | str | None = "auto",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> Velocity:
    """The velocity in the engine's clock of a network that runs in its own.

    A "noise_at_1" network (REPA, RAE, SD3) sees the label 1 - t, and its output is negated. A
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
    clock = check_clock(getattr(model, "clock", None))
    prediction = getattr(model, "prediction", "velocity")
    if prediction != "velocity":
        raise ValueError(f"model.prediction must be 'velocity' to be sampled, got {prediction!r}")
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be finite, got {cfg_scale}")
    low, high = guidance_interval
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(
            "guidance_interval must be (low, high) with 0 <= low <= high <= 1, 0 = noise, "
            f"got {guidance_interval}"
        )
    if cfg_channels == "auto":
        cfg_channels = getattr(model, "cfg_channels", None)
    if isinstance(cfg_channels, str) or (cfg_channels is not None and cfg_channels < 1):
        raise ValueError(
            f'cfg_channels must be >= 1, None for all channels or "auto", got {cfg_channels!r}'
        )
    guided = cfg_scale != 1.0
    if guided:
        null = _null_class(model)
        if y is None:
            raise ValueError("cfg_scale other than 1 needs labels y, got None")
    everywhere = low == 0.0 and high == 1.0
    network = getattr(model, "velocity", model)  # REPA's SiT: without its projectors

    def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        own_t = t if clock == DATA_AT_1 else 1.0 - t
        out = network(x, own_t) if labels is None else network(x, own_t, labels)
        out = out[0] if isinstance(out, tuple) else out
        return (out if clock == DATA_AT_1 else -out).to(x.dtype)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not guided:
            return call(x, t, y)
        if cfg_channels is not None and cfg_channels > x.shape[1]:
            raise ValueError(
                f"cfg_channels must be at most the {x.shape[1]} channels of x, got {cfg_channels}"
            )
        inside = (t >= low) & (t <= high)
        if not everywhere and not bool(inside.any()):
            return call(x, t, y)
        labels = torch.cat([y, torch.full_like(y, null)])
        both = call(torch.cat([x, x]), torch.cat([t, t]), labels)
        cond, uncond = both.chunk(2)
        out = uncond + cfg_scale * (cond - uncond)
        if cfg_channels is not None and cfg_channels < x.shape[1]:
            out = torch.cat([out[:, :cfg_channels], cond[:, cfg_channels:]], dim=1)
        if everywhere:
            return out
        return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), out, cond)

    return velocity


def _config_value(model: Any, name: str) -> Any:
    config = getattr(model, "config", None)
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)
