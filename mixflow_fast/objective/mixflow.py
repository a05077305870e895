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
from typing import get_args

import torch
from torch import Tensor

from mixflow_fast.flow.clock import CLOCKS, check_clock
from mixflow_fast.flow.path import LOSS_WEIGHTS, PREDICTIONS, get_path
from mixflow_fast.flow.schedule import INTERVALS, Schedule, TargetAt
from mixflow_fast.flow.source import MixedSource, StandardSource
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import (
    Moments,
    interpolate,
    interpolate_reference,
    sample_moments,
)
from mixflow_fast.kernels.layout import from_tokens
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.velocity_loss.op import REDUCTIONS, velocity_loss
from mixflow_fast.kernels.velocity_loss.reference import reduce, velocity_loss_reference
from mixflow_fast.objective.checks import (
    check_choice,
    check_data,
    check_dtype,
    check_ids,
    check_noise,
    check_patch_size,
    check_prediction,
    check_slowing,
    check_strength,
    check_times,
    check_weight,
)
from mixflow_fast.objective.draws import draw_noise, next_ids, perturbed, seed_on
from mixflow_fast.objective.mixed import (
    SourceDraw,
    check_labels,
    check_source,
    mixed_interpolation,
    mixed_times,
)

# Counters of `mixflow_loss` calls without ids, by seed and device.
_COUNTERS: dict[int, dict[torch.device, Tensor]] = {}


@dataclass(frozen=True)
class Interpolation:
    """The result of `MixFlow.prepare`: a batch as the network sees it, and the loss needs it.

    Attributes:
        x: the network's input x_m in the dtype of x1, or the one asked for: (B, ...), or
            (B, N, p p C) tokens.
        t: (B,) time for the network, caller's clock, float32.
        slowed_t: (B,) time m at which x was interpolated, caller's clock, float32.
        data: the (B, ...) data or `Moments`, as given.
        ids: (B,) int64 positions that the draws are keyed by; None when nothing was drawn.
        source: what a mixed source gave, else None. x and `x0()` then carry the graph to its
            predictor.
    """

    x: Tensor
    t: Tensor
    slowed_t: Tensor
    data: Tensor | Moments
    ids: Tensor | None
    _x0: Tensor | None
    _seed: Tensor
    _impl: str
    _made_by: tuple[str, str]  # clock and path
    _versions: tuple[int, ...]  # change counts of the tensors that the loss reads, too
    source: SourceDraw | None = None

    @property
    def x1(self) -> Tensor:
        """(B, ...) the data end of the path: as given, or the posterior sample, float32."""
        if isinstance(self.data, Moments):
            return sample_moments(self.data, self._seed, self.ids, self._impl)
        return self.data

    def x0(self) -> Tensor:
        """(B, ...) the noise end: as given, or float32 (float64 for float64 data).

        The Triton kernels never store it: each call recomputes it, bit for bit what they used.
        """
        if self._x0 is not None:
            return self._x0
        like = self.data.mean if isinstance(self.data, Moments) else self.data
        return draw_noise(self._seed, self.ids, like, self._impl, Stream.NOISE)


class MixFlow:
    """Slowed interpolation as two calls around your network: `prepare`, then `loss`.

    Args:
        gamma: slowing range in [0, 1]. The paper's default is 0.8 (SiT), 0.4 for RAE.
        clock: required. "data_at_1" (SiT, LightningDiT, the paper) or "noise_at_1" (REPA, RAE,
            SD3, Flux): which end of the network's own time is data.
        path: "linear", "gvp" or "vp".
        timesteps: distribution of t: "beta21" (paper), "uniform", "logit-normal" or
            "logit-normal(mu, sigma)" with mu in the caller's clock.
        shift: RAE's time shift k >= 1, applied to t before slowing.
        prediction: what the network returns: "velocity" (d x / d t in the caller's clock),
            "noise" (x0), "data" (x1) or "score" (of x at its time).
        target_at: "slowed" takes velocity target, score scale and loss weight at m (paper),
            "label" at t (the published patch). They differ off the linear path, and for scores
            and weighted losses.
        loss_weight: None, "velocity" or "likelihood": SiT's weights of noise and score losses.
        source: distribution of the noise end: None or `StandardSource()` is N(0, I), a
            `MixedSource` (`flow.source`) has a predictor, trained along by the same loss.
        seed: of the counter-based draws, in [0, 2**64).
        impl: "reference" is plain PyTorch; "triton" the fused kernels; "auto" takes the kernels
            on CUDA devices (float32, bf16, fp16; Triton installed) and else the reference.
        input_perturbation: g >= 0 adds noise to the input, as if x0 were x0 + g xi, and leaves
            the target (Ning et al. 2023: 0.1). Not where `prepare` is given x0.
        interval: "shifted" slows in shifted time (RAE's published patch), "raw" slows before the
            shift and shifts both times, "full" draws m ~ U[0, 1] whatever t is (the paper's
            ablation; gamma is not used).

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
        source: StandardSource | MixedSource | None = None,
        seed: int = 0,
        impl: str = "auto",
        interval: str = "shifted",
        input_perturbation: float = 0.0,
    ) -> None:
        if not isinstance(gamma, Real) or isinstance(gamma, bool) or not 0 <= gamma <= 1:
            raise ValueError(f"gamma must be a number in [0, 1], got {gamma!r}")
        if not isinstance(shift, Real) or isinstance(shift, bool) or not 1 <= shift < math.inf:
            raise ValueError(
                f"shift must be a number >= 1 (RAE: sqrt(C*h*w / 4096)), got {shift!r}"
            )
        check_strength(input_perturbation)
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("target_at", target_at, get_args(TargetAt))
        check_choice("loss_weight", loss_weight, LOSS_WEIGHTS)
        check_choice("interval", interval, INTERVALS)
        check_choice("impl", impl, runtime.IMPLS)
        if loss_weight is not None and prediction not in ("noise", "score"):
            raise ValueError(
                f'loss_weight={loss_weight!r} is defined for prediction="noise" and "score" '
                f"(SiT), got prediction={prediction!r}: use loss_weight=None"
            )
        self.seed = philox.check_seed(seed)
        self.clock = check_clock(clock)
        self.path = get_path(path)
        bounds = self.path.train_bounds(prediction)
        self.schedule = Schedule.of(
            self.clock, timesteps, float(gamma), float(shift), interval, bounds
        )
        self.source = check_source(source, self.schedule, prediction)
        self.prediction = prediction
        self.target_at = target_at
        self.loss_weight = loss_weight
        self.impl = impl
        self.input_perturbation = float(input_perturbation)
        self._counters: dict[torch.device, Tensor] = {}

    @property
    def gamma(self) -> float:
        """Slowing range."""
        return self.schedule.gamma

    @property
    def shift(self) -> float:
        """Time shift k."""
        return self.schedule.shift

    def prepare(
        self,
        x1: Tensor | Moments,
        ids: Tensor | None = None,
        x0: Tensor | None = None,
        t: Tensor | None = None,
        slowed_t: Tensor | None = None,
        patch_size: int | None = None,
        dtype: torch.dtype | None = None,
        y: Tensor | None = None,
    ) -> Interpolation:
        """Draw (or take) t, m and x0, and interpolate.

        Nothing here needs a gradient but a mixed source, whose predictor is called here.

        Args:
            x1: (B, ...) data in float32, bf16, fp16 or float64, or the `Moments` of an
                autoencoder's posterior, which is then sampled at `ids`.
            ids: (B,) int64 global positions of the examples. The draws are functions of
                (seed, ids) alone. The loss recomputes the noise from them: the tensor must not
                change in place before the backward pass is done. Left out: a counter that starts
                at 0 in every process and goes on with every call, spread over the ranks of an
                initialised process group; in a worker of a DataLoader it starts at the worker's
                seed, and says so. On a GPU such calls belong on one stream, which advances it.
            x0: (B, ...) noise, used exactly. Not beside a mixed source, which makes it.
            t: (B,) times of the network, caller's clock, used exactly: no shift is applied.
            slowed_t: (B,) times m in the caller's clock, used exactly; beside a given t at least
                as noisy, unless interval="full".
            patch_size: p writes x as tokens (B, H/p W/p, p p C), features in the order (row in
                the patch, column, channel), for (B, C, H, W) data; None keeps x1's shape.
            dtype: floating-point type of x, for a network that computes in another one than x1 is
                stored in: x is rounded once. None is that of x1.
            y: (B,) integer classes for a mixed source with kappa="class", without label dropout;
                no other source reads it.

        Returns:
            `Interpolation`; arithmetic and times are float32 (given times keep float64 for
            float64 data).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit; tensors that require a gradient;
                times outside [0, 1] or slowed to the clean side (checked where the tensor is on
                the CPU: no device is made to wait); impl="triton" where it cannot run.
        """
        x1, like = check_data(x1)
        dtype = check_dtype(dtype)
        kernels = runtime.use_kernels(self.impl, like.device, like.dtype, dtype or like.dtype)
        drawn = isinstance(x1, Moments) or None in (x0, t, slowed_t)
        if drawn or ids is not None:
            ids = next_ids(self._counters, like) if ids is None else check_ids(ids, like)
        t = None if t is None else check_times("t", t, like)
        slowed_t = None if slowed_t is None else check_times("slowed_t", slowed_t, like)
        if t is not None and slowed_t is not None and self.schedule.interval != "full":
            check_slowing(t, slowed_t, self.clock)
        if self.source is not None and x0 is not None:
            raise ValueError(
                "x0 must not be given beside a mixed source, which makes the noise end itself: "
                "leave x0 out, or use MixFlow(source=None)"
            )
        x0 = None if x0 is None else check_noise(x0, like)
        patch_size = check_patch_size(patch_size, like)
        seed, path = seed_on(self.seed, like.device), self.path.name
        perturb = self.input_perturbation > 0 and x0 is None
        draw = None
        # A kernel's loss gives its gradient to x0 in a velocity's target alone.
        kernels = kernels and (self.source is None or self.prediction == "velocity")
        impl = "triton" if kernels else "reference"
        if self.source is not None:
            end = sample_moments(x1, seed, ids, impl) if isinstance(x1, Moments) else x1
            y = check_labels(y, like) if self.source.needs_labels else None
            t, slowed_t = mixed_times(self.schedule, path, like, seed, ids, t, slowed_t, impl)
            x, x0, draw = mixed_interpolation(
                self.source,
                end,
                y,
                seed,
                ids,
                slowed_t,
                clock=self.clock,
                path=path,
                patch_size=patch_size,
                dtype=dtype or like.dtype,
                impl=impl,
            )
        elif kernels:
            x, t, slowed_t = interpolate(
                x1, self.schedule, path, seed, ids, x0, t, slowed_t, patch_size, "triton", dtype
            )
        else:
            # Kept in the result, where the loss finds it: only kernels are faster without.
            if x0 is None:
                x0 = draw_noise(seed, ids, like, "reference", Stream.NOISE)
            x, t, slowed_t = interpolate_reference(
                x1, self.schedule, path, seed, ids, x0, t, slowed_t, patch_size, dtype
            )
        if perturb:
            xi = draw_noise(seed, ids, like, impl, Stream.PERTURBATION)
            strength = self.input_perturbation
            x = perturbed(x, strength, self.path, self.clock, slowed_t, xi, patch_size)
        made_by = self.clock, path
        versions = _versions(x1, ids)
        return Interpolation(x, t, slowed_t, x1, ids, x0, seed, impl, made_by, versions, draw)

    def loss(
        self,
        pred: Tensor,
        it: Interpolation,
        weight: Tensor | float | None = None,
        reduction: str = "mean",
        learn_sigma: bool = False,
    ) -> Tensor:
        """The mean squared error of the prediction, per sample or reduced.

        With a mixed source that is not frozen each sample's loss has its KL on top: + lam KL / D.

        Args:
            pred: the network's output for `it.x`, `it.t`: (B, ...) in x1's shape, or tokens
                (B, N, p p C) of (B, C, H, W) data, features as `prepare` writes them.
            it: what `prepare` returned.
            weight: a number, (B,) per sample, or broadcastable to x1's shape per element;
                multiplies the squared error alone, and the mean still divides by the count.
            reduction: "none" -> (B,) float32, "sum" over the batch, "mean" over the batch. Each
                sample's loss is the mean over its elements.
            learn_sigma: pred has twice the channels of x1; the second half is not used and its
                gradient is zero.

        Returns:
            float32 (float64 for float64 data).

        Raises:
            ValueError: shapes, dtypes or devices that do not fit, an empty batch with "mean".
        """
        return self.loss_and_samples(pred, it, weight, reduction, learn_sigma)[0]

    def loss_and_samples(
        self,
        pred: Tensor,
        it: Interpolation,
        weight: Tensor | float | None = None,
        reduction: str = "mean",
        learn_sigma: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """`loss`, and the losses of the samples that it is made of, in the same pass.

        Arguments and errors as `loss`.

        Returns:
            (loss, (B,) losses of the samples without a gradient), each with the bits that `loss`
            gives.
        """
        check_choice("reduction", reduction, REDUCTIONS)
        self._check_interpolation(it)
        like = it.data.mean if isinstance(it.data, Moments) else it.data
        patch_size = check_prediction(pred, like, learn_sigma)
        if not len(like) and reduction == "mean":
            raise ValueError(
                'the batch is empty, so reduction="mean" has no value: use "sum" or "none"'
            )
        weight = None if weight is None else check_weight(weight, like)
        times = it.t if self.target_at == "label" else it.slowed_t
        options = dict(
            clock=self.clock,
            path=self.path.name,
            prediction=self.prediction,
            loss_weight=self.loss_weight,
            weight=weight,
        )
        # Where the reference made the input, its noise is stored, and the reference takes the loss.
        kernels = it._impl == "triton" and not _transformed()
        if kernels and runtime.use_kernels(self.impl, pred.device, pred.dtype):
            loss, samples = velocity_loss(
                pred,
                it.data,
                times,
                it._seed,
                it.ids,
                x0=it._x0,
                learn_sigma=learn_sigma,
                patch_size=patch_size,
                reduction=reduction,
                impl="triton",
                **options,
            )
            samples = loss.detach() if reduction == "none" else samples
            if it.source is not None and it.source.kl_weight:
                kl = it.source.kl_weight * it.source.kl
                return loss + reduce(kl, reduction), samples + kl.detach()
            return loss, samples
        if patch_size:
            pred = from_tokens(pred, like.shape, patch_size)
        if learn_sigma:
            pred = pred[:, : like.shape[1]]
        samples = velocity_loss_reference(pred, it.x1, it.x0(), times, reduction="none", **options)
        if it.source is not None and it.source.kl_weight:
            samples = samples + it.source.kl_weight * it.source.kl
        return reduce(samples, reduction), samples.detach()

    def _check_interpolation(self, it: object) -> None:
        if not isinstance(it, Interpolation):
            raise ValueError(f"it must be what prepare returned, got {type(it).__name__}")
        if it._made_by != (self.clock, self.path.name):
            raise ValueError(
                f"it was prepared for clock and path {it._made_by}, this MixFlow has "
                f"{(self.clock, self.path.name)}: take the loss with the MixFlow that prepared it"
            )
        # The loss would take another target or other noise than the input was made of.
        now = _versions(it.data, it.ids)
        if it._versions and now and it._versions != now:
            raise ValueError(
                "x1 or ids changed in place between prepare and loss, which reads them too: "
                "change them after the backward pass, or pass clones to prepare"
            )


def mixflow_loss(
    net: Callable[..., Tensor],
    x1: Tensor | Moments,
    y: Tensor | None = None,
    *,
    ids: Tensor | None = None,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    slowed_t: Tensor | None = None,
    weight: Tensor | float | None = None,
    reduction: str = "mean",
    patch_size: int | None = None,
    learn_sigma: bool = False,
    **options: object,
) -> Tensor:
    """`MixFlow(**options)`, its `prepare`, the network and the loss in one call.

    Args:
        net: called as net(x, t, y), or net(x, t) when y is None; returns the prediction.
        x1: (B, ...) data, or its `Moments`.
        y: (B,) labels or whatever the network takes; a source with kappa="class" takes them, too.
        ids, x0, t, slowed_t: as `MixFlow.prepare`. Without ids each call draws afresh, from a
            counter per seed that starts at 0 in every process.
        weight, reduction, learn_sigma: as `MixFlow.loss`.
        patch_size: as `MixFlow.prepare`.
        **options: as `MixFlow`: `gamma=0.8, clock="data_at_1", ...`; `clock` is required.

    Returns:
        the loss, float32.

    Raises:
        ValueError: as `MixFlow`; and a network whose own `clock` attribute says otherwise (this
            library's models carry one).
    """
    try:
        mix = MixFlow(**options)
    except TypeError as error:
        raise ValueError(f"mixflow_loss: {error}") from None
    # The wrong clock trains without an error, so it is refused where it can be seen.
    own = getattr(net, "clock", None)
    if own in CLOCKS and own != mix.clock:
        raise ValueError(f"clock must be the network's own, {own!r}, got {mix.clock!r}")
    x1, like = check_data(x1)
    if ids is None and (isinstance(x1, Moments) or None in (x0, t, slowed_t)):
        # From the module's counter: that of `mix` would start at 0 in every call.
        ids = next_ids(_COUNTERS.setdefault(mix.seed, {}), like)
    it = mix.prepare(x1, ids=ids, x0=x0, t=t, slowed_t=slowed_t, patch_size=patch_size, y=y)
    pred = net(it.x, it.t) if y is None else net(it.x, it.t, y)
    return mix.loss(pred, it, weight=weight, reduction=reduction, learn_sigma=learn_sigma)


def _transformed() -> bool:
    """Whether functorch or forward-mode differentiation is at work: the reference serves them."""
    if torch.compiler.is_compiling():
        return False
    forward = torch.autograd.forward_ad._current_level >= 0
    return forward or torch._C._functorch.peek_interpreter_stack() is not None


def _versions(x1: Tensor | Moments, ids: Tensor | None) -> tuple[int, ...]:
    """Counts of changes in place; none where they are not kept."""
    tensors = [x1.mean, x1.std] if isinstance(x1, Moments) else [x1]
    tensors += [] if ids is None else [ids]
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
        return ()
    return tuple(tensor._version for tensor in tensors)
