"""Loss and gradient in plain PyTorch, which runs where kernels do not and defines their results.

Formulas stand in `op.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1, engine_times
from mixflow_fast.flow.path import get_path, per_sample
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.interpolate import Moments, sample_moments
from mixflow_fast.kernels.layout import from_tokens, to_tokens
from mixflow_fast.kernels.philox import Stream
from mixflow_fast.kernels.runtime import compute_dtype


def loss_shape(x1: Tensor, reduction: str) -> tuple[int, ...]:
    """One loss per sample, or one in all."""
    return (x1.shape[0],) if reduction == "none" else ()


def samples_shape(x1: Tensor, reduction: str) -> tuple[int, ...]:
    """Losses of the samples beside a sum or mean of them."""
    return (0,) if reduction == "none" else (x1.shape[0],)


def gradient_scale(x1: Tensor, reduction: str) -> float:
    """1 / E of the formula, also over the number of samples for the mean over the batch."""
    count = x1.shape[1:].numel() * (len(x1) if reduction == "mean" else 1)
    return 1.0 / max(count, 1)


def _errors(
    pred: Tensor, x1: Tensor, x0: Tensor, times: Tensor, clock: str, path: str, prediction: str
) -> tuple[Tensor, Tensor | float]:
    """(error, slope) of the formulas above, in the inputs' dtype."""
    pair = engine_times(times.to(pred.dtype), clock)
    if prediction == "velocity":
        target = get_path(path).velocity(x1, x0, *pair)
        return (pred - target if clock == DATA_AT_1 else pred + target), 1.0
    if prediction == "noise":
        return pred - x0, 1.0
    if prediction == "data":
        return pred - x1, 1.0
    # The score -x0 / sigma explodes at the data end; sigma times it does not (SiT).
    sigma = per_sample(get_path(path).coefficients(*pair).sigma, pred)
    return pred * sigma + x0, sigma


def _weights(
    weight: Tensor | None,
    loss_weight: str | None,
    error: Tensor,
    times: Tensor,
    clock: str,
    path: str,
) -> Tensor | float:
    """weight times lambda, broadcastable to the error; the number 1 where there are none."""
    total = 1.0
    if loss_weight is not None:
        pair = engine_times(times.to(error.dtype), clock)
        total = per_sample(get_path(path).loss_weight(loss_weight, *pair), error)
    if weight is not None:
        weight = weight.to(error.dtype)
        total = (per_sample(weight, error) if weight.dim() == 1 else weight) * total
    return total


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """(B,) losses of the samples as they are, their sum or their mean."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.mean()


def velocity_loss_reference(
    pred: Tensor,
    x1: Tensor,
    x0: Tensor,
    times: Tensor,
    *,
    clock: str,
    path: str = "linear",
    prediction: str = "velocity",
    loss_weight: str | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`velocity_loss` in plain, differentiable PyTorch, for tensors of one shape (B, ...).

    Computes and returns float32, or float64 for float64 data.
    """
    dtype = compute_dtype(x1)
    pred, x1, x0 = pred.to(dtype), x1.to(dtype), x0.to(dtype)
    error, _ = _errors(pred, x1, x0, times, clock, path, prediction)
    total, square = _weights(weight, loss_weight, error, times, clock, path), error**2
    # A product with the number 1 would be a pass over memory, and one in the backward pass.
    square = total * square if isinstance(total, Tensor) else square
    return reduce(square.flatten(1).mean(dim=1), reduction)


def gradient_reference(
    pred: Tensor,
    x1: Tensor,
    x0: Tensor,
    times: Tensor,
    upstream: Tensor | None,
    *,
    clock: str,
    path: str,
    prediction: str,
    loss_weight: str | None,
    weight: Tensor | None,
    reduction: str,
) -> Tensor:
    """The gradient in closed form, in pred's dtype: an operator cannot record its own."""
    dtype = compute_dtype(x1)
    error, slope = _errors(
        pred.to(dtype), x1.to(dtype), x0.to(dtype), times, clock, path, prediction
    )
    scale = gradient_scale(x1, reduction)
    if upstream is not None:
        scale = scale * (per_sample(upstream, error) if upstream.dim() else upstream)
    total = _weights(weight, loss_weight, error, times, clock, path)
    return (2 * scale * total * slope * error).to(pred.dtype)


def gradient_of_x0(
    gradient: Tensor,
    times: Tensor,
    shape: torch.Size,
    *,
    clock: str,
    path: str,
    learn_sigma: bool,
    patch_size: int,
) -> Tensor:
    """(B, ...) gradient of the noise in a velocity target, from that of the prediction.

    Args:
        gradient: of the prediction, in its layout.
        times: (B,) of the target, caller's clock.
        shape: of the data.

    Returns:
        float32, or float64 for a float64 prediction; it may be `gradient` itself.
    """
    if patch_size:
        gradient = from_tokens(gradient, shape, patch_size)
    if learn_sigma:
        gradient = gradient[:, : shape[1]]
    gradient = gradient.to(compute_dtype(gradient))
    if path == "linear":  # d_sigma is -1: no product, and for one clock no pass over memory
        return gradient if clock == DATA_AT_1 else -gradient
    pair = engine_times(times.to(gradient.dtype), clock)
    d_sigma = per_sample(get_path(path).coefficients(*pair).d_sigma, gradient)
    return gradient * (-d_sigma if clock == DATA_AT_1 else d_sigma)


def reference_inputs(
    pred: Tensor,
    x1: Tensor,
    std: Tensor | None,
    scale: float,
    seed: Tensor,
    ids: Tensor | None,
    x0: Tensor | None,
    learn_sigma: bool,
    patch_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(pred, x1, x0) in x1's shape, as the reference takes them."""
    if patch_size:
        pred = from_tokens(pred, x1.shape, patch_size)
    if learn_sigma:
        pred = pred[:, : x1.shape[1]]
    if x0 is None:
        numel = x1[0].numel() if len(x1) else 0
        x0 = philox.normal(seed, Stream.NOISE, ids, numel, "reference").view(x1.shape)
    if std is not None:
        x1 = sample_moments(Moments(x1, std, scale), seed, ids, "reference")
    return pred, x1, x0


def to_pred_layout(gradient: Tensor, learn_sigma: bool, patch_size: int) -> Tensor:
    """The gradient of `reference_inputs`' pred in the shape of the prediction as it was given."""
    if learn_sigma:
        gradient = torch.cat([gradient, torch.zeros_like(gradient)], dim=1)
    if patch_size:
        gradient = to_tokens(gradient.contiguous(), patch_size)
    return gradient.contiguous()
