"""The two passes of a residual norm for callers that do not keep y between them.

In a transformer block y is kept only for the gradient of the weight that multiplies it. The
backward pass of `residual_norm` reads everything that y is made of, so recomputing it costs one
more write, and a block keeps two tensors of the stream's size less. Autograd records nothing here:
the caller is a `torch.autograd.Function` that knows the product. Formulas stand in `op.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mixflow_fast.kernels.residual_norm.checks import check_arguments, resolve
from mixflow_fast.kernels.residual_norm.op import (
    dtypes_of,
    modulated_norm_op,
    residual_norm_backward_op,
    residual_norm_op,
)


def residual_norm_forward(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    *,
    h_bias: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`residual_norm`, or `modulated_norm` where h and gate are None, with the norm's statistics.

    Args, Raises: as `residual_norm`; impl="reference" is plain PyTorch inside of the operator.

    Returns:
        (x', y, mean, rstd): x' and y as `residual_norm` returns them, x' is x itself without h;
        mean, empty for norm="rms", and rstd are (B, N) float32 (float64 for float64 x).
    """
    modulation = {"scale": scale, "gate": gate, "shift": shift}
    check_arguments(x, h, modulation, {"h_bias": h_bias, "weight": weight}, norm)
    impl = resolve(impl, x, h, gate, shift, scale, h_bias, weight)
    if h is None:
        return x, *modulated_norm_op(x, shift, scale, weight, norm, float(eps), impl)
    return residual_norm_op(x, h, gate, shift, scale, h_bias, weight, norm, float(eps), impl)


def residual_norm_recompute(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
    *,
    h_bias: Tensor | None = None,
    weight: Tensor | None = None,
    norm: str = "layer",
    impl: str = "auto",
) -> list[Tensor | None]:
    """The backward pass of `residual_norm_forward`, which also recomputes its y.

    Args:
        dy, dx_new: (B, N, D), gradients of y and of x' (None: x' is not used elsewhere).
        x_new, mean, rstd: x' and the statistics that `residual_norm_forward` returned.
        h, gate, shift, scale, h_bias, weight, norm, impl: as given to it.
        needs: which of the eight results are wanted. dh, dgate and dh_bias need h and gate.

    Returns:
        [dx, dh, dgate, dshift, dscale, dh_bias, dweight, y], None where `needs` says no; gradients
        in the dtypes of their inputs, y as the forward pass has it, up to the last bit.
    """
    h_dtype, gate_dtype, shift_dtype, h_bias_dtype = dtypes_of(x_new, h, gate, shift, h_bias)
    outputs = residual_norm_backward_op(
        dy,
        dx_new,
        x_new,
        h,
        gate,
        shift,
        scale,
        h_bias,
        weight,
        mean,
        rstd,
        list(needs),
        h_dtype,
        gate_dtype,
        shift_dtype,
        h_bias_dtype,
        norm,
        resolve(impl, x_new, h, gate, shift, scale, h_bias, weight),
    )
    return [v if needed else None for v, needed in zip(outputs, needs, strict=True)]
