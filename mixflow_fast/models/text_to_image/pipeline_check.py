"""Holds an adapter against the official pipeline: the one check that a wrong adapter cannot pass.

The pipeline runs a few steps, and its scheduler records what it is given: the latents, their noise
level and the velocity that the pipeline made of the network's output, whatever it had to do for it.
`adapter.velocity(x, sigma, cond)` must be the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mixflow_fast.models.text_to_image.adapter import Adapter, Condition

# Relative RMS below which two velocities are one, up to the order of sums.
_ROUNDING = 1e-5


class _Scheduler(Protocol):
    """diffusers' `FlowMatchEulerDiscreteScheduler`, as far as it is used here."""

    sigmas: Tensor
    step_index: int | None

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, **more: object
    ) -> object: ...


class Pipeline(Protocol):
    """A text-to-image pipeline of diffusers."""

    scheduler: _Scheduler

    def __call__(self, **call: object) -> object: ...


@dataclass(frozen=True)
class RecordedStep:
    """What a pipeline's scheduler was given in one step.

    Attributes:
        x: (B, C, h, w) latents before the step.
        sigma: () float32 noise level.
        velocity: (B, C, h, w) `model_output`.
    """

    x: Tensor
    sigma: Tensor
    velocity: Tensor


def record_steps(
    pipeline: Pipeline, unpack: Callable[[Tensor], Tensor] | None = None, **call: object
) -> list[RecordedStep]:
    """Run a pipeline and record its steps.

    Args:
        pipeline: of diffusers, with a flow-matching Euler scheduler.
        unpack: of what the scheduler sees to (B, C, h, w), for pipelines with packed latents.
        call: arguments of the pipeline. Without guidance, which would be in what is recorded, with
            the prompts' embeddings, num_inference_steps=2 and output_type="latent".

    Raises:
        ValueError: a scheduler without sigmas or step_index.
    """
    scheduler = pipeline.scheduler
    if not hasattr(scheduler, "sigmas") or not hasattr(scheduler, "step_index"):
        raise ValueError(
            "the pipeline's scheduler must have sigmas and step_index, as "
            f"FlowMatchEulerDiscreteScheduler, got {type(scheduler).__name__}"
        )
    official, steps = scheduler.step, []

    def step(model_output: Tensor, timestep: Tensor, sample: Tensor, **more: object) -> object:
        x, velocity = sample.clone(), model_output.clone()
        out = official(model_output, timestep, sample, **more)
        sigma = scheduler.sigmas[scheduler.step_index - 1].clone()
        if unpack is not None:
            x, velocity = unpack(x), unpack(velocity)
        steps.append(RecordedStep(x, sigma, velocity))
        return out

    scheduler.step = step
    try:
        pipeline(**call)
    finally:
        # The instance's attribute, which hides the method of its class.
        del scheduler.step
    return steps


@torch.no_grad()
def check_against_pipeline(
    adapter: Adapter, steps: Sequence[RecordedStep], cond: Condition, tolerance: float = _ROUNDING
) -> float:
    """Compare an adapter's velocities with those that a pipeline's scheduler was given.

    Args:
        adapter: of the same network, which a short run of random weights serves as well.
        steps: of `record_steps`; two or more, because at the noise end 1000 s and 1000 are equal.
        cond: the prompts that the pipeline was given.
        tolerance: relative RMS that passes; 0 where the bits must be the same.

    Returns:
        the largest relative RMS error of a step.

    Raises:
        ValueError: a shape or a velocity that is not the pipeline's; says what would fit, if the
            other sign or the other clock does.
    """
    if len(steps) < 2:
        raise ValueError(f"steps must be at least 2 recorded ones, got {len(steps)}")
    worst = 0.0
    for number, step in enumerate(steps):
        t = step.sigma.to(step.x.device, torch.float32).expand(len(step.x))
        ours = adapter.velocity(step.x, t, cond)
        if ours.shape != step.velocity.shape:
            raise ValueError(
                f"{type(adapter).__name__}.velocity must have the shape of x, "
                f"{tuple(step.velocity.shape)}, got {tuple(ours.shape)}"
            )
        error = _relative(ours, step.velocity)
        if not error <= tolerance:
            raise ValueError(
                f"{type(adapter).__name__}.velocity is not the pipeline's: relative RMS "
                f"{error:.3g} at sigma {step.sigma.item():.4g} (step {number}), expected at most "
                f"{tolerance:g}; {_what_would_fit(adapter, step, t, ours, cond)}"
            )
        worst = max(worst, error)
    return worst


def _what_would_fit(
    adapter: Adapter, step: RecordedStep, t: Tensor, ours: Tensor, cond: Condition
) -> str:
    """Which of the usual mistakes explains a velocity, in words."""
    backwards = adapter.velocity(step.x, 1 - t, cond)
    others = {
        "with the other sign": -ours,
        "with the other clock": backwards,
        "with the other sign and clock": -backwards,
    }
    for name, velocity in others.items():
        if _relative(velocity, step.velocity) <= _ROUNDING:
            return f"{name} it does fit"
    return "look at the scale of the time and the layout"


def _relative(ours: Tensor, truth: Tensor) -> float:
    difference = (ours.double() - truth.double()).norm()
    return (difference / truth.double().norm().clamp_min(1e-300)).item()
