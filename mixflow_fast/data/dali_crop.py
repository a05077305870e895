"""ADM's centre crop in DALI's operators: the same pixels as Pillow's but for rounding.

The rule (`adm_center_crop`): halve with a box filter while the short side is at least 2 S, then
bicubic to a short side of S, then cut out the centre. Pillow resizes along the width, rounds
to bytes, and then along the height, and so does this:

* **Halving** n pixels to m = n // 2 is the average of pairs, rounded half up. Where n is odd,
  Pillow's box filter takes pairs up to about the middle, there three pixels once (or leaves one
  out), and after it pairs that are shifted by one. No filter of DALI does that: here that one pixel
  is cut out, pairs are averaged, and the output in the middle is put in by itself. The result has
  Pillow's bits.
* **Bicubic** with antialiasing is the same filter in both, up to the rounding of its weights.

What depends on an image's size is computed on the host in Pillow's own arithmetic, and goes into
the pipeline as numbers (`crop_plan`).

The graph is to be called in a pipeline with `exec_dynamic=True` and `enable_conditionals=True`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

MAX_HALVINGS = 4
_AXIS = 7  # numbers in the plan for one axis of one halving


@dataclass(frozen=True)
class Halving:
    """How Pillow's box filter halves one axis.

    Attributes:
        source, target: pixels before and after.
        cut_start, cut_end: pixels that are left out before pairs are averaged; none where equal.
        middle: the output that is the mean of the `count` pixels from `first` on.
    """

    source: int
    cut_start: int
    cut_end: int
    target: int
    middle: int
    first: int
    count: int


def halving(source: int) -> Halving:
    """The halving of an axis of `source` >= 2 pixels."""
    target = source // 2
    if source % 2 == 0:
        return Halving(source, target, target, target, target // 2, target // 2 * 2, 2)
    for middle in range(max(0, target // 2 - 2), target):
        first, count = _box(source, target, middle)
        if count == 3 or first > 2 * middle:
            break
    # The pixel between the pairs before and those after: inside of the three, or left out.
    cut = 2 * middle + 1 if count == 3 else 2 * middle
    return Halving(source, cut, cut + 1, target, middle, first, count)


def _box(source: int, target: int, output: int) -> tuple[int, int]:
    """First and number of pixels that Pillow's box filter averages for an output.

    In the floating-point operations of its `precompute_coeffs` (libImaging/Resample.c), one by one:
    which of two neighbours is taken at the middle hangs on their rounding.
    """
    scale = source / target
    center, support, inverse = (output + 0.5) * scale, 0.5 * scale, 1.0 / scale
    low = max(0, int(center - support + 0.5))
    high = min(source, int(center + support + 0.5))
    taken = [x for x in range(low, high) if -0.5 < (x - center + 0.5) * inverse <= 0.5]
    return taken[0], len(taken)


def crop_plan(width: int, height: int, size: int) -> np.ndarray | None:
    """What the graph needs to know of an image; None for the few that are left to Pillow.

    Those are images that need more than MAX_HALVINGS, and tall ones (from about twice as high as
    wide on), which Pillow resizes along the height first since version 13, and last before it.

    Args:
        width, height: of the image, in pixels.
        size: side of the crop.

    Returns:
        (5 + 14 * MAX_HALVINGS,) int32: halvings; for each the seven numbers of `Halving` for the
        width and for the height (zeros where not needed); width and height after bicubic; offsets
        of the crop.
    """
    levels: list[int] = []
    while min(width, height) >= 2 * size:
        if _height_first((width, height), (width // 2, height // 2)):
            return None
        for side in (width, height):
            h = halving(side)
            levels += [h.source, h.cut_start, h.cut_end, h.target, h.middle, h.first, h.count]
        width, height = width // 2, height // 2
    halvings = len(levels) // (2 * _AXIS)
    if halvings > MAX_HALVINGS:
        return None
    scale = size / min(width, height)
    source, (width, height) = (width, height), (round(width * scale), round(height * scale))
    if _height_first(source, (width, height)):
        return None
    unused = [0] * (2 * _AXIS * (MAX_HALVINGS - halvings))
    last = [width, height, (width - size) // 2, (height - size) // 2]
    return np.array([halvings, *levels, *unused, *last], dtype=np.int32)


def _height_first(source: tuple[int, int], target: tuple[int, int]) -> bool:
    """Whether Pillow, from version 13 on, resizes (width, height) along the height first."""
    return source[1] - target[1] > max(0, 2 * (source[0] - target[0]))


def adm_crop(image: DataNode, plan: DataNode, size: int) -> DataNode:
    """(H, W, 3) uint8 images -> (size, size, 3) uint8.

    Args:
        image: on the CPU or the GPU.
        plan: on the CPU, of `crop_plan`.
    """
    from nvidia.dali import fn, types

    for level in range(MAX_HALVINGS):
        # Only images that need it are halved.
        if plan[0] > level:
            start = 1 + 2 * _AXIS * level
            image = _halved(image, [plan[start + k] for k in range(_AXIS)], 1)
            image = _halved(image, [plan[start + _AXIS + k] for k in range(_AXIS)], 0)
    end = 1 + 2 * _AXIS * MAX_HALVINGS
    width, height = (fn.cast(plan[end + k], dtype=types.FLOAT) for k in range(2))
    cubic = {"mode": "stretch", "interp_type": types.INTERP_CUBIC, "antialias": True}
    # uint8 between the two, as in Pillow.
    image = fn.resize(image, resize_x=width, **cubic)
    image = fn.slice(image, start=plan[end + 2], shape=[size], axes=[1])
    image = fn.resize(image, resize_y=height, **cubic)
    return fn.slice(image, start=plan[end + 3], shape=[size], axes=[0])


def _halved(image: DataNode, numbers: list[DataNode], axis: int) -> DataNode:
    """One axis (0: height, 1: width) halved, by the numbers of its `Halving`."""
    from nvidia.dali import fn, types

    source, cut_start, cut_end, target, middle, first, count = numbers
    zero, axes = source * 0, [axis]
    center = fn.slice(image, start=first, shape=fn.stack(count), axes=axes)
    # 1/8 makes halves round up and leaves thirds where they are.
    center = fn.reductions.mean(center, axes=axes, keep_dims=True) + 0.125
    pairs = fn.cat(
        fn.slice(image, start=zero, end=cut_start, axes=axes),
        fn.slice(image, start=cut_end, end=source, axes=axes),
        axis=axis,
    )
    side = {"resize_y" if axis == 0 else "resize_x": fn.cast(target, dtype=types.FLOAT)}
    # In the middle between two pixels, linear interpolation is their mean.
    pairs = fn.resize(
        pairs,
        mode="stretch",
        interp_type=types.INTERP_LINEAR,
        antialias=False,
        dtype=types.FLOAT,
        **side,
    )
    pairs = fn.cast(pairs + 0.25, dtype=types.UINT8)
    return fn.cat(
        fn.slice(pairs, start=zero, end=middle, axes=axes),
        fn.cast(center, dtype=types.UINT8),
        fn.slice(pairs, start=middle + 1, end=target, axes=axes),
        axis=axis,
    )
