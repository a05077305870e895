"""Argument checks of `MixFlow`; a ValueError names the argument, what it got and the way out."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from mixflow_fast.flow.clock import DATA_AT_1
from mixflow_fast.kernels.interpolate import Moments
from mixflow_fast.kernels.runtime import compute_dtype

# What computing a slowed time in float32 may be off by.
_TIME_ROUNDING = 1e-6


def refuse_gradient(name: str, value: Tensor) -> None:
    """ValueError for a tensor whose gradient would be cut off without a word."""
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, because none flows back through prepare (an "
            f"encoder that is trained along would get nothing): pass {name}.detach(), and give the "
            "encoder a loss of its own"
        )


def check_data(x1: object) -> tuple[Tensor | Moments, Tensor]:
    """The data, detached, and a tensor that has its shape, dtype and device."""
    if isinstance(x1, Moments):
        mean, std, scale = x1
        if isinstance(mean, Moments) or not isinstance(std, Tensor):
            raise ValueError(
                "Moments must be of two tensors, mean and std, got "
                f"{type(mean).__name__} and {type(std).__name__}"
            )
        check_data(mean)
        if std.shape != mean.shape or std.dtype != mean.dtype or std.device != mean.device:
            raise ValueError(
                f"std must be like mean, {tuple(mean.shape)} {mean.dtype} on {mean.device}, got "
                f"{tuple(std.shape)} {std.dtype} on {std.device}"
            )
        if not isinstance(scale, Real) or isinstance(scale, bool) or not math.isfinite(scale):
            raise ValueError(f"scale of Moments must be a finite number, got {scale!r}")
        refuse_gradient("std", std)
        x1 = Moments(mean.detach(), std.detach(), float(scale))
        return x1, x1.mean
    if not isinstance(x1, Tensor):
        raise ValueError(f"x1 must be a tensor or Moments, got {type(x1).__name__}")
    if x1.dim() < 2 or not x1.is_floating_point() or x1.element_size() < 2:
        raise ValueError(
            "x1 must be a floating-point tensor (B, ...) in float32, bf16, fp16 or float64, got "
            f"shape {tuple(x1.shape)} and dtype {x1.dtype}"
        )
    if not x1.shape[1:].numel():
        raise ValueError(f"a sample of x1 must have elements, got shape {tuple(x1.shape)}")
    refuse_gradient("x1", x1)
    x1 = x1.detach()
    return x1, x1


def check_noise(x0: Tensor, x1: Tensor) -> Tensor:
    """The noise, detached."""
    if not isinstance(x0, Tensor):
        raise ValueError(f"x0 must be a tensor like x1, got {type(x0).__name__}")
    if x0.shape != x1.shape or x0.device != x1.device or not x0.is_floating_point():
        raise ValueError(
            f"x0 must be like x1, shape {tuple(x1.shape)} on {x1.device}, got "
            f"{tuple(x0.shape)} {x0.dtype} on {x0.device}"
        )
    refuse_gradient("x0", x0)
    return x0.detach()


def check_patch_size(patch_size: int | None, x1: Tensor) -> int:
    """The patch size as an int; 0 where no tokens are asked for."""
    if patch_size is None:
        return 0
    if not isinstance(patch_size, Integral) or isinstance(patch_size, bool) or patch_size < 1:
        raise ValueError(f"patch_size must be an integer >= 1 or None, got {patch_size!r}")
    if x1.dim() != 4 or x1.shape[2] % patch_size or x1.shape[3] % patch_size:
        raise ValueError(
            f"patch_size={patch_size} needs x1 (B, C, H, W) with H and W divisible by it, got "
            f"{tuple(x1.shape)}"
        )
    return int(patch_size)


def check_dtype(dtype: object) -> torch.dtype | None:
    """The dtype of the network's input."""
    if dtype is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(
            "dtype must be torch.float32, bfloat16, float16 or float64, or None for that of x1, "
            f"got {dtype!r}"
        )
    return dtype


def check_ids(ids: Tensor, x1: Tensor) -> Tensor:
    """The positions as int64 on the device of the data."""
    ids = torch.as_tensor(ids)
    if ids.shape != x1.shape[:1] or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"ids must be (B,) = ({len(x1)},) integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    # Not without waiting from a GPU to the CPU: the values would be read before they arrive. Nor
    # out of pinned memory, which a loader may fill anew before the copy has begun.
    pinned = x1.is_cuda and ids.device.type == "cpu" and ids.is_pinned()
    return ids.to(x1.device, torch.int64, non_blocking=x1.is_cuda and not pinned)


def check_prediction(pred: object, x1: Tensor, learn_sigma: bool) -> int:
    """The patch size of pred's tokens, 0 for a prediction in x1's shape; ValueError otherwise."""
    if not isinstance(pred, Tensor):
        raise ValueError(
            f"the prediction must be one tensor, got {type(pred).__name__}: of a network with "
            "further outputs (REPA's projections) pass the prediction alone to MixFlow.loss"
        )
    if not pred.is_floating_point() or pred.device != x1.device:
        raise ValueError(
            f"pred must be a floating-point tensor on {x1.device}, got {pred.dtype} on "
            f"{pred.device}"
        )
    if learn_sigma and x1.dim() < 4:
        raise ValueError(
            "learn_sigma needs data (B, C, H, W), whose channels are its second dimension, got "
            f"{tuple(x1.shape)}: pass the half that is trained"
        )
    half, channels = (2, 2 * x1.shape[1]) if learn_sigma else (1, x1.shape[1])
    expected = (x1.shape[0], channels, *x1.shape[2:])
    if tuple(pred.shape) == expected:
        return 0
    if x1.dim() == 4 and pred.dim() == 3 and pred.shape[0] == x1.shape[0]:
        B, C, H, W = x1.shape
        tokens, features = pred.shape[1:]
        # By trial and not by a root, because the sizes may be symbols of a compiler.
        p = next((p for p in range(1, min(H, W) + 1) if tokens * p * p == H * W), 0)
        fits = p and H % p == 0 and W % p == 0 and tokens == (H // p) * (W // p)
        if fits and features == p * p * channels:
            return p
        if fits and features == 2 * p * p * channels and half == 1:
            raise ValueError(
                f"pred's tokens have {features} features, twice the {p * p * channels} of x1's "
                "channels: for a learn_sigma head pass learn_sigma=True"
            )
    hint = ""
    if half == 1 and pred.dim() > 1 and pred.shape[1] == 2 * x1.shape[1]:
        hint = (
            ": for a learn_sigma head pass learn_sigma=True (or its first half, "
            f"pred[:, :{x1.shape[1]}])"
        )
    raise ValueError(
        f"pred must have x1's shape {expected} or be its tokens (B, N, p p C), got "
        f"{tuple(pred.shape)}{hint}"
    )


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_times(name: str, value: Tensor, x1: Tensor) -> Tensor:
    """The times, detached, in float32 (float64 for float64 data)."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{name} must be a (B,) = ({len(x1)},) float32 tensor, got {type(value).__name__}"
        )
    if (
        value.shape != x1.shape[:1]
        or value.device != x1.device
        or value.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"{name} must be (B,) = ({len(x1)},) float32 on {x1.device} (half-precision times "
            f"lose the noise level), got {tuple(value.shape)} {value.dtype} on {value.device}"
        )
    refuse_gradient(name, value)
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


def check_slowing(t: Tensor, slowed_t: Tensor, clock: str) -> None:
    """ValueError where a given slowed time is cleaner than a given t; CPU tensors only.

    Args:
        t, slowed_t: (B,) times in the caller's clock.
        clock: that clock.
    """
    if t.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sign = "<=" if clock == DATA_AT_1 else ">="
    cleaner = slowed_t - t if clock == DATA_AT_1 else t - slowed_t
    wrong = (cleaner > _TIME_ROUNDING).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f'slowed_t must be at least as noisy as t, slowed_t {sign} t with clock="{clock}", got '
            f"slowed_t = {slowed_t[row].item():.6g} for t = {t[row].item():.6g} in row {row} "
            f"({len(wrong)} of {len(t)}): check the clock, and which of the two is which; "
            'interval="full" takes any'
        )


def check_weight(weight: Tensor | float, x1: Tensor) -> Tensor:
    """The weight as a tensor in the dtype that the loss is computed in."""
    if isinstance(weight, Real):
        # A fill on the device: a copy from the host would wait for it.
        return torch.full((), weight, device=x1.device, dtype=compute_dtype(x1))
    try:
        weight = torch.as_tensor(weight, device=x1.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"weight must be a number or a tensor, got {type(weight).__name__}"
        ) from None
    if weight.is_complex():
        raise ValueError(f"weight must be real, got {weight.dtype}")
    if weight.requires_grad:
        raise ValueError(
            "weight must not require a gradient (none flows to it): take the losses of "
            'reduction="none" and multiply those'
        )
    weight = weight.to(compute_dtype(x1))
    if weight.dim() == 0 or weight.shape == x1.shape[:1]:
        return weight
    fits = weight.dim() == x1.dim() and all(
        w in (1, e) for w, e in zip(weight.shape, x1.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"weight must be (B,) = ({len(x1)},) or broadcast to {tuple(x1.shape)}, got "
            f"{tuple(weight.shape)}"
        )
    return weight


def check_strength(value: float) -> None:
    """ValueError unless the strength of input perturbation is a finite number >= 0."""
    good = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < math.inf
    if not good:
        raise ValueError(
            f"input_perturbation must be a number >= 0 (Ning et al. 2023: 0.1), got {value!r}"
        )
