"""The library of `csrc/` for tests, built if it is not there, and calls of its operator."""

import shutil
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mixflow_fast import extension

SETTINGS = dict(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)


def require_library() -> extension.Status:
    """Builds it where there is a compiler: then nothing that it is tested for is left out."""
    if extension.load().state == "absent":
        if not shutil.which("c++"):
            pytest.skip("no C++ compiler")
        extension.build()
        extension.load.cache_clear()
    status = extension.load()
    assert status.state in ("built", "jit"), status.reason
    return status


def make_tensors(sizes: Sequence[int], emas: int = 1, dtype=torch.float32, seed: int = 0) -> dict:
    """The operator's lists, of parameters of one dimension, in the middle of a run."""
    g = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> list[Tensor]:
        return [scale * torch.randn(n, generator=g) for n in sizes]

    lists = dict(params=normal(), grads=[x.to(dtype) for x in normal()], exp_avgs=normal(0.1))
    lists["exp_avg_sqs"] = [x.square() for x in normal(0.3)]
    lists["emas"] = [x for _ in range(emas) for x in normal()]
    return lists


def call(lists: dict, grad_scale: Tensor | None = None, copies: Sequence[Tensor] = (), **given):
    emas = len(lists["emas"]) // max(len(lists["params"]), 1)
    options = {**SETTINGS, "step": 7, "ema_decays": [0.9, 0.3, 0.999, 0.0, 0.5][:emas], **given}
    torch.ops.mixflow_fast.adamw_ema_(
        *(lists[name] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "emas")),
        list(copies),
        grad_scale,
        **options,
    )


def copy_of(lists: dict) -> dict:
    return {name: [x.clone() for x in tensors] for name, tensors in lists.items()}


def assert_same_bits(a: dict, b: dict) -> None:
    for name, tensors in a.items():
        for x, y in zip(tensors, b[name], strict=True):
            assert torch.equal(x, y), name
