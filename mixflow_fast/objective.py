"""The training objective: flow matching with slowed interpolation (MixFlow, arXiv 2512.19311).

    t ~ Beta(2, 1),   m ~ U[(1 - gamma) t, t],   x_m = alpha_m x1 + sigma_m x0
    u* = d_alpha_m x1 + d_sigma_m x0
    loss = mean over elements of | net(x_m, t, y) - u*(x_m, m) |^2

The network is told t and is shown x_m, which is noisier: it learns to correct the inputs that a
sampler's own errors will feed it. gamma = 0 with uniform t is plain flow matching, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, check_clock, engine_times
from mixflow_fast.flow.path import LOSS_WEIGHTS, PREDICTIONS, get_path, per_sample
from mixflow_fast.flow.timesteps import TimeLaw, shift_time, slow_time
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream

INTERVALS = ("shifted", "raw", "full")
TARGETS_AT = ("slowed", "label")
IMPLS = ("auto", "triton", "reference")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Interpolation:
    """What `MixFlow.prepare` made of a batch.

    Attributes:
        x: (B, ...) the network's input x_m, dtype of x1.
        t: (B,) label time for the network, caller's clock, float32.
        slowed_t: (B,) time m at which x was interpolated, caller's clock, float32.
        x1: (B, ...) the data, as given.
        ids: (B,) int64 positions the draws were keyed by; None when nothing was drawn.
    """

    x: Tensor
    t: Tensor
    slowed_t: Tensor
    x1: Tensor
    ids: Tensor | None
    _x0: Tensor

    def x0(self) -> Tensor:
        """(B, ...) the noise end of the path: float32 (float64 for float64 data) or as given."""
        return self._x0


class MixFlow:
    """Slowed interpolation as two calls around your network: `prepare`, then `loss`.

    Args:
        gamma: slowing range in [0, 1]. The paper's default is 0.8 (SiT), 0.4 for RAE.
        clock: required. "data_at_1" (SiT, LightningDiT, the paper) or "noise_at_1" (REPA, RAE,
            SD3, Flux): which end of the network's own time is data.
        path: "linear", "gvp" or "vp".
        timesteps: law of the label: "beta21" (paper), "uniform", "logit-normal" or
            "logit-normal(mu, sigma)" with mu in the caller's clock.
        shift: RAE's time shift k >= 1, applied to the label before slowing.
        prediction: what the network returns: "velocity" (d x / d t in the caller's clock),
            "noise" (x0), "data" (x1) or "score" (of x at its time).
        target_at: "slowed" takes velocity target, score scale and loss weight at m (paper),
            "label" at t (the published patch). They differ off the linear path, and for scores
            and weighted losses.
        loss_weight: None, "velocity" or "likelihood": SiT's weights of noise and score losses.
        source: law of the noise end; None is N(0, I), the only one in this version.
        seed: of the counter-based draws, in [0, 2**64).
        impl: "reference" is plain PyTorch; "auto" picks the fastest that is there (in this
            version always the reference).
        interval: "shifted" slows in shifted time (RAE's published patch), "raw" slows before the
            shift and shifts both times, "full" draws m ~ U[0, 1] whatever the label is (the
            paper's ablation; gamma is not used).

    Raises:
        ValueError: for any argument outside these, saying what is expected.
    """

    def __init__(
        self,
        gamma: float = 0.8,
        clock: str | None = None,
        path: str = "linear",
        timesteps: str = "beta21",
        shift: float = 1.0,
        prediction: str = "velocity",
        target_at: str = "slowed",
        loss_weight: str | None = None,
        source: object | None = None,
        seed: int = 0,
        impl: str = "auto",
        interval: str = "shifted",
    ) -> None:
        if not isinstance(gamma, Real) or isinstance(gamma, bool) or not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be a number in [0, 1], got {gamma!r}")
        if not isinstance(shift, Real) or isinstance(shift, bool) or not 1 <= shift < math.inf:
            raise ValueError(
                f"shift must be a number >= 1 (RAE: sqrt(C*h*w / 4096)), got {shift!r}"
            )
        _check_choice("prediction", prediction, PREDICTIONS)
        _check_choice("target_at", target_at, TARGETS_AT)
        _check_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
        _check_choice("interval", interval, INTERVALS)
        _check_choice("impl", impl, IMPLS)
        if impl == "triton":
            raise ValueError(
                'impl="triton" is not in this version: use impl="auto" or impl="reference"'
            )
        if loss_weight is not None and prediction not in ("noise", "score"):
            raise ValueError(
                f'loss_weight={loss_weight!r} is defined for prediction="noise" and "score" '
                f"(SiT), got prediction={prediction!r}: use loss_weight=None"
            )
        if source is not None:
            raise ValueError(
                "source must be None (standard Gaussian noise): mixed sources are not in this "
                f"version, got {source!r}"
            )
        self.seed = philox.check_seed(seed)
        self.clock = check_clock(clock)
        self.path = get_path(path)
        self.low, self.high = self.path.train_bounds(prediction)
        self.gamma = float(gamma)
        self.shift = float(shift)
        # The label keeps off the ends after the shift, so the law is cut where that comes from.
        low, high = (shift_time(b, 1 / self.shift, DATA_AT_1) for b in (self.low, self.high))
        self.timesteps = TimeLaw.parse(timesteps, self.clock, low, high)
        self.prediction = prediction
        self.target_at = target_at
        self.loss_weight = loss_weight
        self.interval = interval
        self._counters: dict[torch.device, Tensor] = {}

    def prepare(
        self,
        x1: Tensor,
        ids: Tensor | None = None,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        slowed_t: Tensor | None = None,
    ) -> Interpolation:
        """Draw (or take) t, m and x0, and interpolate. Nothing here needs a gradient.

        Args:
            x1: (B, ...) data in float32, bf16, fp16 or float64.
            ids: (B,) int64 global positions of the examples. The draws are functions of
                (seed, ids) alone. Left out: a counter that starts at 0 in every process and goes
                on with every call, spread over the ranks of an initialised process group.
            x0: (B, ...) noise, used exactly.
            t: (B,) label times in the caller's clock, used exactly: no shift is applied to them.
            slowed_t: (B,) times m in the caller's clock, used exactly.

        Returns:
            `Interpolation`; arithmetic and times are float32 (given times keep float64 for
            float64 data).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, times outside [0, 1] (checked
                where the tensor is on the CPU: no device is made to wait).
        """
        if x1.dim() < 2 or not x1.is_floating_point():
            raise ValueError(
                "x1 must be a floating-point tensor (B, ...), got "
                f"shape {tuple(x1.shape)} and dtype {x1.dtype}"
            )
        x1 = x1.detach()
        drawn = None in (x0, t, slowed_t)
        if drawn or ids is not None:
            ids = _next_ids(self._counters, x1) if ids is None else _check_ids(ids, x1)
        if t is None:
            t, m = self._draw_times(ids)
        else:
            t = _check_times("t", t, x1)
            m = None
        if slowed_t is not None:
            m = _check_times("slowed_t", slowed_t, x1)
        elif m is None:
            m = self._slow(t, ids)
        compute = torch.float64 if x1.dtype == torch.float64 else torch.float32
        if x0 is None:
            x0 = philox.normal(self.seed, Stream.NOISE, ids, x1[0].numel() if len(x1) else 0)
            x0 = x0.view(x1.shape).to(compute)
        elif x0.shape != x1.shape or x0.device != x1.device or not x0.is_floating_point():
            raise ValueError(
                f"x0 must be like x1, shape {tuple(x1.shape)} on {x1.device}, got "
                f"{tuple(x0.shape)} {x0.dtype} on {x0.device}"
            )
        x0 = x0.detach()
        times = engine_times(m.to(compute), self.clock)
        x = self.path.interpolate(x1.to(compute), x0.to(compute), *times).to(x1.dtype)
        return Interpolation(x=x, t=t, slowed_t=m, x1=x1, ids=ids, _x0=x0)

    def loss(
        self,
        pred: Tensor,
        it: Interpolation,
        weight: Tensor | float | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """The mean squared error of the prediction, per sample or reduced.

        Args:
            pred: (B, ...) the network's output for `it.x`, `it.t`; shape of x1.
            it: what `prepare` returned.
            weight: a number, (B,) per sample, or broadcastable to x1's shape per element;
                multiplies the squared error, and the mean still divides by the count.
            reduction: "none" -> (B,) float32, "sum" over the batch, "mean" over the batch. Each
                sample's loss is the mean over its elements.

        Returns:
            float32 (float64 for float64 data).
        """
        _check_choice("reduction", reduction, REDUCTIONS)
        _check_prediction(pred)
        if pred.shape != it.x1.shape:
            hint = ""
            if pred.dim() > 1 and pred.shape[1] == 2 * it.x1.shape[1]:
                hint = f": for a learn_sigma head pass its first half, pred[:, :{it.x1.shape[1]}]"
            raise ValueError(
                f"pred must have x1's shape {tuple(it.x1.shape)}, got {tuple(pred.shape)}{hint}"
            )
        compute = torch.float64 if it.x1.dtype == torch.float64 else torch.float32
        x1, x0, pred = it.x1.to(compute), it.x0().to(compute), pred.to(compute)
        label = it.t if self.target_at == "label" else it.slowed_t
        times = engine_times(label.to(compute), self.clock)
        error = self._error(pred, x1, x0, times) ** 2
        if self.loss_weight is not None:
            error = per_sample(self.path.loss_weight(self.loss_weight, *times), error) * error
        if weight is not None:
            error = _check_weight(weight, error) * error
        losses = error.flatten(1).mean(dim=1)
        if reduction == "none":
            return losses
        return losses.sum() if reduction == "sum" else losses.mean()

    def _error(self, pred: Tensor, x1: Tensor, x0: Tensor, times: tuple[Tensor, Tensor]) -> Tensor:
        if self.prediction == "velocity":
            target = self.path.velocity(x1, x0, *times)
            return pred - target if self.clock == DATA_AT_1 else pred + target
        if self.prediction == "noise":
            return pred - x0
        if self.prediction == "data":
            return pred - x1
        # The score -x0 / sigma explodes at the data end; sigma times it does not (SiT).
        return pred * per_sample(self.path.coefficients(*times).sigma, pred) + x0

    def _draw_times(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Label times and, where slowing comes before the shift, slowed times; caller's clock."""
        raw = self.timesteps.quantile(philox.uniform(self.seed, Stream.TIME, ids)[:, 0])
        raw = engine_times(raw, self.clock)[0]
        t = shift_time(raw, self.shift, self.clock)
        if self.interval != "raw":
            return t, None
        m = slow_time(raw, self._uniform_slowing(ids), self.gamma, self.clock)
        return t, self._within_bounds(shift_time(m, self.shift, self.clock), t)

    def _slow(self, t: Tensor, ids: Tensor) -> Tensor:
        if self.interval == "full":
            m = self._uniform_slowing(ids).clamp(self.low, self.high)
            return engine_times(m, self.clock)[0]
        if self.gamma == 0:
            return t
        v = self._uniform_slowing(ids)
        if self.interval == "shifted":
            return self._within_bounds(slow_time(t, v, self.gamma, self.clock), t)
        # A label that was given is a shifted one: slow it in raw time, then shift back.
        raw = shift_time(t, 1 / self.shift, self.clock)
        m = shift_time(slow_time(raw, v, self.gamma, self.clock), self.shift, self.clock)
        return self._within_bounds(m, t)

    def _uniform_slowing(self, ids: Tensor) -> Tensor:
        return philox.uniform(self.seed, Stream.SLOWING, ids)[:, 0]

    def _within_bounds(self, m: Tensor, t: Tensor) -> Tensor:
        """Keep m off the noise end where this path or prediction is singular, never beyond t."""
        if self.clock == DATA_AT_1:
            return torch.minimum(m.clamp(min=self.low), t)
        return torch.maximum(m.clamp(max=1 - self.low), t)


def mixflow_loss(
    net: Callable[..., Tensor],
    x1: Tensor,
    y: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    **options: object,
) -> Tensor:
    """`MixFlow(**options)`'s prepare, network and loss in one call.

    Args:
        net: called as net(x, t, y), or net(x, t) when y is None; returns the prediction.
        x1: (B, ...) data.
        y: (B,) labels or whatever the network takes.
        ids, x0, t, slowed_t: as `MixFlow.prepare`. Without ids each call draws afresh, from a
            counter per seed that starts at 0 in every process.
        weight, reduction: as `MixFlow.loss`.
        **options: as `MixFlow`: `gamma=0.8, clock="data_at_1", ...`; `clock` is required.

    Returns:
        the loss, float32.
    """
    try:
        mix = MixFlow(**options)
    except TypeError as error:
        raise ValueError(f"mixflow_loss: {error}") from None
    if ids is None and None in (x0, t, slowed_t):
        ids = _next_ids(_COUNTERS.setdefault(mix.seed, {}), x1)
    it = mix.prepare(x1, ids=ids, x0=x0, t=t, slowed_t=slowed_t)
    pred = net(it.x, it.t) if y is None else net(it.x, it.t, y)
    return mix.loss(pred, it, weight=weight, reduction=reduction)


# Samples that calls without ids have drawn so far, by seed and device. Tensors, advanced in place:
# a compiled step would freeze a Python number, and draw the same noise at every call.
_COUNTERS: dict[int, dict[torch.device, Tensor]] = {}


def _next_ids(counters: dict[torch.device, Tensor], x1: Tensor) -> Tensor:
    """Positions that no rank has used before, (B,) int64; no device sync."""
    rank, world = 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if x1.device not in counters:
        counters[x1.device] = torch.zeros((), dtype=torch.int64, device=x1.device)
    counter = counters[x1.device]
    # Interleaved, so that ranks with batches of different sizes do not meet.
    ids = (counter + torch.arange(len(x1), device=x1.device)) * world + rank
    counter.add_(len(x1))
    return ids


def _check_ids(ids: Tensor, x1: Tensor) -> Tensor:
    ids = torch.as_tensor(ids)
    if ids.shape != x1.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"ids must be (B,) = ({len(x1)},) integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    return ids.to(x1.device, torch.int64, non_blocking=True)


def _check_prediction(pred: object) -> None:
    if not isinstance(pred, Tensor):
        raise ValueError(
            f"the prediction must be one tensor, got {type(pred).__name__}: of a network with "
            "further outputs (REPA's projections) pass the prediction alone to MixFlow.loss"
        )


def _check_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _check_times(name: str, value: Tensor, x1: Tensor) -> Tensor:
    if (
        value.shape != x1.shape[:1]
        or value.device != x1.device
        or value.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"{name} must be (B,) = ({len(x1)},) float32 on {x1.device} (half-precision times "
            f"lose the noise level), got {tuple(value.shape)} {value.dtype} on {value.device}"
        )
    value = value.detach()
    if x1.dtype != torch.float64:
        value = value.to(torch.float32)
    checkable = value.device.type == "cpu" and not torch.compiler.is_compiling()
    if checkable and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {value.min().item():.6g} to "
            f"{value.max().item():.6g}: divide by 1000 if your times are 0..1000"
        )
    return value


def _check_weight(weight: Tensor | float, error: Tensor) -> Tensor:
    weight = torch.as_tensor(weight, device=error.device)
    if weight.dim() == 0:
        return weight.to(error.dtype)
    if weight.shape == error.shape[:1]:
        return per_sample(weight.to(error.dtype), error)
    fits = weight.dim() == error.dim() and all(
        w in (1, e) for w, e in zip(weight.shape, error.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"weight must be (B,) = ({len(error)},) or broadcast to {tuple(error.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    return weight.to(error.dtype)
