"""Launches of the residual norm's kernels, and the bytes that they move.

The operators of `op.py` call `launch_forward` and `launch_backward` on a device.
Block sizes and numbers of rows depend on the width and the number of tokens, never on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mixflow_fast.kernels import runtime
from mixflow_fast.kernels.residual_norm.reduce_kernels import (
    _residual_norm_reduce_kernel,
    _residual_norm_sum_kernel,
)
from mixflow_fast.kernels.residual_norm.row_parts import row_parts
from mixflow_fast.kernels.residual_norm.triton_kernels import (
    _residual_norm_backward_kernel,
    _residual_norm_forward_kernel,
)
from mixflow_fast.kernels.runtime import triton

# Wider rows would spill registers.
MAX_WIDTH = 4096
# Rows of a forward program that share their sample's gate, shift and scale.
FORWARD_ROWS = 8
# Shared memory that a program may fill with loads under way: less than any device here has.
SHARED_BYTES = 98_304
# Tiles of the kernels that add up, (rows, columns). Partials are read 128 bits at a time.
TILE_BLOCK, TILE_COLUMNS = 8, 64
SUM_BLOCK, SUM_COLUMNS = 64, 64


@dataclass(frozen=True)
class Needs:
    """Which outputs of the backward operator are wanted, in their order; y is recomputed."""

    dx: bool
    dh: bool
    dgate: bool
    dshift: bool
    dscale: bool
    dh_bias: bool
    dweight: bool
    y: bool = False

    def row_sums(self, per_token: bool) -> dict[str, int]:
        """Row of each sum in `partial`, -1 where the sum is not needed."""
        wanted = {
            "WEIGHT_ROW": self.dweight or (self.dscale and not per_token),
            "SHIFT_ROW": self.dshift and not per_token,
            "GATE_ROW": self.dgate and not per_token,
            "H_BIAS_ROW": self.dh_bias,
        }
        present = [name for name, needed in wanted.items() if needed]
        return {name: present.index(name) if name in present else -1 for name in wanted}


def backward_rows(N: int) -> int:
    """Consecutive tokens of a backward program: 4 partial rows are then 1/4 of the data or less."""
    return 32 if N >= 256 else 16 if N >= 64 else 8


def scratch_shapes(
    B: int, N: int, D: int, needs: Needs, per_token: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the float32 `partial` (B, tiles, rows, D) and `sums` (B, rows, D)."""
    rows = sum(row >= 0 for row in needs.row_sums(per_token).values())
    return (B, -(-N // backward_rows(N)), rows, D), (B, needs.dh_bias + needs.dweight, D)


def _options(D: int, rows: int, *streams: Tensor | None) -> dict[str, int]:
    """Options for programs that read `rows` rows of each of `streams`.

    A row's sums are a round trip through shared memory in which the device would have nothing to
    fetch, so the loads of the next two rows are under way (STAGES - 1).
    """
    head, tail, warps = row_parts(D)
    sizes = [v.element_size() for v in streams if v is not None]
    stages = 3 if rows > 2 and 2 * (head + tail) * sum(sizes) <= SHARED_BYTES else 1
    return {
        "HEAD": head,
        "TAIL": tail,
        "LANES": 32 * warps,
        "VECTOR": 16 // max(sizes),
        "STAGES": stages,
        "num_warps": warps,
    }


def _with_rows(x: Tensor) -> Tensor:
    """x as is where its last dimension has stride 1, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strided(name: str, x: Tensor | None, other: Tensor) -> dict[str, object]:
    """Pointer and strides of (B, D) or (B, N, D); `other` stands for a tensor that is absent."""
    x_row_stride = x.stride(1) if x is not None and x.dim() == 3 else 0
    return {
        f"{name}_ptr": other if x is None else x,
        f"{name}_sample_stride": 0 if x is None else x.stride(0),
        f"{name}_row_stride": x_row_stride,
    }


def launch_forward(
    x: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    h_bias: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x', y, mean, rstd); x' is empty without h, mean for norm="rms"."""
    B, N, D = x.shape
    x_new = x.new_empty(x.shape if h is not None else (0,))
    y = x.new_empty(x.shape)
    mean = x.new_empty((B, N) if norm == "layer" else (0,), dtype=torch.float32)
    rstd = x.new_empty((B, N), dtype=torch.float32)
    if not x.numel():
        return x_new, y, mean, rstd
    x, scale = _with_rows(x), _with_rows(scale)
    h, gate, shift = (None if v is None else _with_rows(v) for v in (h, gate, shift))
    h_bias, weight = (None if v is None else v.contiguous() for v in (h_bias, weight))
    per_token = scale.dim() == 3
    # Modulation by token is read for each row anyway, so rows have nothing to share.
    rows = 1 if per_token else FORWARD_ROWS
    tiles = triton.cdiv(N, rows)
    with runtime.on_device(x):
        _residual_norm_forward_kernel[(runtime.check_grid(B * tiles, B),)](
            **_strided("x", x, x),
            **_strided("h", h, x),
            **_strided("gate", gate, x),
            **_strided("shift", shift, x),
            **_strided("scale", scale, x),
            h_bias_ptr=x if h_bias is None else h_bias,
            weight_ptr=x if weight is None else weight,
            x_new_ptr=x_new,
            y_ptr=y,
            mean_ptr=mean,
            rstd_ptr=rstd,
            N=N,
            tiles=tiles,
            eps=eps,
            D=D,
            HAS_H=h is not None,
            HAS_H_BIAS=h_bias is not None,
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            LAYER=norm == "layer",
            PER_TOKEN=per_token,
            EVEN=N % rows == 0,
            ROWS=rows,
            **_options(D, rows, x, h),
            **runtime.OPTIONS,
        )
    return x_new, y, mean, rstd


def launch_backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    h: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor,
    h_bias: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    outputs: Sequence[Tensor],
    needs: Needs,
    norm: str,
) -> None:
    """Writes the needed gradients to `outputs`, which are in the order of `Needs`."""
    B, N, D = x_new.shape
    if not x_new.numel():
        for output in outputs:
            output.zero_()
        return
    dy, x_new, scale = _with_rows(dy), _with_rows(x_new), _with_rows(scale)
    shift = shift if needs.y else None
    dx_new, h, gate, shift = (
        None if v is None else _with_rows(v) for v in (dx_new, h, gate, shift)
    )
    h_bias, weight = (None if v is None else v.contiguous() for v in (h_bias, weight))
    dx, dh, dgate, dshift, dscale, dh_bias, dweight, y = outputs
    per_token = scale.dim() == 3
    partial_shape, sums_shape = scratch_shapes(B, N, D, needs, per_token)
    partial = x_new.new_empty(partial_shape, dtype=torch.float32)
    sums = x_new.new_empty(sums_shape, dtype=torch.float32)
    tiles, rows = partial_shape[1], backward_rows(N)
    common = dict(
        needs.row_sums(per_token),
        partial_ptr=partial,
        tiles=tiles,
        D=D,
        PER_TOKEN=per_token,
        PARTIALS=partial_shape[2],
        **runtime.OPTIONS,
    )
    modulation = (gate, shift, scale) if per_token else ()
    written = dict(dgate_ptr=dgate, dshift_ptr=dshift, dscale_ptr=dscale)
    # Absent tensors are given as any other: a constexpr keeps kernels from using the pointers.
    unwritten = dict.fromkeys(written, partial)
    with runtime.on_device(x_new):
        _residual_norm_backward_kernel[(runtime.check_grid(B * tiles, B),)](
            **_strided("dy", dy, dy),
            **_strided("dx_new", dx_new, dy),
            **_strided("x_new", x_new, dy),
            **_strided("h", h, dy),
            **_strided("gate", gate, dy),
            **_strided("shift", shift, dy),
            **_strided("scale", scale, dy),
            mean_ptr=mean,
            rstd_ptr=rstd,
            h_bias_ptr=dy if h_bias is None else h_bias,
            weight_ptr=dy if weight is None else weight,
            dx_ptr=dx,
            dh_ptr=dh,
            y_ptr=y,
            N=N,
            HAS_DX_NEW=dx_new is not None,
            HAS_H=gate is not None,
            HAS_H_BIAS=h_bias is not None,
            HAS_SHIFT=shift is not None,
            HAS_WEIGHT=weight is not None,
            LAYER=norm == "layer",
            DX=needs.dx,
            DH=needs.dh,
            DGATE=needs.dgate and per_token,
            DSHIFT=needs.dshift and per_token,
            DSCALE=needs.dscale and per_token,
            WITH_Y=needs.y,
            EVEN=N % rows == 0,
            ROWS=rows,
            **_options(D, rows, dy, dx_new, x_new, h, *modulation),
            **(written if per_token else unwritten),
            **common,
        )
        if partial_shape[2]:
            outputs_here = unwritten if per_token else written
            _launch_reduction(gate, scale, weight, sums, needs, common | outputs_here)
        if sums_shape[1]:
            _launch_sums(sums, dh_bias, dweight, needs)


def _launch_reduction(
    gate: Tensor | None,
    scale: Tensor,
    weight: Tensor | None,
    sums: Tensor,
    needs: Needs,
    common: dict[str, object],
) -> None:
    """Adds up the partial sums of each sample. `common`: arguments that backward kernels share."""
    partial, per_token = common["partial_ptr"], common["PER_TOKEN"]
    B, rows, D = sums.shape
    # What a sample's sums are multiplied by, and nothing where they are written as they are.
    dscale_here = needs.dscale and not per_token
    weight = weight if dscale_here else None
    gate = gate if needs.dh_bias and not per_token else None
    scale = scale if needs.dweight and not per_token else None
    columns = triton.cdiv(D, TILE_COLUMNS)
    _residual_norm_reduce_kernel[(runtime.check_grid(B * columns, B),)](
        sums_ptr=sums,
        gate_ptr=partial if gate is None else gate,
        gate_sample_stride=0 if gate is None else gate.stride(0),
        scale_ptr=partial if scale is None else scale,
        scale_sample_stride=0 if scale is None else scale.stride(0),
        weight_ptr=partial if weight is None else weight,
        HAS_WEIGHT=weight is not None,
        DSCALE=dscale_here,
        DWEIGHT=needs.dweight,
        SUMS=rows,
        COLUMN_BLOCKS=columns,
        BLOCK=TILE_BLOCK,
        BLOCK_D=TILE_COLUMNS,
        num_warps=4,
        **common,
    )


def _launch_sums(sums: Tensor, dh_bias: Tensor, dweight: Tensor, needs: Needs) -> None:
    """Adds up the parts of the samples, (B, rows, D), of the gradients that all samples share."""
    B, rows, D = sums.shape
    _residual_norm_sum_kernel[(triton.cdiv(D, SUM_COLUMNS),)](
        sums,
        dh_bias,
        dweight,
        B,
        D=D,
        DH_BIAS=needs.dh_bias,
        DWEIGHT=needs.dweight,
        SUMS=rows,
        BLOCK=SUM_BLOCK,
        BLOCK_D=SUM_COLUMNS,
        num_warps=16,
        **runtime.OPTIONS,
    )


def residual_norm_bytes(
    x: Tensor,
    *,
    per_token: bool,
    backward: bool,
    has_h: bool = True,
    has_shift: bool = True,
    has_h_bias: bool = False,
    has_weight: bool = False,
    has_dx_new: bool = True,
    with_y: bool = False,
    norm: str = "layer",
    dtype: torch.dtype | None = None,
) -> int:
    """Bytes that the kernels read and write: every tensor once, partial sums twice.

    The backward pass is that which writes every gradient.

    Args:
        x: (B, N, D), any device ("meta" too); h has its dtype.
        per_token: whether gate, shift and scale are (B, N, D).
        backward: count the backward pass instead of the forward pass.
        has_h: `residual_norm`; otherwise `modulated_norm`.
        has_shift, has_h_bias, has_weight: which arguments are given.
        has_dx_new: whether there is an upstream gradient of x', or of y alone.
        with_y: whether the backward pass recomputes y.
        dtype: dtype of gate, shift, scale, h_bias and weight; x's by default.
    """
    B, N, D = x.shape
    wide = x.element_size()
    narrow = wide if dtype is None else dtype.itemsize
    data = B * N * D * wide
    modulation = B * (N if per_token else 1) * D * narrow
    statistics = 4 * B * N * (2 if norm == "layer" else 1)
    vectors = D * narrow * (has_h_bias + has_weight)
    if not backward:
        modulations = 1 + has_shift + has_h  # scale, shift, gate
        return data * (4 if has_h else 2) + modulation * modulations + statistics + vectors
    needs = Needs(True, has_h, has_h, has_shift, True, has_h_bias, has_weight)
    partial, sums = (
        4 * torch.Size(shape).numel() for shape in scratch_shapes(B, N, D, needs, per_token)
    )
    moved = data * ((5 if has_h else 3) + has_dx_new + with_y) + statistics + vectors
    # scale and gate are read, the gradients of scale, shift and gate written; y needs shift.
    moved += modulation * (2 + has_shift * (1 + with_y) + 2 * has_h) + vectors
    moved += 2 * (partial + sums)
    if not per_token:  # read again by the kernel that adds up
        moved += modulation * (has_weight + has_h_bias) + D * narrow * has_weight
    return moved
