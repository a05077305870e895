"""`MixFlow(source=MixedSource(...))`: draws, bits of plain MixFlow, gradients, refusals."""

import pytest
import torch
from torch import nn

from mixflow_fast import MixFlow, Moments
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.source import MixedSource

CLOCKS = (DATA_AT_1, NOISE_AT_1)


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def predictor(channels: int = 3, seed: int = 0) -> nn.Conv2d:
    torch.manual_seed(seed)
    return nn.Conv2d(channels, 6, 3, padding=1)


def plain(**options) -> MixFlow:
    return MixFlow(**{"gamma": 0, "timesteps": "uniform", "clock": DATA_AT_1, **options})


def data(dtype: torch.dtype = torch.float32, n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["w = 0, moments", "w = 0, samples", "zero moments"])
def test_bits_of_plain_mixflow(clock: str, path: str, dtype: torch.dtype, case: str) -> None:
    x1, ids = data(dtype), torch.arange(4)
    if case == "zero moments":
        zero = torch.zeros(4, 6, 4, 4)
        source = MixedSource(lambda x1: zero, lam=0.3)
    else:
        source = MixedSource(predictor(), mode=case.removeprefix("w = 0, "), w=0, lam=0.0)
    ours, theirs = plain(clock=clock, path=path, source=source), plain(clock=clock, path=path)
    for patch_size in (None, 2):
        a = ours.prepare(x1, ids, patch_size=patch_size)
        b = theirs.prepare(x1, ids, patch_size=patch_size)
        for name in ("x", "t", "slowed_t"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype
        assert torch.equal(a.x0(), b.x0())
        pred = net(b.x, b.t)
        for reduction in ("none", "sum", "mean"):
            loss = theirs.loss(pred, b, reduction=reduction)
            assert torch.equal(ours.loss(pred, a, reduction=reduction), loss)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", ["moments", "samples"])
def test_gradients_reach_the_predictor(clock: str, mode: str) -> None:
    source = MixedSource(predictor(), mode=mode, lam=0.3)
    mix = plain(clock=clock, source=source)
    it = mix.prepare(data(), torch.arange(4))
    assert it.x.requires_grad and it.x0().requires_grad and it.source.kl.shape == (4,)
    mix.loss(net(it.x, it.t), it).backward()
    assert source.predictor.weight.grad.abs().min() > 0


def test_moments_of_a_posterior_show_the_predictor_the_sample_in_use() -> None:
    seen = []

    def watch(x1: torch.Tensor) -> torch.Tensor:
        seen.append(x1)
        return torch.zeros(4, 6, 4, 4)

    latents = Moments(data(torch.float16), torch.full((4, 3, 4, 4), 0.5).half(), 0.18215)
    mix = plain(source=MixedSource(watch, lam=1.0))
    it = mix.prepare(latents, torch.arange(4), dtype=torch.bfloat16)
    assert torch.equal(seen[0], it.x1) and it.x.dtype == torch.bfloat16
    assert torch.equal(it.x, plain().prepare(latents, torch.arange(4), dtype=torch.bfloat16).x)
