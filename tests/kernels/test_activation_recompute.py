"""The backward passes of GELU and SwiGLU that recompute their output."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixflow_fast.kernels.activations import gelu as gelu_module
from mixflow_fast.kernels.activations import swiglu as swiglu_module
from tests.support.kernels import BF16, FP16, FP32, assert_as_exact_as_eager, data, moved

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
]
# Module, name, columns of x for one column of y.
OPS = [(gelu_module, "gelu", 1), (swiglu_module, "swiglu", 2)]
ids = [name for _, name, _ in OPS]


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize("shape", [(2, 5, 96), (150, 40), (3, 33)])
@pytest.mark.parametrize("op", OPS, ids=ids)
def test_same_gradients_and_the_output(
    op: tuple, shape: tuple[int, ...], dtype: torch.dtype, impl: str
) -> None:
    module, name, wide = op
    *rows, F = shape
    x = data(*rows, wide * F, dtype=dtype).requires_grad_()
    bias = data(wide * F, dtype=dtype, seed=1).requires_grad_()
    dy = data(*shape, dtype=dtype, seed=2)
    function: Callable = getattr(module, name)
    y = function(x, bias, impl="auto" if impl == "reference" else impl)
    y.backward(dy)
    recompute: Callable = getattr(module, f"{name}_recompute")
    dx, dbias, recomputed = recompute(dy, x.detach(), bias.detach(), impl=impl)
    assert torch.equal(dx, x.grad) and torch.equal(dbias, bias.grad)
    reference = getattr(module, f"{name}_reference")
    plain = reference(x.detach(), bias.detach())
    exact = reference(x.detach().double(), bias.detach().double())
    assert_as_exact_as_eager(recomputed, plain, exact, f"{impl} y")


@pytest.mark.parametrize("op", OPS, ids=ids)
def test_declared_bytes(monkeypatch: pytest.MonkeyPatch, op: tuple) -> None:
    module, name, wide = op
    x, bias = data(150, 40 * wide, dtype=BF16), data(40 * wide, dtype=BF16)
    dy = data(150, 40, dtype=BF16)
    kernels = [
        getattr(module, f"_{name}_backward_kernel"),
        module.launch_add_strips.__globals__["_add_strips_kernel"],
    ]
    recompute, count = getattr(module, f"{name}_recompute"), getattr(module, f"{name}_bytes")
    seen = moved(monkeypatch, kernels, lambda: recompute(dy, x, bias, impl="triton"))
    assert seen == count(x, bias, True, with_y=True) == count(x, bias, True) + dy.numel() * 2
