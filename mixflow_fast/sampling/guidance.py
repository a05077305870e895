"""The velocity of a network in the engine's clock, with guidance.

Classifier-free guidance, v = u + g (c - u) with u from the null class, and autoguidance (arXiv
2406.02507), v = b + g (m - b) with b from a smaller or less trained network on the same labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, check_clock
from mixflow_fast.flow.path import per_sample
from mixflow_fast.sampling.remedies import Remedy
from mixflow_fast.sampling.solvers import Number, PlannedVelocity, Velocity

Kind = Literal["cfg", "autoguidance"]
# (x, t, labels) -> velocity in the engine's clock.
_Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Network(Protocol):
    """A network that can be sampled: model(x, t), or model(x, t, y) with class labels.

    Attributes:
        clock: "data_at_1" or "noise_at_1", of the times that it is called with.

    Others are read where a network has them: `prediction`, `null_class`, `cfg_channels`, and
    `velocity`, a call without further outputs (REPA's projections).
    """

    clock: str

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Guidance:
    """How strongly, where and when a sampler is guided.

    Attributes:
        scale: g; 1 is none, and computes no second velocity.
        channels: number of leading channels to guide, the others keep the conditional velocity;
            None all; "auto" the network's attribute `cfg_channels`, all without one and under
            autoguidance. SiT and LightningDiT guide 3, REPA and RAE all.
        interval: (low, high) in the engine's clock, inclusive; outside it one velocity is computed.
            REPA's guidance_high = 0.7 counts from the data end: (0.3, 1.0) here.
        kind: "cfg" or "autoguidance".
        by_step: test the interval at the time when the solver's step began, for every velocity of
            the step, as REPA's Heun does; otherwise at each velocity's own time.
    """

    scale: float = 1.0
    channels: int | str | None = "auto"
    interval: tuple[float, float] = (0.0, 1.0)
    kind: Kind = "cfg"
    by_step: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"cfg_scale must be finite, got {self.scale}")
        low, high = self.interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(
                "guidance_interval must be (low, high) with 0 <= low <= high <= 1, 0 = noise, "
                f"got {self.interval}"
            )
        count = self.channels
        if count not in ("auto", None) and (not isinstance(count, int) or count < 1):
            raise ValueError(
                f'cfg_channels must be >= 1, None for all channels or "auto", got {self.channels!r}'
            )
        if self.kind not in ("cfg", "autoguidance"):
            raise ValueError(f"kind must be 'cfg' or 'autoguidance', got {self.kind!r}")

    @property
    def everywhere(self) -> bool:
        """Whether the interval is all of [0, 1]."""
        return self.interval[0] == 0.0 and self.interval[1] == 1.0

    def channels_of(self, model: Network) -> int | None:
        """How many leading channels of this network are guided; None: all."""
        if not isinstance(self.channels, str):
            return self.channels
        return getattr(model, "cfg_channels", None) if self.kind == "cfg" else None

    def to_record(self) -> dict[str, float | str | int | bool | list[float] | None]:
        """All fields, for a protocol."""
        return {
            "kind": self.kind,
            "scale": float(self.scale),
            "channels": self.channels,
            "interval": [float(end) for end in self.interval],
            "by_step": self.by_step,
        }

    def describe(self) -> str:
        if self.scale == 1.0:
            return "no guidance"
        name = "autoguidance" if self.kind == "autoguidance" else "classifier-free guidance"
        channels = {"auto": "the network's channels", None: "all channels"}.get(
            self.channels, f"the first {self.channels} channels"
        )
        low, high = self.interval
        when = "" if self.everywhere else f", for {low:g} <= t <= {high:g} (0 = noise)"
        tested = ", tested where the step began" if self.by_step and when else ""
        return f"{name} {self.scale:g} on {channels}{when}{tested}"


def model_velocity(
    model: Network,
    y: Tensor | None,
    cfg_scale: float = 1.0,
    cfg_channels: int | str | None = "auto",
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> PlannedVelocity:
    """`guided_velocity` with classifier-free guidance; arguments as the fields of `Guidance`."""
    return guided_velocity(model, y, Guidance(cfg_scale, cfg_channels, guidance_interval))


def guided_velocity(
    model: Network,
    y: Tensor | None,
    guidance: Guidance,
    guide: Network | None = None,
    remedy: Remedy | None = None,
) -> PlannedVelocity:
    """The velocity in the engine's clock of a network that runs in its own.

    A "noise_at_1" network (REPA, RAE, SD3) sees the time 1 - t, and its output is negated. A
    network that returns a tuple (REPA: velocity, projections) gives its first item.

    Under classifier-free guidance both velocities come from one forward of 2B rows. Where no
    sample is inside the interval, the second velocity is not computed.

    Args:
        model: called as model(x, t, y), or model(x, t) when y is None; has `clock`
            ("data_at_1" | "noise_at_1") and, for classifier-free guidance, `null_class` (int).
        y: (B,) int64 labels, or None for a network without classes.
        guidance: how it is guided.
        guide: the other network of autoguidance, called with the same x and labels.
        remedy: changes the time that the networks are told, and the guided velocity.

    Returns:
        velocity(x, t): x (B, C, ...), t (B,) float32 -> (B, C, ...) in x's dtype.

    Raises:
        ValueError: unknown clock, a prediction that is not a velocity, no null class, no labels,
            no guide or one without use, more channels than there are.
    """
    call = _in_engine_clock(model, remedy)
    if (guide is not None) != (guidance.kind == "autoguidance"):
        raise ValueError(
            "a guide network belongs to kind='autoguidance', which needs one: got "
            f"kind={guidance.kind!r} {'without' if guide is None else 'with'} a guide"
        )
    if guidance.scale == 1.0:
        pair = None
    elif guide is not None:
        pair = _pair_of_networks(call, _in_engine_clock(guide, remedy), y)
    else:
        pair = _pair_of_labels(call, y, _null_class(model))
    channels = guidance.channels_of(model)
    return _GuidedVelocity(lambda x, t: call(x, t, y), pair, guidance, channels, remedy)


def _in_engine_clock(model: Network, remedy: Remedy | None) -> _Call:
    """(x, t, labels) -> the network's velocity in the engine's clock, in x's dtype."""
    clock = check_clock(getattr(model, "clock", None))
    prediction = getattr(model, "prediction", "velocity")
    if prediction != "velocity":
        raise ValueError(f"model.prediction must be 'velocity' to be sampled, got {prediction!r}")
    network = getattr(model, "velocity", model)  # REPA's SiT: without its projectors

    def call(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        t = t if remedy is None else remedy.told(x, t)
        own_t = t if clock == DATA_AT_1 else 1.0 - t
        out = network(x, own_t) if labels is None else network(x, own_t, labels)
        out = out[0] if isinstance(out, tuple) else out
        return (out if clock == DATA_AT_1 else -out).to(x.dtype)

    return call


def _null_class(model: Network) -> int:
    null = getattr(model, "null_class", None)
    if null is None:
        raise ValueError(
            "cfg_scale other than 1 needs a network with a null class (trained with label "
            "dropout); this one has none: use cfg_scale=1"
        )
    return int(null)


# (x, t) -> the velocity that is guided, and the one that it is led away from.
_Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _pair_of_labels(call: _Call, y: Tensor | None, null: int) -> _Pair:
    if y is None:
        raise ValueError("cfg_scale other than 1 needs labels y, got None")

    def pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.cat([y, torch.full_like(y, null)])
        both = call(torch.cat([x, x]), torch.cat([t, t]), labels)
        cond, uncond = both.chunk(2)
        return cond, uncond

    return pair


def _pair_of_networks(main: _Call, guide: _Call, y: Tensor | None) -> _Pair:
    return lambda x, t: (main(x, t, y), guide(x, t, y))


class _GuidedVelocity:
    """other + g (main - other) inside the interval and on the guided channels, main elsewhere."""

    def __init__(
        self,
        main: Velocity,
        pair: _Pair | None,
        guidance: Guidance,
        channels: int | None,
        remedy: Remedy | None,
    ) -> None:
        self._main, self._pair = main, pair
        self._guidance, self._channels, self._remedy = guidance, channels, remedy

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.in_step(x, t, t)

    def in_step(self, x: Tensor, t: Tensor, began: Tensor) -> Tensor:
        """The velocity at (x, t) inside a solver's step that began at the times `began` (B,)."""
        v = self._guided(x, t, began if self._guidance.by_step else t)
        return v if self._remedy is None else self._remedy.corrected(v, x, t)

    def guided_at(self, t: float, began: float) -> bool:
        """Whether samples at the time t, in a step that began at another, are guided."""
        if self._pair is None or self._guidance.everywhere:
            return self._pair is not None
        tested = began if self._guidance.by_step else t
        # In float32, as times on the device are compared.
        low, tested, high = np.float32([*self._guidance.interval, tested])[[0, 2, 1]]
        return bool(low <= tested <= high)

    def planned(self, x: Tensor, t: Tensor, guided: bool, scale: Number | None = None) -> Tensor:
        """`in_step` where `guided_at` is known: nothing is read from the device.

        scale: of the guidance, a () tensor in place of the number of `Guidance`.
        """
        v = self._led(x, t, scale)[0] if guided else self._main(x, t)
        return v if self._remedy is None else self._remedy.corrected(v, x, t)

    def _guided(self, x: Tensor, t: Tensor, tested: Tensor) -> Tensor:
        if self._pair is None:
            return self._main(x, t)
        everywhere = self._guidance.everywhere
        low, high = self._guidance.interval
        inside = (tested >= low) & (tested <= high)
        # Reading `inside` waits for the device, which costs less than the second velocity.
        if not everywhere and not bool(inside.any()):
            return self._main(x, t)
        out, main = self._led(x, t)
        return out if everywhere else torch.where(per_sample(inside, x), out, main)

    def _led(self, x: Tensor, t: Tensor, scale: Number | None = None) -> tuple[Tensor, Tensor]:
        """(the guided velocity, the main one)."""
        channels = self._channels
        if channels is not None and channels > x.shape[1]:
            raise ValueError(
                f"cfg_channels must be at most the {x.shape[1]} channels of x, got {channels}"
            )
        main, other = self._pair(x, t)
        out = other + (self._guidance.scale if scale is None else scale) * (main - other)
        if channels is not None and channels < x.shape[1]:
            out = torch.cat([out[:, :channels], main[:, channels:]], dim=1)
        return out, main
