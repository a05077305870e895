"""The optimizer that skips a bad step on the device."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.skip_nonfinite import PIECE, skipping
from tests.support.csrc_library import require_library


@pytest.mark.parametrize("impl", ["auto", "foreach"])
def test_skipping_in_pieces(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """Several pieces a parameter, several parameters a batch: the bits of the plain optimizer."""
    monkeypatch.setitem(PIECE, "cpu", 7)
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 4), (3,), (2,), (9,), (6, 6)]
    values = [torch.randn(shape, generator=g) for shape in shapes]
    values[-1] = values[-1].T  # not contiguous: taken whole
    pairs = []
    for kind in (AdamWEMA, skipping(AdamWEMA)):
        params = [torch.nn.Parameter(value.clone()) for value in values]
        more = dict(impl=impl, grad_clip=1.0, weight_decay=0.1, ema_sigma_rel=(0.1,))
        pairs.append((params, kind(params, ema_decay=(0.5, 0.9), **more)))
    for step in range(4):
        grads = [torch.randn(value.shape, generator=g) for value in values]
        for params, optimizer in pairs:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        for p, q in zip(*(params for params, _ in pairs), strict=True):
            assert torch.equal(p, q), step
            a, b = pairs[0][1].state[p], pairs[1][1].state[q]
            assert a.keys() == b.keys() and a["step"] == b["step"] == step + 1
            assert all(torch.equal(a[k], b[k]) for k in a if k != "step")
    params, optimizer = pairs[1]
    assert len(optimizer.state) == len(params)
    before = [p.detach().clone() for p in params]
    kept = [{k: v.clone() for k, v in optimizer.state[p].items() if k != "step"} for p in params]
    for place, p in enumerate(params):
        p.grad = torch.full_like(p, torch.nan if place == 2 else 1.0)
    optimizer.step()
    for p, old, state in zip(params, before, kept, strict=True):
        assert torch.equal(p, old)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


class Operators(TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def optimizer_of(kind: type[AdamWEMA], impl: str) -> tuple[AdamWEMA, list[torch.Tensor]]:
    """With bfloat16 copies, after two steps."""
    g = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size, generator=g)) for size in (5, 3000, 77)]
    optimizer = kind(params, ema_decay=(0.5, 0.9), grad_clip=1.0, weight_decay=0.1, impl=impl)
    copies = [torch.zeros_like(p, dtype=torch.bfloat16) for p in params]
    optimizer.set_copies(dict(zip(params, copies, strict=True)))
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    states = [v for p in params for v in optimizer.state[p].values() if isinstance(v, torch.Tensor)]
    return optimizer, [*(p.detach() for p in params), *copies, *states]


@pytest.mark.parametrize("impl", ["csrc", "foreach"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_step_writes_nothing(impl: str, bad: float) -> None:
    """Weights, copies, moments and EMAs; before it the bits of the optimizer that never skips."""
    if impl == "csrc":
        require_library()
    _, plain = optimizer_of(AdamWEMA, impl)
    optimizer, found = optimizer_of(skipping(AdamWEMA), impl)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    (params,) = (group["params"] for group in optimizer.param_groups)
    for p in params:
        p.grad = torch.ones_like(p)
    params[0].grad[3] = bad
    with Operators() as operators:
        optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert [optimizer.state[p]["step"] for p in params] == [3, 3, 3]
    if impl == "csrc":  # in one pass, and nobody asked on the host
        assert operators.names.count("mixflow_fast::adamw_ema_") == 1
        assert not {"aten::clone", "aten::where", "aten::isfinite", "aten::_local_scalar_dense"} & {
            *operators.names
        }
