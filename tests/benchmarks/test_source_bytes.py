"""What a mixed source moves: the table of benchmarks/README.md, and ours by what is launched."""

import pytest
import torch

from benchmarks import source_bytes
from benchmarks.source_bytes import PARTS, SHAPE
from mixflow_fast.flow import DATA_AT_1
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source import mix_and_interpolate
from mixflow_fast.kernels.mixed_source import triton_kernels as source_kernels
from mixflow_fast.kernels.velocity_loss import triton_kernels as loss_kernels
from mixflow_fast.kernels.velocity_loss.op import velocity_loss
from tests.support.kernels import BF16, DEVICE, data, moved


def test_ours_are_what_the_kernels_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    B, C, H, W = SHAPE
    seed, ids = philox.seed_tensor(3, DEVICE), torch.arange(B, device=DEVICE)
    x1, predicted = data(*SHAPE, dtype=BF16), data(B, 2 * C, H, W).requires_grad_()
    m = torch.full((B,), 0.4, device=DEVICE)
    found = {}

    def forward() -> None:
        options = dict(clock=DATA_AT_1, path="linear", mode="moments", impl="triton")
        found["made"] = mix_and_interpolate(x1, predicted, None, m, m, seed, ids, **options)

    def backward() -> None:
        x, x0, kl = found["made"]
        upstream = data(*SHAPE, dtype=BF16), data(*SHAPE), data(B)
        torch.autograd.grad((x, x0, kl), predicted, upstream)

    def loss() -> None:
        pred, x0 = data(*SHAPE, dtype=BF16).requires_grad_(), data(*SHAPE).requires_grad_()
        velocity_loss(pred, x1, m, seed, ids, clock=DATA_AT_1, x0=x0, impl="triton")

    def per_element(kernel: object, call) -> float:
        return moved(monkeypatch, [kernel], call) / x1.numel()

    # (B,) tensors and partial sums are the rest. The halves of a gradient have one address each.
    source, of_loss = (source_bytes.ours(part) for part in PARTS)
    of_kernel = per_element(source_kernels._mixed_source_kernel, forward)
    assert of_kernel == pytest.approx(source.forward, rel=0.01)
    of_kernel = per_element(source_kernels._source_backward_kernel, backward)
    assert of_kernel == pytest.approx(source.backward, rel=0.01)
    of_kernel = per_element(loss_kernels._velocity_loss_kernel, loss)
    assert of_kernel == pytest.approx(of_loss.forward, rel=0.01)


def test_a_compiler_at_its_best_moves_more(capsys: pytest.CaptureFixture) -> None:
    for part in PARTS:
        eager, compiled, ours = (
            count(part) for count in (source_bytes.eager, source_bytes.compiled, source_bytes.ours)
        )
        assert ours.total < compiled.total < eager.total / 3
        assert ours.launches < eager.launches / 3
    # The noise that it keeps, written and read again.
    source = source_bytes.compiled("source")
    assert source.total - source_bytes.ours("source").total == pytest.approx(8, rel=0.01)
    assert source_bytes.main() == 0
    assert capsys.readouterr().out.count("ours") == 2
