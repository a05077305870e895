"""Triton where it is installed, and the choice between kernels and references for a tensor.

Every kernel file imports without Triton: `jit` then returns its functions as they are, and nothing
can launch. With `TRITON_INTERPRET=1` set before the first import, kernels run on CPU tensors in
Triton's interpreter: slow, and exact enough to test every line of them without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Literal, get_args

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

Impl = Literal["auto", "triton", "reference"]
IMPLS = get_args(Impl)
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest one-dimensional grid that CUDA launches.
MAX_PROGRAMS = 2**31 - 1
# Offsets inside a sample are 32-bit. A prediction may have twice as many elements (learn_sigma),
# and the last tile reaches beyond them.
MAX_SAMPLE = 2**29
# Triton 3.10 turns fused multiply-add off by default, which would change bits and registers.
OPTIONS = {"enable_fp_fusion": True}
_INTERPRETING = triton is not None and bool(triton.knobs.runtime.interpret)
# For kernels: whether the device's own instructions can be written out. The interpreter has none.
HAS_ASM = None if triton is None else tl.constexpr(not _INTERPRETING)


def jit(
    fn: Callable | None = None,
    *,
    any_value: Sequence[str] = (),
    any_address: Sequence[str] = (),
) -> Callable:
    """`triton.jit` where there is Triton.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16, and for a pointer
    that is a multiple of 16 bytes. `any_value` and `any_address` name the arguments for which it
    should not: integers on which no address of neighbouring elements depends, and pointers to
    single values.
    """
    if fn is None:
        return partial(jit, any_value=any_value, any_address=any_address)
    if triton is None:
        return fn
    return triton.jit(fn, do_not_specialize=any_value, do_not_specialize_on_alignment=any_address)


def for_any_alignment(kernel: Callable) -> Callable:
    """The same kernel, compiled once wherever its tensors lie and whatever its integers are."""
    if triton is None:
        return kernel
    names = [
        name
        for name, parameter in signature(kernel.fn).parameters.items()
        if "constexpr" not in str(parameter.annotation)
    ]
    return triton.jit(kernel.fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1)."""
    return _INTERPRETING


def can_launch(device: torch.device) -> bool:
    """Whether a kernel can run on tensors of this device."""
    return triton is not None and (_INTERPRETING or device.type == "cuda")


def use_kernels(impl: str, device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether `impl` means the Triton kernels for data of these dtypes on this device.

    "auto" takes the kernels on CUDA devices for float32, bfloat16 and float16, and the reference
    elsewhere (also where Triton only interprets).

    Raises:
        ValueError: an unknown `impl`, or "triton" where the kernels cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")
    if impl == "reference":
        return False
    fits = all(dtype in KERNEL_DTYPES for dtype in dtypes)
    launch = can_launch(device)
    if impl == "auto":
        return fits and launch and device.type == "cuda"
    if not launch:
        reason = "Triton is not installed" if triton is None else f"the tensors are on {device}"
        raise ValueError(
            f'impl="triton" needs a CUDA device and Triton, but {reason}: use impl="auto", or set '
            "TRITON_INTERPRET=1 before the first import to run the kernels in the interpreter"
        )
    if not fits:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            'impl="triton" computes float32, bfloat16 and float16 data, got '
            f'{names}: use impl="auto" or impl="reference"'
        )
    return True


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that references compute in: float64 for float64 data, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@contextmanager
def on_device(x: Tensor) -> Iterator[None]:
    """Makes the tensor's device the current one, which is where Triton launches.

    Raises:
        RuntimeError: a kernel had to be loaded inside the capture of a CUDA graph.
    """
    if not x.is_cuda:
        yield
        return
    with torch.cuda.device(x.device):
        try:
            yield
        except RuntimeError as error:
            # By its text: asking the stream before each launch would cost every launch.
            if "captur" not in str(error):
                raise
            raise RuntimeError(
                "a kernel was launched for the first time inside the capture of a CUDA graph, "
                "where the driver loads no code: make the same call once before the capture, with "
                "the same dtypes, shapes and settings (a warm-up step does)"
            ) from error


def with_unit_rows(x: Tensor) -> Tensor:
    """(B, ...) as is where each sample is contiguous in itself and aligned, else a contiguous copy.

    Aligned, where the size of a sample is `regular`: the data begins at a multiple of 16 bytes, and
    samples lie multiples of 16 elements apart. Triton compiles a kernel anew for memory that is
    not, with narrower accesses, and sums of another order: a copy of such a view keeps one kernel
    and the same bits.
    """
    aligned = not regular(x[:1].numel()) or (x.data_ptr() % 16 == 0 and row_stride(x) % 16 == 0)
    # `contiguous` would give back what is contiguous at a bad address.
    return x if aligned and x[:1].is_contiguous() else _copy(x)


def regular(size: int) -> bool:
    """Whether samples of so many elements, one behind the other, all begin aligned."""
    return size % 16 == 0


def with_aligned_start(x: Tensor) -> Tensor:
    """The tensor, or a copy where it does not begin at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else _copy(x)


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def row_stride(x: Tensor) -> int:
    """Elements from a sample to the next; of one sample, whose stride says nothing, its size."""
    return x.stride(0) if len(x) > 1 else x[:1].numel()


def check_grid(programs: int, batch: int) -> int:
    """The number of programs; ValueError where CUDA cannot launch so many."""
    if programs > MAX_PROGRAMS:
        raise ValueError(
            f"a batch of {batch} samples needs {programs} programs, more than one launch takes "
            f"({MAX_PROGRAMS}): split the batch"
        )
    return programs


def _repair_interpreter() -> None:
    """Makes the interpreter's float32 -> bfloat16 cast round to nearest even, as devices do."""
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(value, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(value.copy()).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().view("uint16").reshape(value.shape)
        return convert(value, source, target, rounding)

    interpreter._convert_float = convert_float


if _INTERPRETING:
    _repair_interpreter()
