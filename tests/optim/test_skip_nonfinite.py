"""The optimizer that skips a bad step on the device."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.skip_nonfinite import PIECE, skipping


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
