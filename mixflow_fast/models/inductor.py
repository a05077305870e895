"""Settings of Inductor, torch.compile's compiler, for blocks of our networks.

In a process that asks PyTorch for deterministic algorithms (`train.deterministic`) it is told to
choose nothing by timing: other tiles of a sum would be other last bits in the next process.

Its "mix-order reductions" sum rows and columns of a tensor in one kernel on a GPU. In PyTorch 2.10
to 2.13 such a sum is never written where it is a part of a larger tensor: the gradients of shift
and scale of a block's two norms are parts of one, and keep what the memory held. It takes some 4096
tokens, and one sample a call or a modulation that all samples share; the gradient is finite, and
nothing is said. (PyTorch's tracker: "silently computes wrong gradients for chained modulated
LayerNorms", August 2026, mended in its main branch then.) The compilation of our blocks is changed,
the process is not. `mixflow-fast doctor` compares the gradients on a GPU, whatever the version.
"""

from __future__ import annotations

import torch

_SETTING = "triton.mix_order_reduction"
_DETERMINISTIC = "deterministic"
# First version that has them switched on, and the first one after the fault was mended.
_SINCE, _MENDED = (2, 10), (2, 14)


def affected(version: str) -> bool:
    """Whether this version of PyTorch ("2.13.0+cu130") can leave such a gradient unwritten."""
    major, minor = version.split("+")[0].split(".")[:2]
    return _SINCE <= (int(major), int(minor)) < _MENDED


def block_options(version: str = torch.__version__) -> dict[str, bool] | None:
    """`options` of torch.compile for a block: without mix-order reductions where they are wrong,
    and without choices by timing where the process is to repeat its bits.

    Returns:
        None where this PyTorch needs nothing else, or does not know the settings.
    """
    repeats = torch.are_deterministic_algorithms_enabled()
    wanted = {_SETTING: False} if affected(version) else {}
    if repeats:
        wanted[_DETERMINISTIC] = True
    if not wanted:
        return None
    # A private module, whose import is a part of every compilation anyway.
    from torch._inductor import config

    known = config.get_config_copy()
    return {name: value for name, value in wanted.items() if name in known} or None
