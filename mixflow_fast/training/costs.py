"""Model FLOPs of a run: by formula, or, of another library's network, counted as they would run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import torch
from torch.utils.flop_counter import FlopCounterMode

from mixflow_fast.data import Dataset
from mixflow_fast.data.bucket_order import bucket_sizes
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.models import Network
from mixflow_fast.models.flops import train_flops
from mixflow_fast.models.text_to_image.adapter import Condition
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.training.conditions import Conditions, Prompts

# (C, h, w) of latents -> how many examples have it.
Shapes = Mapping[tuple[int, ...], int]
# Areas that are counted, a second or two each for a large network; others follow from three.
_COUNTED = 3


def run_flops(model: Network, conditions: Conditions, dataset: Dataset) -> int | None:
    """Model FLOPs per image and training step; None where they cannot be known.

    Args:
        model: the network on the meta device.
        conditions: what it is told.
        dataset: the examples.
    """
    if not isinstance(model, TextToImage):
        return train_flops(model)
    if not isinstance(conditions, Prompts):
        return None
    return text_to_image_flops(model, *shapes_and_cond(conditions, dataset))


def shapes_and_cond(conditions: Prompts, dataset: Dataset) -> tuple[Shapes, Condition]:
    """Shapes of the latents, and what one example tells the network, on the meta device.

    Args:
        conditions: what the network is told.
        dataset: the examples.
    """
    shapes: dict[tuple[int, ...], int] = {}
    first = torch.zeros(1, dtype=torch.int64)
    for examples in bucket_sizes(dataset):
        batch = dataset.get(first, torch.zeros(1, dtype=torch.int64), 0)
        shape = tuple((batch.x[0] if isinstance(batch.x, Moments) else batch.x).shape[1:])
        shapes[shape] = shapes.get(shape, 0) + examples
        first = first + examples
    return shapes, conditions.on_meta(batch)


def text_to_image_flops(model: TextToImage, shapes: Shapes, cond: Condition) -> int | None:
    """Model FLOPs of the mean example in a training step: products of both passes, without storage.

    Nothing that is computed twice is counted, nor gradients that nobody needs: of the inputs, and
    of weights that are not trained.

    Args:
        model: on the meta device, run in mode eager without checkpointing.
        shapes: of the latents.
        cond: of one example, on the meta device.

    Returns:
        None for a network that looks at its inputs' values, which are not there.
    """
    examples: dict[int, int] = {}
    shape_of: dict[int, tuple[int, ...]] = {}
    for shape, count in shapes.items():
        area = shape[1] * shape[2]
        examples[area] = examples.get(area, 0) + count
        shape_of[area] = shape
    areas = sorted(examples)
    if len(areas) > _COUNTED:
        areas = [areas[0], areas[len(areas) // 2], areas[-1]]
    try:
        counted = {area: _both_passes(model, shape_of[area], cond) for area in areas}
    except RuntimeError:  # how torch says that a value was asked for
        return None
    total = sum(count * _at(area, counted) for area, count in examples.items())
    return round(total / sum(examples.values()))


def _at(area: int, counted: Mapping[int, int]) -> Fraction:
    """FLOPs of another area: attention makes them a polynomial of degree two in it."""
    value = Fraction(0)
    for own, flops in counted.items():
        others = [other for other in counted if other != own]
        weight = math.prod(Fraction(area - other, own - other) for other in others)
        value += weight * flops
    return value


def _both_passes(model: TextToImage, shape: tuple[int, ...], cond: Condition) -> int:
    x, t = (torch.empty(1, *sides, device="meta") for sides in (shape, ()))
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        velocity = model(x, t, cond)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        torch.autograd.grad(velocity.sum(), weights, allow_unused=True)
    return counter.get_total_flops()
