"""What all noise ends of a training are together, and samples that begin there.

A source that sees the image draws x0 from q(x0 | x1), and a network is trained on the aggregate of
q over all images; samples begin at N(0, I), which is something else where q's mean follows the
images. Its mean and covariance, of each class, follow from the predictor's moments without a draw:

    mean = E[w] E[mu]        E[x0 x0'] = E[w^2] E[mu mu'] + diag(1 - E[w] + E[w] E[exp(log_var)])

(mode "moments"). A Gaussian with these moments needs the training images once and no predictor
afterwards: it says how much of an arm's distance comes from where it is sampled from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixflow_fast.data import Dataset, sample_index
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.models.weights.sources import load_source

IMAGES = 8000
_BATCH = 500
# Mean and mean square of the weight w.
_WEIGHT_MOMENTS = {"uniform": (1 / 2, 1 / 3)}


@dataclass(frozen=True)
class Aggregate:
    """The Gaussian with the moments of all noise ends, for each class.

    Attributes:
        mean: (K, D) float64.
        variances, directions: (K, D) and (K, D, D), eigenvalues and eigenvectors (columns) of the
            covariances.
    """

    mean: Tensor
    variances: Tensor
    directions: Tensor

    def begin(self, eps: Tensor, labels: Tensor) -> Tensor:
        """(B, ...) states with these moments from standard normal eps (B, ...) and labels (B,).

        By the symmetric root, so that they stay near eps where the aggregate is near N(0, I).
        """
        flat = eps.flatten(1).double()
        out = torch.empty_like(flat)
        for label in labels.unique().tolist():
            rows, v = labels == label, self.directions[label]
            out[rows] = ((flat[rows] @ v) * self.variances[label].sqrt()) @ v.T + self.mean[label]
        return out.view_as(eps).to(eps.dtype)

    @property
    def largest_variance(self) -> float:
        """In any direction, mean over classes; 1 for N(0, I)."""
        return float(self.variances[:, -1].mean())

    @property
    def w2_per_dim(self) -> float:
        """W2^2 to N(0, I) over the number of dimensions, mean over classes; 0 for N(0, I)."""
        gaps = self.mean.square().sum(1) + (self.variances.sqrt() - 1).square().sum(1)
        return float((gaps / self.mean.shape[1]).mean())


def aggregate_of(weights: Path, dataset: Dataset) -> Aggregate | None:
    """The aggregate of a finished training; None where the source is N(0, I).

    Args:
        weights: of the training.
        dataset: its images, with labels.
    """
    stored = load_source(weights)
    return None if stored is None else moments_of(stored.source, dataset)


@torch.inference_mode()
def moments_of(source: MixedSource, dataset: Dataset) -> Aggregate:
    """The aggregate of a source with kappa "data" in mode "moments" over images of a set."""
    w = source.w
    first, second = _WEIGHT_MOMENTS[w] if isinstance(w, str) else (w, w * w)
    index = sample_index(torch.arange(min(IMAGES, len(dataset))), len(dataset), seed=0)
    means, variances, labels = [], [], []
    for part in index.split(_BATCH):
        batch = dataset.get(part, part, 0)
        mean, log_var = source.moments(tuple(batch.x.shape), x1=batch.x)
        means.append(mean.flatten(1).double())
        variances.append(log_var.flatten(1).double().exp())
        labels.append(batch.y)
    mu, var, y = torch.cat(means), torch.cat(variances), torch.cat(labels)
    found = []
    for label in range(int(y.max()) + 1):
        own, spread = mu[y == label], var[y == label].mean(0)
        square = second * (own.T @ own) / len(own) + torch.diag(1 - first + first * spread)
        found.append((first * own.mean(0), square))
    return _of(found)


def gaussian_of_images(dataset: Dataset) -> Aggregate:
    """The Gaussian with the moments of the images themselves, for each class.

    Samples that begin at an aggregate know such moments before the network does anything: this is
    what they are worth without one.
    """
    index = sample_index(torch.arange(min(IMAGES, len(dataset))), len(dataset), seed=0)
    batch = dataset.get(index, index, 0)
    x, found = batch.x.flatten(1).double(), []
    for label in range(int(batch.y.max()) + 1):
        own = x[batch.y == label]
        found.append((own.mean(0), own.T @ own / len(own)))
    return _of(found)


def _of(moments: Sequence[tuple[Tensor, Tensor]]) -> Aggregate:
    """From mean (D,) and second moment (D, D) of each class."""
    mean = torch.stack([one for one, _ in moments])
    covs = [square - torch.outer(one, one) for one, square in moments]
    values, vectors = torch.linalg.eigh(torch.stack(covs))
    return Aggregate(mean, values.clamp(min=0), vectors)
