"""Dropout whose mask is a function of (seed, layer, position, element).

    y = x keep / (1 - p),   keep = [word >= p 2^32],   dx = dy keep / (1 - p)

`word` is Philox' (`philox.py`, Stream.DROPOUT) under the key of the layer, at the position of the
example and the number of the element in it. So a run that is resumed, or split over other ranks
and micro-batches, drops the same elements, and nothing is kept for the backward pass: the mask is
drawn again. With p = 0 it is the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.philox import (
    Stream,
    check_seed,
    philox_words,
    random_words,
)
from mixflow_fast.kernels.runtime import compute_dtype, jit, tl, triton


def layer_keys(seed: int, layers: int) -> Tensor:
    """Keys of the masks of layers 0 .. layers - 1: (layers,) int64 on the CPU.

    Layer k has its own, from Stream.DROPOUT at the position k; the 64 bits are a seed's.
    """
    numbers = torch.arange(layers, device="cpu")
    words = random_words(check_seed(seed), Stream.DROPOUT, numbers, 2)
    return words[:, 0] | words[:, 1] << 32


def _threshold(p: float) -> int:
    """Words below it are dropped: a share of p, to 2^-32."""
    return round(p * 2**32)


def dropout_reference(x: Tensor, p: float, key: Tensor, positions: Tensor) -> Tensor:
    """`dropout` in plain, differentiable PyTorch; computes float32, or float64 for float64 x."""
    words = random_words(key, Stream.DROPOUT, positions, x[:1].numel())
    dtype = compute_dtype(x)
    # A product and no choice: what is not finite must not be hidden by its mask.
    factor = (words >= _threshold(p)).to(dtype) * (1 / (1 - p))
    return (x.to(dtype) * factor.view(x.shape)).to(x.dtype)


def dropout(x: Tensor, p: float, key: Tensor, positions: Tensor, impl: str = "auto") -> Tensor:
    """`x` with a share p of its elements zeroed and the others multiplied by 1 / (1 - p).

    Args:
        x: (B, ...) floating point; elements are numbered in the order of a contiguous tensor.
        p: probability in [0, 1).
        key: () int64 on the device of `x`, an entry of `layer_keys`.
        positions: (B,) int64 on the device of `x`, the global positions of the examples.
        impl: "reference", "triton" or "auto" (Triton on CUDA devices).

    Returns:
        as `x`, contiguous.

    Raises:
        ValueError: a probability outside of [0, 1), or positions that are not one a sample.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p!r}")
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"positions must be (B,) = ({len(x)},) int64, one a sample, got "
            f"{tuple(positions.shape)} {positions.dtype}"
        )
    if p == 0:
        return x
    kernel = runtime.use_kernels(impl, x.device, x.dtype)
    return _dropout_op(x, p, key, positions, kernel)


@jit(any_value=["programs"], any_address=["key_ptr", "positions_ptr"])
def _dropout_kernel(
    x_ptr,
    y_ptr,
    key_ptr,
    positions_ptr,
    numel,
    programs,
    scale,
    threshold,
    STREAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    sample = (program // programs).to(tl.int64)
    start = (program % programs) * BLOCK
    key, position = tl.load(key_ptr), tl.load(positions_ptr + sample)
    block = start // 4 + tl.arange(0, BLOCK // 4)[None, :]
    w0, w1, w2, w3 = philox_words(key, STREAM, position, block)
    word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    offsets = start + tl.arange(0, BLOCK)[None, :]
    mask = offsets < numel
    x = tl.load(x_ptr + sample * numel + offsets, mask=mask, other=0.0).to(tl.float32)
    factor = tl.where(word.to(tl.int64) >= threshold, scale, 0.0)
    y = (x * factor).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + sample * numel + offsets, y, mask=mask)


@torch.library.custom_op("mixflow_fast::dropout", mutates_args=())
def _dropout_op(x: Tensor, p: float, key: Tensor, positions: Tensor, kernel: bool) -> Tensor:
    if not kernel:
        return dropout_reference(x.contiguous(), p, key, positions)
    x, positions = x.contiguous(), positions.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    numel = x[0].numel()
    if numel > runtime.MAX_SAMPLE:
        raise ValueError(f"a sample must have at most 2**29 elements, got {numel}")
    block = 1024
    programs = triton.cdiv(numel, block)
    grid = (runtime.check_grid(len(x) * programs, len(x)),)
    with runtime.on_device(x):
        _dropout_kernel[grid](
            x,
            y,
            key,
            positions,
            numel,
            programs,
            1 / (1 - p),
            _threshold(p),
            STREAM=int(Stream.DROPOUT),
            BLOCK=block,
            num_warps=4,
            **runtime.OPTIONS,
        )
    return y


@_dropout_op.register_fake
def _(x: Tensor, p: float, key: Tensor, positions: Tensor, kernel: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    _, ctx.p, key, positions, ctx.kernel = inputs
    ctx.save_for_backward(key, positions)


def _backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    key, positions = ctx.saved_tensors
    return _dropout_op(dy, ctx.p, key, positions, ctx.kernel), None, None, None, None


_dropout_op.register_autograd(_backward, setup_context=_setup_context)
