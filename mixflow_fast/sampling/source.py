"""Where generated samples begin: N(0, I), or the source that a network was trained with.

A mixed source (`flow/source.py`) is used where its signal kappa is known when samples are made:
the class, or a noise of its own. Where kappa contains the data, which are not known, they begin at
N(0, I), as published (arXiv 2604.09181); the predictor and w have no effect then.

    x0 = w mean + sqrt((1 - w) + w exp(log_var)) eps                  mode "moments"
    x0 = w (mean + exp(log_var / 2) eps1) + (1 - w) eps               mode "samples"

All draws are functions of (seed, id), in streams of their own: eps is the noise that samples begin
at without a source, so w = 0 gives its bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mixflow_fast.flow.source import MixedSource, StandardSource, mixed_moments, mixed_samples
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source.weights import draw_weight
from mixflow_fast.kernels.philox import Stream


@dataclass(frozen=True)
class SampleSource:
    """A mixed source that samples begin at; made by `sample_source`.

    Attributes:
        source: its predictor is on the device where samples are made.
        w: weight of the predicted Gaussian in [0, 1]; None draws it as in training.
    """

    source: MixedSource
    w: float | None = None

    def __post_init__(self) -> None:
        if self.source.needs_data:
            raise ValueError(
                f"a source with kappa={self.source.kappa!r} needs the data, which are not known "
                "when samples are made: leave it out, they begin at N(0, I)"
            )
        check_weight(self.w)

    def to_record(self) -> dict[str, str | float]:
        """What the samples depend on beside the predictor's weights; plain JSON values."""
        kind, w = self.source, self.source.w if self.w is None else float(self.w)
        return {"kind": "mixed", "kappa": kind.kappa, "mode": kind.mode, "w": w}

    def describe(self) -> str:
        """The source in words."""
        kind = self.source
        w = f"w {self.w:g}" if self.w is not None else f"w {kind.w}, as in training"
        return f"mixed source, kappa {kind.kappa}, mode {kind.mode}, {w}"


def sample_source(
    source: MixedSource | StandardSource | None, w: float | None = None
) -> SampleSource | None:
    """The source that samples of a network begin at; None where that is N(0, I).

    Args:
        source: that the network was trained with.
        w: weight of the predicted Gaussian in [0, 1]; None draws it as in training.

    Raises:
        ValueError: w where it would have no effect, or outside [0, 1].
    """
    if source is None or isinstance(source, StandardSource):
        if w is not None:
            raise ValueError(
                f"w = {w} has no effect on a network that was trained without a mixed source: its "
                "samples begin at N(0, I); leave w out"
            )
        return None
    if source.needs_data:
        if w is not None:
            raise ValueError(
                f"w = {w} has no effect: the source sees the data (kappa={source.kappa!r}), which "
                "are not known when samples are made, so they begin at N(0, I); leave w out"
            )
        return None
    return SampleSource(source, w)


def sampling_noise(
    source: MixedSource | StandardSource | None,
    seed: int,
    ids: Tensor,
    shape: tuple[int, ...],
    y: Tensor | None = None,
    w: float | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The states at t = 0 of generated samples: (B, *shape) float32.

    Args:
        source: that the network was trained with; None is N(0, I).
        seed: of all draws.
        ids: (B,) int64 >= 0 of the samples.
        shape: of one sample.
        y: (B,) int64 true classes, for kappa="class": what a source does not know is no label for
            it, so guidance's null class is not among them.
        w: weight of the predicted Gaussian, the same for all; None draws it as in training.
        device: of the result and of the predictor; None: that of the ids.

    Raises:
        ValueError: w without effect or outside [0, 1], classes that are missing or not one for each
            id, and what `MixedSource.moments` refuses.
    """
    used = sample_source(source, w)
    ids = ids if device is None else ids.to(device)
    eps = _normal(seed, Stream.SAMPLE_NOISE, ids, shape)
    if used is None:
        return eps
    z = _normal(seed, Stream.SAMPLE_SIGNAL, ids, shape) if used.source.needs_noise else None
    if used.source.needs_labels:
        y = _check_classes(y, ids).to(ids.device)
    mean, log_var = used.source.moments(tuple(eps.shape), y=y, z=z)
    if w is None:
        weight = draw_weight(used.source, seed, ids, Stream.SAMPLE_WEIGHT)
    else:
        weight = torch.full(ids.shape, float(w), device=ids.device)
    if used.source.mode == "moments":
        mixed_mean, std = mixed_moments(mean, log_var, weight)
        return mixed_mean + std * eps
    eps1 = _normal(seed, Stream.SAMPLE_SOURCE_NOISE, ids, shape)
    return mixed_samples(mean, log_var, weight, eps, eps1)


def check_weight(w: object) -> None:
    """Refuse a weight that is neither None nor a number in [0, 1]."""
    if w is None:
        return
    if not isinstance(w, Real) or isinstance(w, bool) or not 0 <= w <= 1:
        raise ValueError(
            f"w must be a number in [0, 1], or None to draw it as in training, got {w!r}"
        )


def _check_classes(y: Tensor | None, ids: Tensor) -> Tensor:
    if y is None or y.shape != ids.shape or y.is_floating_point() or y.dtype == torch.bool:
        got = "None" if y is None else f"{tuple(y.shape)} {y.dtype}"
        raise ValueError(
            f'a source with kappa="class" needs y, one whole class for each of {len(ids)} samples, '
            f"got {got}"
        )
    return y.to(torch.int64)


def _normal(seed: int, stream: Stream, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    return philox.normal(seed, stream, ids, math.prod(shape)).view(-1, *shape)
