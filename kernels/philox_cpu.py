"""The random numbers of `philox` by the operators of `csrc/`, on the CPU where they were built.

    words = torch.ops.mixflow_fast.philox_words(seed, positions, stream, numel)     int64
    u     = torch.ops.mixflow_fast.philox_uniform(seed, positions, stream, numel)   float32
    x0    = torch.ops.mixflow_fast.philox_normal(seed, positions, stream, numel)    float32

seed is a () and positions a (B,) int64 tensor; results are (B, numel). They have the bits of the
PyTorch lines in `philox`, which need about ten times as long for a batch of latents, and serve
where there is no library, no CPU, or where functorch looks at every operation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixflow_fast import extension


def _is_loaded() -> bool:
    return extension.load().serves("cpu")


# Asked once while `torch.compile` traces, which cannot follow the search for a library. It is what
# `torch.compiler.assume_constant_result` sets; calling that imports the compiler, for seconds.
_is_loaded._dynamo_marked_constant = True


def serves(positions: Tensor) -> bool:
    """Whether the operators draw for these positions."""
    if positions.device.type != "cpu" or not _is_loaded():
        return False
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is None


def words(seed: Tensor, stream: int, positions: Tensor, numel: int) -> Tensor:
    """`philox.words_reference`; ValueError for arguments of other shapes, dtypes or devices."""
    return torch.ops.mixflow_fast.philox_words(seed, positions, stream, numel)


def uniform(seed: Tensor, stream: int, positions: Tensor, numel: int) -> Tensor:
    """`philox.uniform_reference`; errors as `words`."""
    return torch.ops.mixflow_fast.philox_uniform(seed, positions, stream, numel)


def normal(seed: Tensor, stream: int, positions: Tensor, numel: int) -> Tensor:
    """`philox.normal_reference`; errors as `words`."""
    return torch.ops.mixflow_fast.philox_normal(seed, positions, stream, numel)
