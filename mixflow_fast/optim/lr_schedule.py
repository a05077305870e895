"""Learning rate as a function of the images seen."""

from __future__ import annotations

import math
from typing import Literal, get_args

LrSchedule = Literal["constant", "linear", "cosine"]
SCHEDULES = get_args(LrSchedule)


def learning_rate(
    images_seen: int,
    *,
    lr: float,
    schedule: LrSchedule = "constant",
    warmup_images: int = 0,
    decay_images: int = 0,
    final_lr: float = 0.0,
) -> float:
    """Learning rate of the step that ends at `images_seen` training images.

    Linear warm-up from 0 over `warmup_images`, then `lr` ("constant"), or a "linear" or "cosine"
    descent that reaches `final_lr` at `decay_images` and stays there.

    Args:
        images_seen: training images of all ranks, including the batch of this step.
        lr: peak learning rate.
        schedule: "constant", "linear" or "cosine".
        warmup_images, decay_images: lengths in images; `decay_images` counts from 0.
        final_lr: value after the descent.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {SCHEDULES}, got {schedule!r}")
    if images_seen < warmup_images:
        return lr * images_seen / warmup_images
    if schedule == "constant":
        return lr
    span = max(decay_images - warmup_images, 1)
    progress = min((images_seen - warmup_images) / span, 1.0)
    left = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return final_lr + (lr - final_lr) * left
