"""Distribution of the noise end of the path: N(0, I), or a Gaussian conditioned on a signal kappa.

    q(x0 | kappa) = N(mean(kappa), diag(exp(log_var(kappa))))
    mode "moments":  x0 = w mean + sqrt((1 - w) + w exp(log_var)) eps
    mode "samples":  x0 = w (mean + exp(log_var / 2) eps1) + (1 - w) eps
    loss = velocity loss + lam KL / D = velocity loss + beta KL,   KL of q, unmixed, from N(0, I)

w = 0 is N(0, I) and w = 1 is q. A source that knows kappa straightens the paths, and mixing with
N(0, I) lets a sampler start from N(0, I) where kappa is unknown (MixFlow with kappa-FC, arXiv
2604.09181). Pure formulas: the draws belong to the objective.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from mixflow_fast.flow.path import per_sample

Kappa = Literal["data", "class", "noise", "data+noise"]
KAPPAS = get_args(Kappa)
SourceMode = Literal["moments", "samples"]
SOURCE_MODES = get_args(SourceMode)

# Beyond it the exponential of a log-variance is no float32.
_LARGEST_LOG_VAR = 80.0
_MOST_WEIGHTS = 2**20


class StandardSource:
    """N(0, I), the same as `source=None`."""

    def __repr__(self) -> str:
        return "StandardSource()"


class MixedSource:
    """A Gaussian whose moments a predictor makes of kappa, mixed with N(0, I) by a weight w.

    Args:
        predictor: called with kappa; returns (B, 2 C, ...) for data (B, C, ...), the mean and then
            the log-variance in its second dimension, or a pair of tensors in the data's shape. A
            module gets its input in the dtype of its parameters.
        kappa: "data" calls predictor(x1), "class" predictor(y), "noise" predictor(z) with
            z ~ N(0, I), "data+noise" predictor(cat([x1, z], 1)).
        mode: "moments" mixes mean and variance and draws once, as the published experiments do;
            "samples" mixes two draws, whose variance is smaller in between.
        w: weight of q for each sample: "uniform" in (0, 1), "discrete(n)" is k / n with k uniform
            in 0..n ("discrete": n = 1000), or a number in [0, 1]; 1 is pure forward coupling.
        lam: weight of the KL per dimension: loss = mse + lam KL / D. It has the same meaning at
            every resolution.
        beta: or the weight of the KL's sum, as published: loss = mse + beta KL. lam = beta D.
        log_var_range: the log-variance is clamped to it, and has no gradient outside.
        dropout: probability in [0, 1) that a training example has w = 0, whatever w was drawn: its
            noise end is plain noise, and the network learns those as well as the mixture.
        detach: the velocity loss sends no gradient to the source, which is then trained by its KL
            alone and becomes N(0, I): plain flow matching, by a longer way. For comparisons.

    Raises:
        ValueError: for any argument outside these, saying what is expected.
    """

    def __init__(
        self,
        predictor: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
        kappa: Kappa = "data",
        mode: SourceMode = "moments",
        w: str | float = "uniform",
        *,
        lam: float | None = None,
        beta: float | None = None,
        log_var_range: tuple[float, float] = (-12.0, 6.0),
        dropout: float = 0.0,
        detach: bool = False,
    ) -> None:
        if isinstance(predictor, type):
            raise ValueError(
                f"predictor must be a module, got the class {predictor.__name__}: make one of it, "
                "such as SourceUNet(channels=4)"
            )
        if not callable(predictor):
            raise ValueError(
                "predictor must be callable (a module that makes mean and log-variance of kappa), "
                f"got {type(predictor).__name__}"
            )
        if kappa not in KAPPAS:
            raise ValueError(f"kappa must be one of {KAPPAS}, got {kappa!r}")
        if mode not in SOURCE_MODES:
            raise ValueError(f"mode must be one of {SOURCE_MODES}, got {mode!r}")
        if (lam is None) == (beta is None):
            raise ValueError(
                "give exactly one of lam (weight of the KL per dimension) and beta (weight of its "
                f"sum; lam = beta D), got lam={lam!r} and beta={beta!r}"
            )
        self.predictor = predictor
        self.kappa = kappa
        self.mode = mode
        self.w = _check_w(w)
        self.lam = None if lam is None else _check_penalty("lam", lam)
        self.beta = None if beta is None else _check_penalty("beta", beta)
        self.log_var_range = _check_range(log_var_range)
        self.dropout = _check_dropout(dropout)
        self.detach = bool(detach)

    def __repr__(self) -> str:
        penalty = f"beta={self.beta}" if self.lam is None else f"lam={self.lam}"
        return f"MixedSource(kappa={self.kappa!r}, mode={self.mode!r}, w={self.w!r}, {penalty})"

    @property
    def needs_data(self) -> bool:
        """Whether kappa contains x1, which is unknown when samples are generated."""
        return self.kappa in ("data", "data+noise")

    @property
    def needs_labels(self) -> bool:
        """Whether kappa is the class."""
        return self.kappa == "class"

    @property
    def needs_noise(self) -> bool:
        """Whether kappa contains a noise of its own."""
        return self.kappa in ("noise", "data+noise")

    @property
    def frozen(self) -> bool:
        """Whether the predictor has parameters, none of which is trained: the KL is a constant."""
        flags = [parameter.requires_grad for parameter in _parameters(self.predictor)]
        return bool(flags) and not any(flags)

    @property
    def discrete(self) -> int:
        """n where w is k / n, else 0."""
        return _discrete(self.w) if isinstance(self.w, str) else 0

    def weights(self, numel: int) -> tuple[float, float]:
        """(lam, beta) for samples of `numel` elements."""
        if self.lam is not None:
            return self.lam, self.lam / numel
        return self.beta * numel, self.beta

    def kl_weight(self, numel: int) -> float:
        """Factor of a sample's KL in its loss: beta for samples of `numel`, 0 where frozen."""
        return 0.0 if self.frozen else self.weights(numel)[1]

    def moments(
        self,
        shape: tuple[int, ...],
        *,
        x1: Tensor | None = None,
        y: Tensor | None = None,
        z: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """Mean and clamped log-variance of q(x0 | kappa), each of `shape` in `dtype`.

        Args:
            shape: (B, C, ...) of the data.
            x1: (B, C, ...) data, y: (B,) int64 classes, z: (B, C, ...) standard normal numbers:
                those that kappa consists of; the others are not read.
            dtype: float32, or float64.

        Returns:
            with the graph to the predictor's parameters. A log-variance that is not finite comes
            out as NaN and is not clamped: it shows in the loss.

        Raises:
            ValueError: a part of kappa that is missing; a prediction of another shape or type.
        """
        mean, log_var = self.predict(shape, x1=x1, y=y, z=z, dtype=dtype)
        return self.bounded(mean, log_var, dtype)

    def predict(
        self,
        shape: tuple[int, ...],
        *,
        x1: Tensor | None = None,
        y: Tensor | None = None,
        z: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor | None]:
        """What the predictor makes of kappa, as it is: (mean, log-variance), or both in one tensor
        (B, 2 C, ...) and None. Arguments and errors as `moments`.
        """
        given = {"data": x1, "class": y, "noise": z}
        parts = [given[part] for part in self.kappa.split("+")]
        if any(part is None for part in parts):
            names = {"data": "x1", "class": "y", "noise": "z"}
            missing = [names[part] for part in self.kappa.split("+") if given[part] is None]
            raise ValueError(f"kappa={self.kappa!r} needs {' and '.join(missing)}, got None")
        kappa = parts[0] if len(parts) == 1 else torch.cat([p.to(dtype) for p in parts], dim=1)
        if kappa.is_floating_point():
            parameters = _parameters(self.predictor)
            own = [part.dtype for part in parameters if part.is_floating_point()]
            kappa = kappa.to(own[0] if own else dtype)
        return _checked(self.predictor(kappa), tuple(shape))

    def bounded(
        self, mean: Tensor, log_var: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """`moments` from what `predict` returned."""
        mean, log_var = halves(mean, log_var)
        return mean.to(dtype), bounded_log_var(log_var.to(dtype), self.log_var_range)


def halves(mean: Tensor, log_var: Tensor | None) -> tuple[Tensor, Tensor]:
    """(mean, log-variance), where None says that `mean` is both in its dimension 1."""
    return mean.chunk(2, dim=1) if log_var is None else (mean, log_var)


def bounded_log_var(log_var: Tensor, log_var_range: tuple[float, float]) -> Tensor:
    """Clamped, without a gradient outside; NaN where it is not finite."""
    low, high = log_var_range
    # Clamping would turn an overflow into a healthy number.
    return torch.where(log_var.isfinite(), log_var.clamp(low, high), math.nan)


def mixed_moments(mean: Tensor, log_var: Tensor, w: Tensor | float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of mode "moments": w mean, sqrt((1 - w) + w exp(log_var)).

    A sum of two positive numbers, which keeps its digits where the variance is small; 1 + w
    (exp(log_var) - 1) would not. It is exactly 1 for w = 0 and for log_var = 0.

    Args:
        mean, log_var: (B, ...).
        w: (B,) in [0, 1], or a number.
    """
    w = per_sample(w, mean) if isinstance(w, Tensor) else w
    return w * mean, torch.sqrt((1 - w) + w * torch.exp(log_var))


def mixed_samples(
    mean: Tensor, log_var: Tensor, w: Tensor | float, eps: Tensor, eps1: Tensor
) -> Tensor:
    """x0 of mode "samples": w (mean + exp(log_var / 2) eps1) + (1 - w) eps.

    Args:
        mean, log_var, eps, eps1: (B, ...).
        w: (B,) in [0, 1], or a number.
    """
    w = per_sample(w, mean) if isinstance(w, Tensor) else w
    return w * (mean + torch.exp(log_var / 2) * eps1) + (1 - w) * eps


def kl_per_sample(mean: Tensor, log_var: Tensor) -> Tensor:
    """(B,) KL divergence of N(mean, exp(log_var)) from N(0, I), summed over a sample's elements."""
    return 0.5 * (mean.square() + torch.expm1(log_var) - log_var).flatten(1).sum(dim=1)


def _checked(predicted: object, shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """What a predictor returned for data of `shape`, as `MixedSource.predict` returns it."""
    if isinstance(predicted, Tensor):
        expected = (shape[0], 2 * shape[1], *shape[2:])
        if tuple(predicted.shape) != expected or not predicted.is_floating_point():
            raise ValueError(
                f"the predictor of the source must return mean and log-variance, {expected} "
                f"floating-point numbers for data {shape}, got {tuple(predicted.shape)} "
                f"{predicted.dtype}"
            )
        return predicted, None
    pair = isinstance(predicted, tuple | list) and len(predicted) == 2
    if not pair or not all(isinstance(part, Tensor) for part in predicted):
        raise ValueError(
            "the predictor of the source must return one tensor (B, 2 C, ...) or the pair (mean, "
            f"log-variance), got {type(predicted).__name__}"
        )
    mean, log_var = predicted
    for name, part in (("mean", mean), ("log-variance", log_var)):
        if tuple(part.shape) != shape or not part.is_floating_point():
            raise ValueError(
                f"the predictor's {name} must be {shape} floating-point numbers, like the data, "
                f"got {tuple(part.shape)} {part.dtype}"
            )
    return mean, log_var


def _parameters(predictor: object) -> list[Tensor]:
    return list(predictor.parameters()) if isinstance(predictor, torch.nn.Module) else []


def _check_w(w: object) -> str | float:
    if isinstance(w, str):
        if w == "uniform":
            return w
        if 1 <= _discrete(w) <= _MOST_WEIGHTS:
            return f"discrete({_discrete(w)})"
    elif isinstance(w, Real) and not isinstance(w, bool) and 0 <= w <= 1:
        return float(w)
    raise ValueError(
        'w must be "uniform", "discrete", "discrete(n)" with n in 1..2**20, or a number in [0, 1], '
        f"got {w!r}"
    )


def _discrete(w: str) -> int:
    """n of "discrete(n)"; 0 where w is something else."""
    if w == "discrete":
        return 1000
    found = re.fullmatch(r"discrete\(\s*(\d{1,9})\s*\)", w)
    return int(found[1]) if found else 0


def _check_penalty(name: str, value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}")
    return float(value)


def _check_dropout(value: object) -> float:
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"dropout must be a number in [0, 1), got {value!r}")
    return float(value)


def _check_range(log_var_range: object) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in log_var_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not -_LARGEST_LOG_VAR <= low < 0 < high <= _LARGEST_LOG_VAR:
        raise ValueError(
            f"log_var_range must be two numbers around 0 in [-{_LARGEST_LOG_VAR:g}, "
            f"{_LARGEST_LOG_VAR:g}], got {log_var_range!r}"
        )
    return low, high
