"""CPU regressions of the PyTorch reference: `pytest benchmarks/` (pytest-benchmark).

Compare two commits on one machine: `--benchmark-save=NAME`, then `--benchmark-compare=NAME
--benchmark-compare-fail=median:30%`. These are times of the path that runs without a GPU, and say
nothing about the kernels.
"""

import pytest
import torch

from mixflow_fast import MixFlow
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.philox import Stream

SHAPE = (8, 4, 32, 32)


@pytest.fixture
def batch() -> tuple[MixFlow, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x1 = torch.randn(SHAPE, generator=generator)
    return MixFlow(clock="data_at_1", impl="reference"), x1, torch.arange(SHAPE[0])


def test_prepare(benchmark, batch) -> None:
    mix, x1, ids = batch
    it = benchmark(mix.prepare, x1, ids=ids)
    assert it.x.shape == SHAPE and bool(it.x.isfinite().all())


def test_loss_and_gradient(benchmark, batch) -> None:
    mix, x1, ids = batch
    it = mix.prepare(x1, ids=ids)
    pred = torch.zeros(SHAPE, requires_grad=True)

    def run() -> torch.Tensor:
        return torch.autograd.grad(mix.loss(pred, it), pred)[0]

    target = x1 - it.x0()
    torch.testing.assert_close(benchmark(run), -2 * target / target.numel())


def test_philox_normal(benchmark) -> None:
    ids = torch.arange(SHAPE[0])
    noise = benchmark(philox.normal_reference, 0, Stream.NOISE, ids, 4096)
    assert abs(noise.mean().item()) < 0.05 and abs(noise.std().item() - 1) < 0.05
