"""The record of the last steps on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mixflow_fast.objective.mixflow import Interpolation, MixFlow
from mixflow_fast.training.step_record import T_BUCKETS, StepOutput, StepRecord


def output(mix: MixFlow, pred: torch.Tensor, it: Interpolation) -> StepOutput:
    loss, samples = mix.loss_and_samples(pred, it)
    y = torch.zeros(len(pred), dtype=torch.int64)
    return StepOutput(it, y, pred, torch.full((), 0.25), loss, samples)


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone, where there is none from an earlier test."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder / 'group'}", rank=0, world_size=1
        )
    try:
        yield
    finally:
        if made:
            dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_the_record_leaves_loss_and_gradient_as_they_are(impl: str) -> None:
    mix = MixFlow(0.8, "data_at_1", impl=impl)
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    it = mix.prepare(x, ids=torch.arange(3))
    gradients = []
    for noted in (False, True):
        pred = (0.5 * it.x).requires_grad_()
        made = output(mix, pred, it)
        loss = mix.loss(pred, it)
        record = StepRecord(x.device, 2, 1, 3)
        back = record.micro_batch(made) if noted else loss
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
    record.micro_batch(output(mix, pred, it)).backward()
    assert pred.grad.isnan().all()


def test_the_record_of_several_steps() -> None:
    mix = MixFlow(0.0, "data_at_1", impl="reference")
    x = torch.zeros(2, 1, 2, 2)
    record = StepRecord(x.device, 3, 1, 2)
    for step in range(1, 4):
        it = mix.prepare(x, ids=torch.arange(2) + 2 * step)
        pred = torch.zeros_like(x)
        pred[1] = torch.inf if step == 2 else float(step)
        record.micro_batch(output(mix, pred, it))
        record.end_step(step, torch.inf if step == 2 else 1.0)
    seen = record.drain()
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [bad is None for _, bad in seen] == [True, False, True]
    bad = seen[1][1]
    assert (bad.step, bad.norm) == (2, torch.inf)
    assert bad.each.isfinite().tolist() == [[True, False]] and bad.losses.isinf().all()
    assert record.drain() == []


def test_means_of_the_good_steps(tmp_path: Path) -> None:
    """Over more steps than are added up at once, against sums made here one by one."""
    mix = MixFlow(0.8, "data_at_1", impl="reference")
    steps, parts, size = 70, 2, 3
    record = StepRecord(torch.device("cpu"), steps, parts, size)
    losses, by_t = [], torch.zeros(2, T_BUCKETS, dtype=torch.float64)
    for step in range(1, steps + 1):
        norm = torch.nan if step % 5 == 0 else 1.0 + step
        own = []
        for part in range(parts):
            x = torch.randn(size, 1, 2, 2, generator=torch.Generator().manual_seed(step))
            it = mix.prepare(x, ids=torch.arange(size) + 10 * step + 5 * part)
            made = output(mix, 0.1 * step * it.x, it)
            own.append(made.loss)
            record.micro_batch(made)
            for t, loss in zip(it.t.tolist(), made.samples.tolist(), strict=True):
                if step % 5:
                    by_t[:, min(int(t * T_BUCKETS), T_BUCKETS - 1)] += torch.tensor([loss, 1.0])
        means = record.end_step(step, torch.tensor(norm) if step % 2 else norm)
        assert means.tolist() == pytest.approx([float(sum(own)) / parts, 0.25], rel=1e-6)
        if step % 5:
            losses.append(float(means[0]))
    seen = record.drain()
    assert [number for number, bad in seen if bad is not None] == list(range(5, steps + 1, 5))
    assert record.last_norm != record.last_norm  # that of step 70, NaN
    with one_rank(tmp_path):
        (count, loss, alignment), found = record.means()
    assert count == len(losses) == 56
    assert float(loss) == pytest.approx(sum(losses) / 56, rel=1e-6) and float(alignment) == 0.25
    torch.testing.assert_close(found, by_t, rtol=1e-12, atol=0)
    record.clear_means()
    assert record.drain() == [] and record._sums.count_nonzero() == 0
