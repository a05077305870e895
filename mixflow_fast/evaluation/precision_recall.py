"""Improved precision and recall (Kynkaanniemi et al., arXiv 1904.06991), as ADM computes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mixflow_fast.evaluation.uncertainty import Estimate

NEIGHBOURS = 3
_BLOCK = 4096


class PrecisionRecall(NamedTuple):
    """Share of samples near the reference, and of the reference near samples."""

    precision: Estimate
    recall: Estimate


def precision_recall(
    features: np.ndarray,
    reference: np.ndarray,
    k: int = NEIGHBOURS,
    device: str | torch.device = "cpu",
) -> PrecisionRecall:
    """Precision and recall of features (N, d) against reference features (M, d).

    The radius of a point is the distance to its k-th nearest other point of its own set. A sample
    counts for precision if it is within the radius of any reference point, a reference point for
    recall if it is within the radius of any sample. Both depend on N and M.

    Squared distances are float32, taken after the reference's mean is subtracted, which keeps their
    digits; ADM's are float16 where those are finite. A sample's influence on recall is the share
    of the reference that no other sample covers (the jackknife's with radii as they are): it gives
    the standard error or, where recall is near 1, a larger one.

    Args:
        k: neighbours.
        device: where the distances are computed.

    Raises:
        ValueError: other shapes, no more than k rows, values that are not finite.
    """
    shapes = features.ndim == reference.ndim == 2 and features.shape[1] == reference.shape[1]
    if not shapes or min(len(features), len(reference)) <= k:
        raise ValueError(
            f"features and reference must be (N, d) and (M, d) with more than {k} rows, got "
            f"{features.shape} and {reference.shape}"
        )
    mean = reference.mean(axis=0, dtype=np.float64)
    mine, theirs = (
        # Copied into memory that PyTorch aligns: the bits of a product may depend on it.
        torch.tensor((x - mean).astype(np.float32), device=device)
        for x in (features, reference)
    )
    if not (mine.isfinite().all() and theirs.isfinite().all()):
        raise ValueError("features must be finite, got NaN or infinity")
    n, m = len(mine), len(theirs)
    my_radii, their_radii = _radii(mine, k), _radii(theirs, k)
    precise = torch.zeros(n, dtype=torch.bool, device=device)
    cover = torch.zeros(m, dtype=torch.int64, device=device)  # samples near each reference point
    last = torch.zeros(m, dtype=torch.int64, device=device)  # one of them
    for i in range(0, m, _BLOCK):
        rows = slice(i, i + _BLOCK)
        for j in range(0, n, _BLOCK):
            columns = slice(j, j + _BLOCK)
            distances = _squared_distances(theirs[rows], mine[columns])
            precise[columns] |= (distances <= their_radii[rows, None]).any(dim=0)
            near = distances <= my_radii[columns]
            cover[rows] += near.sum(dim=1)
            last[rows] = torch.where(near.any(dim=1), j + near.int().argmax(dim=1), last[rows])
    hits = precise.double().cpu().numpy()
    alone = torch.bincount(last[cover == 1], minlength=n).double().cpu().numpy() / m
    return PrecisionRecall(
        Estimate(float(hits.mean()), n, hits - hits.mean()),
        Estimate(float((cover > 0).double().mean()), n, (n - 1) * (alone - alone.mean())),
    )


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(len x, len y) float32, without TF32."""
    norms = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, (N,)."""
    found = []
    for i in range(0, len(x), _BLOCK):
        nearest = torch.empty(len(x[i : i + _BLOCK]), 0, device=x.device)
        for j in range(0, len(x), _BLOCK):
            distances = _squared_distances(x[i : i + _BLOCK], x[j : j + _BLOCK])
            if i == j:
                # The row itself, whose computed distance is rounding and not exactly zero.
                distances.fill_diagonal_(float("inf"))
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        found.append(nearest.max(dim=1).values)
    return torch.cat(found)
