"""The record of the last steps on the device."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.objective.mixflow import MixFlow
from mixflow_fast.training.step_record import StepRecord


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
    seen = record.drain()
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [bad is None for _, bad in seen] == [True, False, True]
    bad = seen[1][1]
    assert (bad.step, bad.norm) == (2, torch.inf)
    assert bad.each.isfinite().tolist() == [[True, False]] and bad.losses.isinf().all()
    assert record.drain() == []
