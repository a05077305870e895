"""Samplers of the papers by name, each with its guidance, its labels and its way to pixels.

Official step counts that count points are translated to intervals here, and `describe` prints what
comes out of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mixflow_fast.sampling.guidance import Guidance
from mixflow_fast.sampling.sampler import Sampler

Quantisation = Literal["round", "floor", "round_even"]
Labels = Literal["random", "balanced"]


@dataclass(frozen=True)
class Preset:
    """A published way to sample.

    Attributes:
        sampler: the steps.
        guidance: scale 1 where the paper's unguided numbers are meant.
        quantisation: of pixels, x in [-1, 1]: "round" floor(127.5 x + 128), "floor"
            floor(127.5 (x + 1)), "round_even" round(127.5 (x + 1)), all cut to 0 .. 255.
        labels: "random", or "balanced" (id mod classes).
        note: where it comes from, and what is not certain about it.
    """

    sampler: Sampler
    guidance: Guidance = Guidance()
    quantisation: Quantisation = "round"
    labels: Labels = "random"
    note: str = ""

    def describe(self) -> str:
        """Everything in it, a line each."""
        return "\n".join(
            (
                f"sampler: {self.sampler.describe()}",
                f"guidance: {self.guidance.describe()}",
                f"labels: {self.labels}; pixels: {self.quantisation}",
                self.note,
            )
        )


_SIT_CFG = Guidance(1.5, 3)
_RAE_256 = math.sqrt(768 * 16 * 16 / 4096)  # latent size over RAE's base
_RAE_512 = math.sqrt(768 * 32 * 32 / 4096)
_LIGHTNINGDIT = Sampler("euler", 249, shift=1 / 0.3)
_DIFFUSERS_SHIFT = 3.0
# diffusers shifts its smallest noise level, 1/1000, once in advance.
_DIFFUSERS_LAST = _DIFFUSERS_SHIFT * 1e-3 / (1 + (_DIFFUSERS_SHIFT - 1) * 1e-3)


def _rae(guidance: Guidance, shift: float, note: str) -> Preset:
    sampler = Sampler("euler", 49, shift=shift, end=0.999)
    return Preset(sampler, guidance, "floor", "balanced", f"RAE: 50 points, no step to 0; {note}")


PRESETS: dict[str, Preset] = {
    "sit-paper-ode": Preset(
        Sampler("heun", 125),
        _SIT_CFG,
        note="SiT-XL/2's ODE as its authors describe it, 250 evaluations; the paper says 250 "
        "steps, which may mean sit-ode-250x2",
    ),
    "sit-ode-250x2": Preset(
        Sampler("heun", 250), _SIT_CFG, note="SiT's ODE read as 250 steps of two evaluations"
    ),
    "sit-paper-sde": Preset(
        Sampler("sde_euler", 250),
        _SIT_CFG,
        note="SiT-XL/2, FID 2.06 in the paper; SiT's code calls the network twice a step",
    ),
    "repa-sde": Preset(
        Sampler("sde_euler", 250),
        Guidance(1.8, None, (0.3, 1.0)),
        "floor",
        note="REPA SiT-XL/2, FID 1.42 in the paper; its guidance_high 0.7 is t >= 0.3 here; its "
        "state is float64",
    ),
    "repa-ode": Preset(
        Sampler("euler", 50), Guidance(1.5, None), "floor", note="defaults of REPA's generate.py"
    ),
    "rae": _rae(Guidance(), _RAE_256, "256 pixels, FID 1.51 in the paper"),
    "rae-ag": _rae(
        Guidance(1.42, None, kind="autoguidance"),
        _RAE_256,
        "256 pixels, FID 1.13 in the paper; guide DiT-DH-S of epoch 14",
    ),
    "rae-ag-512": _rae(
        Guidance(1.5, None, kind="autoguidance"),
        _RAE_512,
        "512 pixels, FID 1.13 in the paper; guide DiT-DH-S of epoch 20",
    ),
    "lightningdit": Preset(
        _LIGHTNINGDIT,
        Guidance(6.7, 3, (0.125, 1.0)),
        note="LightningDiT of 800 epochs: 250 points, its shift 0.3",
    ),
    "lightningdit-64ep": Preset(
        _LIGHTNINGDIT,
        Guidance(10.0, 3, (0.125, 1.0)),
        note="LightningDiT of 64 epochs: 250 points, its shift 0.3",
    ),
    "diffusers-flow-euler": Preset(
        Sampler("euler", 28, shift=_DIFFUSERS_SHIFT, last_size=_DIFFUSERS_LAST),
        quantisation="round_even",
        note="diffusers' FlowMatchEulerDiscreteScheduler, shift 3; its last interval is shifted "
        "twice",
    ),
    "diffusers-dpmpp2m": Preset(
        Sampler("dpmpp2m", 20, shift=_DIFFUSERS_SHIFT, start=1e-3, integer_times=True),
        quantisation="round_even",
        note="diffusers' DPMSolverMultistepScheduler with flow_prediction, flow_shift 3; the "
        "network is told whole thousandths, worth 2e-3 in the state",
    ),
} | {
    f"mixflow-table4-{steps}": Preset(
        Sampler("heun", steps),
        _SIT_CFG,
        note=f"MixFlow's Table 4 with guidance, {steps} Heun steps (250 may mean 250 evaluations "
        "there); the unguided columns take --cfg-scale 1",
    )
    for steps in (250, 50, 20)
}


def get_preset(name: str) -> Preset:
    """The preset of that name; ValueError that lists the names otherwise."""
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
