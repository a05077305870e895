"""Argument checks of the residual norm, and the choice of the implementation."""

from __future__ import annotations

from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.residual_norm.launch import MAX_WIDTH

NORMS = ("layer", "rms")


def check_arguments(
    x: Tensor,
    h: Tensor | None,
    modulation: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    norm: str,
) -> None:
    """ValueError for arguments that do not fit each other; reads no device memory."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {NORMS}, got {norm!r}")
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point (B, N, D), got {x.dtype} {tuple(x.shape)}")
    B, N, D = x.shape
    if h is not None:
        _check_one("h", h, x, (B, N, D), "x's shape (B, N, D)")
    per_token = modulation["scale"].dim() == 3
    shape = (B, N, D) if per_token else (B, D)
    expected = "(B, N, D), as scale has three dimensions," if per_token else "(B, D)"
    if modulation["scale"].dim() not in (2, 3):
        expected = "(B, D), or (B, N, D) for one a token,"
    for name, value in modulation.items():
        if value is not None:
            _check_one(name, value, x, shape, expected)
    for name, value in vectors.items():
        if value is not None:
            _check_one(name, value, x, (D,), "(D,)")


def _check_one(name: str, value: Tensor, x: Tensor, shape: tuple[int, ...], expected: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name} must be {expected} = {shape}, got {tuple(value.shape)}")
    if not value.is_floating_point() or value.device != x.device:
        raise ValueError(
            f"{name} must be a floating-point tensor on x's device {x.device}, got "
            f"{value.dtype} on {value.device}"
        )


def resolve(impl: str, x: Tensor, *others: Tensor | None) -> str:
    """ "triton" or "reference", for the operators."""
    dtypes = [v.dtype for v in (x, *others) if v is not None]
    if not runtime.use_kernels(impl, x.device, *dtypes):
        return "reference"
    if x.shape[-1] <= MAX_WIDTH:
        return "triton"
    if impl == "triton":
        raise ValueError(
            f'impl="triton" takes widths up to {MAX_WIDTH}, got {x.shape[-1]}: use impl="auto"'
        )
    return "reference"
