"""The network's input where a predictor makes the noise end: mixture, KL and interpolation at once.

    x0  = w mean + s eps,  s = sqrt((1 - w) + w exp(log_var))               mode "moments"
          w (mean + exp(log_var / 2) eps1) + (1 - w) eps                    mode "samples"
    x_m = alpha_m x1 + sigma_m x0
    kl  = 1/2 sum(mean^2 + exp(log_var) - 1 - log_var)                      of the unmixed source

and backward, with G = sigma_m dL/dx_m + dL/dx0 (MixFlow with kappa-FC, arXiv 2604.09181):

    dL/dmean    = w G + dL/dkl mean
    dL/dlog_var = G eps w exp(log_var) / (2 s) + dL/dkl (exp(log_var) - 1) / 2       "moments"
                  G eps1 w exp(log_var / 2) / 2 + the same                           "samples"

log_var is clamped to a range, outside of which it has no gradient.

Forward reads x1, mean and log_var and writes x_m and x0, once: 16 bytes an element for bf16 data
and a float32 source. Backward reads both gradients, mean and log_var and writes theirs: 22. Mean
and log-variance may be the halves of the predictor's one tensor, and then their gradients are, too.
The noise is made in registers, again in the backward pass, so nothing of it is kept. eps are the
numbers of `interpolate`: with w = 0, or with zero moments in mode "moments", x_m has its bits.
Partial sums of the KL go to memory and are added in a fixed order. Arithmetic is float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow_fast.flow.source import bounded_log_var, halves
from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.interpolate.launch import check_sample_size
from mixflow_fast.kernels.mixed_source.launch import launch, launch_backward, token_shape
from mixflow_fast.kernels.mixed_source.reference import (
    mix_and_interpolate_reference,
    source_backward_reference,
)
from mixflow_fast.kernels.runtime import compute_dtype


@torch.library.custom_op("mixflow_fast::mix_and_interpolate", mutates_args=())
def _mix_and_interpolate_op(
    x1: Tensor,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    eps: Tensor | None,
    eps1: Tensor | None,
    clock: str,
    path: str,
    mode: str,
    patch_size: int,
    low: float,
    high: float,
    impl: str,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, x0, kl); without `log_var` it is the second half of `mean` in dimension 1."""
    options = dict(clock=clock, path=path, mode=mode, patch_size=patch_size, dtype=dtype)
    if _kernels(impl, x1, mean, log_var, dtype):
        options.update(low=low, high=high)
        return launch(x1, mean, log_var, w, slowed_t, seed, ids, eps, eps1, **options)
    mean, log_var = halves(mean, log_var)
    log_var = bounded_log_var(log_var, (low, high))
    x, x0, kl = mix_and_interpolate_reference(
        x1, mean, log_var, w, slowed_t, seed, ids, eps=eps, eps1=eps1, **options
    )
    # As the fake implementation promises them.
    return x.contiguous(), x0.contiguous(), kl


@_mix_and_interpolate_op.register_fake
def _(
    x1,
    mean,
    log_var,
    w,
    slowed_t,
    seed,
    ids,
    eps,
    eps1,
    clock,
    path,
    mode,
    patch_size,
    low,
    high,
    impl,
    dtype=None,
):
    compute = compute_dtype(x1)
    x = x1.new_empty(token_shape(x1.shape, patch_size), dtype=dtype or x1.dtype)
    return x, x1.new_empty(x1.shape, dtype=compute), x1.new_empty(x1.shape[:1], dtype=compute)


@torch.library.custom_op("mixflow_fast::source_backward", mutates_args=())
def _source_backward_op(
    grad_x: Tensor | None,
    grad_x0: Tensor | None,
    grad_kl: Tensor | None,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    eps: Tensor | None,
    clock: str,
    path: str,
    mode: str,
    patch_size: int,
    low: float,
    high: float,
    kernels: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of mean and log_var; the second of no elements where the first is of both.

    Args:
        grad_x: like x, grad_x0: like x0, grad_kl: (B,); None where a result was not used.
        eps: the noise that log_var scales, of `Stream.NOISE` in mode "moments" and of
            `Stream.SOURCE_NOISE` in mode "samples"; None is drawn.
        kernels: whether the forward pass was the kernel's.
    """
    options = dict(clock=clock, path=path, mode=mode, patch_size=patch_size, low=low, high=high)
    implementation = launch_backward if kernels else source_backward_reference
    of_mean, of_log_var = implementation(
        grad_x, grad_x0, grad_kl, mean, log_var, w, slowed_t, seed, ids, eps, **options
    )
    return of_mean, mean.new_empty(0) if of_log_var is None else of_log_var


@_source_backward_op.register_fake
def _(grad_x, grad_x0, grad_kl, mean, log_var, *_):
    like = mean[:0].flatten() if log_var is None else log_var
    return mean.new_empty(mean.shape), like.new_empty(like.shape)


def _kernels(
    impl: str, x1: Tensor, mean: Tensor, log_var: Tensor | None, dtype: torch.dtype | None
) -> bool:
    dtypes = x1.dtype, mean.dtype, (mean if log_var is None else log_var).dtype, dtype or x1.dtype
    return runtime.use_kernels(impl, x1.device, *dtypes)


def _setup_context(ctx, inputs, output) -> None:
    x1, mean, log_var, w, slowed_t, seed, ids, eps, eps1 = inputs[:9]
    clock, path, mode, patch_size, low, high, impl, dtype = inputs[9:]
    ctx.set_materialize_grads(False)  # a result that nobody used costs no zeros
    kernels = _kernels(impl, x1, mean, log_var, dtype)
    ctx.options = clock, path, mode, patch_size, low, high, kernels
    scaled = eps1 if mode == "samples" else eps
    ctx.save_for_backward(mean, log_var, w, slowed_t, seed, ids, scaled)


def _backward(
    ctx, grad_x: Tensor | None, grad_x0: Tensor | None, grad_kl: Tensor | None
) -> tuple[Tensor | None, ...]:
    of_mean = of_log_var = None
    if any(gradient is not None for gradient in (grad_x, grad_x0, grad_kl)):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the fused source has no second derivatives (create_graph=True): use "
                'MixFlow(impl="reference")'
            )
        mean, log_var, w, slowed_t, seed, ids, eps = ctx.saved_tensors
        clock, path, mode, patch_size, low, high, kernels = ctx.options
        of_mean, of_log_var = _source_backward_op(
            grad_x,
            grad_x0,
            grad_kl,
            mean,
            log_var,
            w,
            slowed_t,
            seed,
            ids,
            eps,
            clock,
            path,
            mode,
            patch_size,
            low,
            high,
            kernels,
        )
        of_log_var = None if log_var is None else of_log_var
    return None, of_mean, of_log_var, *(None,) * 14


_mix_and_interpolate_op.register_autograd(_backward, setup_context=_setup_context)


def mix_and_interpolate(
    x1: Tensor,
    mean: Tensor,
    log_var: Tensor | None,
    w: Tensor,
    slowed_t: Tensor,
    seed: Tensor,
    ids: Tensor | None,
    *,
    clock: str,
    path: str,
    mode: str,
    eps: Tensor | None = None,
    eps1: Tensor | None = None,
    patch_size: int = 0,
    log_var_range: tuple[float, float] = (-math.inf, math.inf),
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `mixflow_fast::mix_and_interpolate`, with gradients to mean and log_var.

    Arguments are those that `MixFlow.prepare` has checked.

    Args:
        x1: (B, ...) data in float32, bf16 or fp16, samples of (C, H, W) for tokens; no gradient
            flows to it. A posterior's moments are sampled before.
        mean, log_var: (B, ...) of the unmixed source, in float32, bf16 or fp16. Or log_var is None
            and mean is both in one tensor (B, 2 C, ...), as a predictor makes them: its gradient
            then needs no pass that puts two halves together.
        w: (B,) float32 weight of the source in [0, 1].
        slowed_t: (B,) float32 times m in the caller's clock.
        seed: `philox.seed_tensor`, read on the device, and in the backward pass again.
        ids: (B,) int64 positions; they must not change in place before the backward pass.
        clock, path: as `MixFlow`'s.
        mode: "moments" or "samples".
        eps, eps1: (B, ...) noise; None is drawn in registers. eps1 is used in mode "samples".
        patch_size: side of the patches that make a token of x_m; 0 writes it in x1's shape.
        log_var_range: what log_var is clamped to. One that is not finite gives NaN.
        dtype: of x_m, which is computed in float32 and rounded once; None is that of x1.
        impl: "auto", "triton" or "reference" (see `runtime.use_kernels`).

    Returns:
        x_m: in `dtype`, (B, ...) or (B, H/p W/p, p p C); x0: (B, ...) and kl: (B,), float32 (the
        reference: float64 for float64 data).

    Raises:
        ValueError: impl="triton" where it cannot run; too large samples or batches.
        RuntimeError: in a backward pass that wants second derivatives.
    """
    # Outside of the operator, so that tracing refuses it as well.
    if _kernels(impl, x1, mean, log_var, dtype):
        check_sample_size(x1)
    low, high = log_var_range
    return _mix_and_interpolate_op(
        x1,
        mean,
        log_var,
        w,
        slowed_t,
        seed,
        ids,
        eps,
        eps1,
        clock,
        path,
        mode,
        patch_size,
        low,
        high,
        impl,
        dtype,
    )
