"""Pictures of what a run's EMA weights generate, from the same noise and labels each time.

OUT/previews/step_N.png. Noise and labels are functions of the picture's number alone, so previews
of different steps, and of different runs on the same data, can be laid side by side.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.config.schema import Config
from mixflow_fast.models import Transformer
from mixflow_fast.reports.images import save_grid
from mixflow_fast.sampling.samples import sample

SEED = 0
_LATENT_RANGE = 3.0  # latents of about unit variance; the same for every preview
_SMALLEST = 64  # pixels a side, by enlargement


def preview_file(out: Path, step: int) -> Path:
    """Where the preview of a step is written."""
    return out / "previews" / f"step_{step:08d}.png"


def preview_labels(num: int, num_classes: int) -> Tensor:
    """(num,) int64, spread evenly over all classes: 0 .. num_classes - 1 in order."""
    return torch.arange(num) * num_classes // num


def is_latent(config: Config) -> bool:
    """Whether a preview can only show channels of a latent, no picture."""
    return config.data.kind == "latents" or config.model.in_channels not in (1, 3)


def caption(config: Config) -> str:
    """How the pictures came about, in a sentence."""
    c = config.train
    words = f"{c.preview_steps} Euler steps from EMA weights, the same noise and labels each time"
    if c.preview_cfg != 1:
        words += f", guidance {c.preview_cfg:g}"
    if is_latent(config):
        shown = min(config.model.in_channels, 3 if config.model.in_channels >= 3 else 1)
        words += (
            f". These are latents, not pictures: the first {shown} of {config.model.in_channels} "
            f"channels, values from -{_LATENT_RANGE:g} to {_LATENT_RANGE:g}, without the decoder"
        )
    return words


def write_preview(net: Transformer, config: Config, path: Path) -> None:
    """Sample and write one preview, whole or not at all.

    Args:
        net: with the weights to show, on the device where to sample.
        config: of the run.
        path: the PNG; its folder is made.

    Raises:
        ValueError: the samples are not finite.
        OSError: the file could not be written.
    """
    c = config.train
    x = sample(
        net,
        labels=preview_labels(c.previews, config.model.num_classes),
        steps=c.preview_steps,
        cfg_scale=c.preview_cfg,
        shift=config.objective.shift,
        seed=SEED,
        batch_size=min(c.previews, c.microbatch_size),
    ).x
    if is_latent(config):
        x = x[:, : 3 if x.shape[1] >= 3 else 1] / _LATENT_RANGE
    columns = min(8, math.isqrt(c.previews - 1) + 1)
    save_grid(path, x, columns=columns, scale=max(1, _SMALLEST // x.shape[-1]))
