"""Frechet distance between sample sets, and small fixed feature maps to measure it in.

The distance of the Gaussians that fit two sets of features (Frechet 1957; Heusel et al. 2017):

    |m1 - m2|^2 + tr C1 + tr C2 - 2 tr (C1^1/2 C2 C1^1/2)^1/2

With Inception-v3 features it is FID. The feature maps here need no download and suit small images;
their numbers compare only with each other, never with a published FID.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal

_CHUNK = 512  # images per pass of the feature network


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d) of features (N, d), both float64.

    Warns when N <= d: the covariance has no full rank then, and the distance is biased upwards
    more than usual.

    Raises:
        ValueError: not (N, d) with N >= 2, or NaN or infinity in it.
    """
    if features.dim() != 2 or features.shape[0] < 2 or features.shape[1] < 1:
        raise ValueError(
            f"features must be (N, d) with N >= 2 and d >= 1, got {tuple(features.shape)}"
        )
    count, dim = features.shape
    features = features.detach().to("cpu", torch.float64)
    if not torch.isfinite(features).all():
        raise ValueError("features must be finite, got NaN or infinity")
    if count <= dim:
        warnings.warn(
            f"{count} samples in {dim} dimensions: the covariance has no full rank; "
            f"use more than {dim} samples",
            stacklevel=2,
        )
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (count - 1)


class Roots(NamedTuple):
    """Of a covariance C, all (d, d) float64: C^1/2, and C^-1/2 on the space that C spans.

    Attributes:
        root, inverse: the two.
        rank: eigenvalues that are above rounding.
        lowest: smallest eigenvalue over the largest; below zero by rounding only.
    """

    root: Tensor
    inverse: Tensor
    rank: int
    lowest: float


def symmetric_roots(cov: Tensor) -> Roots:
    """Roots of a covariance (d, d), float64 on the CPU.

    Eigenvalues below d eps times the largest are rounding, hence zero.

    Raises:
        ValueError: an eigenvalue is negative by more than rounding.
    """
    values, vectors = torch.linalg.eigh((cov + cov.T) / 2)
    largest = values.abs().max()
    # Below zero by more than rounding: no covariance at all.
    if values.min() < -1e-6 * largest:
        raise ValueError(
            "cov must be a covariance (no negative eigenvalue), got eigenvalues "
            f"{float(values.min()):.3g} .. {float(values.max()):.3g}"
        )
    kept = values > largest * cov.shape[0] * torch.finfo(torch.float64).eps
    roots = torch.where(kept, values, 0.0).sqrt()
    inverses = torch.where(kept, values, 1.0).rsqrt() * kept
    lowest = float(values.min() / largest) if largest > 0 else 0.0
    return Roots((vectors * roots) @ vectors.T, (vectors * inverses) @ vectors.T, int(kept.sum()),
                 lowest)  # fmt: skip


def frechet_distance(m1: Tensor, c1: Tensor, m2: Tensor, c2: Tensor) -> float:
    """Squared Frechet distance of N(m1, c1) and N(m2, c2), in float64.

    The trace of the root is computed as the sum of the singular values of C1^1/2 C2^1/2, the same
    number, which keeps full accuracy where the covariances lack rank: no offset is added to them.
    A result that rounding made negative is returned as 0.

    Args:
        m1, m2: (d,) means. c1, c2: (d, d) symmetric covariances.

    Raises:
        ValueError: shapes that disagree, NaN or infinity, a negative eigenvalue.
    """
    dim = m1.shape[0] if m1.dim() == 1 else -1
    for name, value, shape in (
        ("m1", m1, (dim,)),
        ("c1", c1, (dim, dim)),
        ("m2", m2, (dim,)),
        ("c2", c2, (dim, dim)),
    ):
        if tuple(value.shape) != shape:
            raise ValueError(
                f"{name} must have shape {shape if dim >= 0 else '(d,)'}, got {tuple(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} must be finite, got NaN or infinity")
    m1, c1, m2, c2 = (v.detach().to("cpu", torch.float64) for v in (m1, c1, m2, c2))
    cross = torch.linalg.svdvals(symmetric_roots(c1).root @ symmetric_roots(c2).root).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _check_images(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[0] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be (N, C, H, W) float in [-1, 1], got {tuple(x.shape)} {x.dtype}")


def pooled_pixels(x: Tensor, size: int = 8) -> Tensor:
    """Images (N, C, H, W) in [-1, 1], averaged down to size x size: (N, C size^2) float64.

    Raises:
        ValueError: not four dimensions, or H or W no multiple of `size`.
    """
    _check_images(x)
    height, width = x.shape[2:]
    if size < 1 or height % size or width % size:
        raise ValueError(f"size must divide height and width ({height}, {width}), got {size}")
    x = x.detach().to("cpu", torch.float64)
    return F.avg_pool2d(x, (height // size, width // size)).flatten(1)


def random_conv_features(x: Tensor, dim: int = 128, seed: int = 0) -> Tensor:
    """Features of a small random convolutional network, (N, dim) float64.

    Three 3x3 convolutions without bias, zero padding 1, strides 1, 2, 2 and widths dim/4, dim/2,
    dim/2, a ReLU after each; then the mean and the standard deviation of every channel over the
    positions. Weight number j (row-major over out, in, 3, 3) of layer l is
    normal(seed, Stream.INIT, l)[j] sqrt(2 / (9 in)) (He et al. 2015): (dim, seed) fixes the map
    for good. Random features see texture and edges that averaged pixels do not.

    Args:
        x: (N, C, H, W) float in [-1, 1], at least 4 x 4 pixels. dim: a multiple of 4.
    """
    _check_images(x)
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    if min(x.shape[2:]) < 4:
        raise ValueError(f"x must be at least 4 x 4 pixels, got {tuple(x.shape[2:])}")
    widths = (x.shape[1], dim // 4, dim // 2, dim // 2)
    weights = []
    for layer, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
        flat = normal(seed, Stream.INIT, torch.tensor([layer]), fan_out * fan_in * 9)
        weights.append(flat.view(fan_out, fan_in, 3, 3) * math.sqrt(2.0 / (9 * fan_in)))
    features = []
    with torch.no_grad():
        # In float32 and in chunks: the maps of all images at once would be gigabytes.
        for chunk in x.detach().to("cpu", torch.float32).split(_CHUNK):
            for weight, stride in zip(weights, (1, 2, 2), strict=True):
                chunk = F.conv2d(chunk, weight, stride=stride, padding=1).relu()
            maps = chunk.flatten(2).to(torch.float64)
            features.append(torch.cat([maps.mean(2), maps.std(2, correction=0)], dim=1))
    return torch.cat(features)


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooled_pixels": pooled_pixels,
    "random_conv": random_conv_features,
}
