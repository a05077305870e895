"""How much of the data a thread of a kernel works on: `compile_report`'s part."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from benchmarks.machine_code import Code, access_bits


@dataclass(frozen=True)
class Work:
    """The work of one thread.

    Attributes:
        rounds: how often it goes through the main loop.
        elements: of the data that it works on in all of them.
    """

    rounds: float
    elements: float


def work_of(kernel: str, given: dict[str, object], num_warps: int, code: Code) -> Work | None:
    """The work of a launch with these arguments; None for kernels that nobody asks about."""
    threads = 32 * num_warps
    if kernel in _STREAMING:
        bits = _STREAMING[kernel](given)
        tile = given["BLOCK_C"] * given["BLOCK_S"] / threads
        # A compiler may have unrolled the loop: what a round moves says how many tiles it is.
        tiles = max(round(sum(access_bits(code.loop)) / (bits * tile)), 1)
        return Work(given["loops"] / tiles, given["loops"] * tile)
    if kernel == "_scale_gradient_kernel":
        return Work(1, given["BLOCK"] / threads)
    if kernel == "_reduce_kernel":
        # Each sum that it reads stands for so many elements.
        rounds = math.ceil(given["programs"] / given["BLOCK_P"])
        samples = given["BLOCK_B"] if given["PER_SAMPLE"] else given["B"]
        rounds *= 1 if given["PER_SAMPLE"] else math.ceil(given["B"] / given["BLOCK_B"])
        return Work(rounds, min(samples, given["B"]) * given["numel"] / threads)
    if kernel in ("_residual_norm_forward_kernel", "_residual_norm_backward_kernel"):
        # The loop may be unrolled: what a round stores says how many rows it is.
        slots = (given["HEAD"] + given["TAIL"]) / threads
        stored = sum(access_bits([one for one in code.loop if one.opcode == "STG"]))
        rows = max(round(stored / (slots * _row_bits(given))), 1) if _row_bits(given) else 1
        return Work(given["ROWS"] / rows, given["ROWS"] * given["D"] / threads)
    if kernel == "_qk_norm_forward_kernel":
        return Work(0, given["ROWS"] * given["K"] / threads)
    if kernel == "_qk_norm_backward_kernel":
        loops = given["loops"]
        return Work(loops, loops * given["ROWS"] * given["K"] / threads)
    return None


def _row_bits(given: dict[str, object]) -> int:
    """Bits that the residual norm stores for an element, statistics and partial sums left out."""
    if "eps" in given:  # the forward pass
        return _bits(given["y_ptr"]) * (2 if given["HAS_H"] else 1)
    flags = dict(DX="dx", DH="dh", DGATE="dgate", DSHIFT="dshift", DSCALE="dscale", WITH_Y="y")
    return sum(_bits(given[f"{name}_ptr"]) for flag, name in flags.items() if given[flag])


def _bits(tensor: object) -> int:
    assert isinstance(tensor, Tensor)
    return 8 * tensor.element_size()


def _interpolation_bits(given: dict[str, object]) -> int:
    """Bits that the interpolation moves for an element."""
    tensors = ["x1_ptr", "x_ptr"]
    tensors += ["std_ptr"] if given["MOMENTS"] else []
    tensors += ["x0_ptr"] if given["HAS_X0"] else []
    return sum(_bits(given[name]) for name in tensors)


def _loss_bits(given: dict[str, object]) -> int:
    """Bits that the loss moves for an element."""
    tensors, prediction = ["pred_ptr"], given["PREDICTION"]
    if prediction in ("velocity", "data"):
        tensors += ["x1_ptr", "std_ptr"] if given["MOMENTS"] else ["x1_ptr"]
    if prediction != "data" and given["HAS_X0"]:
        tensors.append("x0_ptr")
    if given["WEIGHT"] == "element":
        tensors.append("weight_ptr")
    if given["GRADIENT"]:
        tensors += ["gradient_ptr"] * (2 if given["LEARN_SIGMA"] else 1)
    return sum(_bits(given[name]) for name in tensors)


def _source_bits(given: dict[str, object]) -> int:
    """Bits that the mixed source's forward kernel moves for an element."""
    tensors = ["x1_ptr", "mean_ptr", "log_var_ptr", "x_ptr", "x0_ptr"]
    tensors += ["eps_ptr"] if given["HAS_EPS"] else []
    tensors += ["eps1_ptr"] if given["SAMPLES"] and given["HAS_EPS1"] else []
    return sum(_bits(given[name]) for name in tensors)


def _source_backward_bits(given: dict[str, object]) -> int:
    """Bits that the mixed source's backward kernel moves for an element."""
    tensors = ["mean_ptr", "log_var_ptr", "grad_mean_ptr", "grad_log_var_ptr"]
    tensors += ["grad_x_ptr"] if given["HAS_GRAD_X"] else []
    tensors += ["grad_x0_ptr"] if given["HAS_GRAD_X0"] else []
    tensors += ["eps_ptr"] if given["HAS_EPS"] else []
    return sum(_bits(given[name]) for name in tensors)


# Kernels that stream through the data, and what they move for an element.
_STREAMING = {
    "_interpolate_kernel": _interpolation_bits,
    "_velocity_loss_kernel": _loss_bits,
    "_mixed_source_kernel": _source_bits,
    "_source_backward_kernel": _source_backward_bits,
}
