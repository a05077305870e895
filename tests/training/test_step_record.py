"""Parts of numerical safety by themselves: the record, the optimizer that skips, gradient norms."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.optim.adamw_ema import AdamWEMA
from mixflow_fast.optim.skip_nonfinite import PIECE, skipping
from mixflow_fast.training.nonfinite_report import grad_norms
from mixflow_fast.training.step_record import StepRecord


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


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_record_leaves_loss_and_gradient_as_they_are(impl: str) -> None:
    mix = MixFlow(0.8, "data_at_1", impl=impl)
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    it = mix.prepare(x, ids=torch.arange(3))
    gradients = []
    for noted in (False, True):
        pred = (0.5 * it.x).requires_grad_()
        loss = mix.loss(pred, it)
        record = StepRecord(x.device, 2, 1, 3)
        back = record.micro_batch(loss, mix, pred, it) if noted else loss
        assert torch.equal(back, loss)
        back.backward()
        gradients.append(pred.grad)
    assert torch.equal(*gradients)
    # An infinite loss of a finite gradient: 2e25 squared is out of float32's range.
    pred = torch.full_like(x, 2e25).requires_grad_()
    loss = mix.loss(pred, it)
    assert loss.isinf()
    plain = torch.autograd.grad(loss, pred, retain_graph=impl == "reference")[0]
    assert plain.isfinite().all()
    record = StepRecord(x.device, 2, 1, 3)
    loss = mix.loss(pred, it)
    record.micro_batch(loss, mix, pred, it).backward()
    assert pred.grad.isnan().all()


def test_the_record_of_several_steps() -> None:
    mix = MixFlow(0.0, "data_at_1", impl="reference")
    x = torch.zeros(2, 1, 2, 2)
    record = StepRecord(x.device, 3, 1, 2)
    for step in range(1, 4):
        it = mix.prepare(x, ids=torch.arange(2) + 2 * step)
        pred = torch.zeros_like(x)
        pred[1] = torch.inf if step == 2 else float(step)
        loss = record.micro_batch(mix.loss(pred, it), mix, pred, it)
        record.end_step(step, torch.stack([loss, loss]), torch.inf if step == 2 else 1.0)
    seen = record.look()
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [bad is None for _, bad in seen] == [True, False, True]
    bad = seen[1][1]
    assert (bad.step, bad.norm) == (2, torch.inf)
    assert bad.each.isfinite().tolist() == [[True, False]] and bad.losses.isinf().all()
    assert record.look() == []


def test_grad_norms_by_module() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    net.frozen = torch.nn.Parameter(torch.ones(2))
    net(torch.ones(5, 3)).square().sum().backward()
    found = grad_norms({name: p.grad for name, p in net.named_parameters()})
    assert set(found) == {"0", "1"}
    for name in found:
        expected = torch.cat([p.grad.flatten() for p in net[int(name)].parameters()]).norm()
        assert found[name] == pytest.approx(float(expected), rel=1e-6)
