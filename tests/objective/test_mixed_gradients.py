"""Gradients of the loss to mean and log-variance: closed form, gradcheck, what cuts them off.

With e = v - u, g = 2 e / (B D) and h the gradient that comes back through the network's input:
    G = dL/dx0 = sigma_m h - d_sigma g
    dL/dmean    = w G + lam mean / (B D)
    dL/dlog_var = G eps w exp(l) / (2 s) + lam expm1(l) / (2 B D)       mode "moments"
                = G eps1 w exp(l / 2) / 2 + the same                    mode "samples"
"""

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast import MixFlow
from mixflow_fast.flow import engine_times, get_path
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.mixed_source import mix_and_interpolate_reference
from mixflow_fast.kernels.philox import Stream
from tests.support.kernels import relative_rms

B, SHAPE = 5, (3, 4, 4)
LAM = 0.3


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, 1, 1, 1)


def tensors(*names: str, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(B, *SHAPE, generator=g, dtype=torch.float64).to(dtype) for _ in names]


def objective(source: MixedSource, **options) -> MixFlow:
    return MixFlow(**{"gamma": 0, "timesteps": "uniform", "source": source, **options})


def noise(stream: Stream, ids: Tensor, seed: int = 0) -> Tensor:
    return philox.normal(seed, stream, ids, 48).view(B, *SHAPE).double()


@pytest.mark.parametrize("clock", ["data_at_1", "noise_at_1"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("mode", ["moments", "samples"])
@pytest.mark.parametrize("slowed", [False, True])
def test_closed_form(slowed: bool, mode: str, path: str, clock: str) -> None:
    x1, mean, log_var = tensors("x1", "mean", "log_var")
    mean.requires_grad_()
    log_var.requires_grad_()
    ids = torch.arange(B) + 7
    t = torch.linspace(0.2, 0.9, B).double()
    m = t * torch.linspace(0.6, 1.0, B) if slowed else t
    own = (t, m) if clock == "data_at_1" else (1 - t, 1 - m)
    source = MixedSource(lambda x1: (mean, log_var), mode=mode, lam=LAM)
    mix = objective(source, path=path, clock=clock)
    it = mix.prepare(x1, ids, t=own[0], slowed_t=own[1])
    sign = 1.0 if clock == "data_at_1" else -1.0
    mix.loss(sign * net(it.x, t), it).backward()

    with torch.no_grad():
        c = get_path(path).coefficients(*engine_times(own[1], clock))
        alpha, sigma, d_alpha, d_sigma = (
            value.view(-1, 1, 1, 1) for value in (c.alpha, c.sigma, c.d_alpha, c.d_sigma)
        )
        w = philox.uniform(0, Stream.SOURCE_WEIGHT, ids).double().view(-1, 1, 1, 1)
        eps, eps1 = noise(Stream.NOISE, ids), noise(Stream.SOURCE_NOISE, ids)
        s = torch.sqrt(1 + w * torch.expm1(log_var))
        if mode == "moments":
            x0 = w * mean + s * eps
            slope = eps * w * torch.exp(log_var) / (2 * s)
        else:
            x0 = w * (mean + torch.exp(log_var / 2) * eps1) + (1 - w) * eps
            slope = eps1 * w * torch.exp(log_var / 2) / 2
        x_m = alpha * x1 + sigma * x0
        v = net(x_m, t)
        g = 2 * (v - (d_alpha * x1 + d_sigma * x0)) / x1.numel()
        h = 0.7 * (1 - torch.tanh(0.7 * x_m) ** 2) * g
        G = sigma * h - d_sigma * g
        kl_scale = LAM / x1.numel()
        assert relative_rms(it.x, x_m) < 1e-15
        assert relative_rms(mean.grad, w * G + kl_scale * mean) < 1e-14
        expected = G * slope + kl_scale * torch.expm1(log_var) / 2
        assert relative_rms(log_var.grad, expected) < 1e-14


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("mode", ["moments", "samples"])
def test_gradcheck(mode: str, path: str) -> None:
    g = torch.Generator().manual_seed(4)
    x1, mean, log_var = torch.randn(3, 3, 2, 2, 2, generator=g, dtype=torch.float64)
    w = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    m = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)

    def mixed(mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return mix_and_interpolate_reference(
            x1,
            mean,
            log_var,
            w,
            m,
            5,
            torch.arange(3),
            clock="noise_at_1",
            path=path,
            mode=mode,
            patch_size=2,
        )

    inputs = mean.requires_grad_(), log_var.requires_grad_()
    assert torch.autograd.gradcheck(mixed, inputs)
    assert torch.autograd.gradgradcheck(mixed, inputs)


def test_gradcheck_of_the_whole_loss() -> None:
    x1, mean, log_var = (full[:2, :, :2, :2] for full in tensors("x1", "mean", "log_var"))
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)

    def loss(mean: Tensor, log_var: Tensor) -> Tensor:
        mix = objective(MixedSource(lambda x1: (mean, log_var), beta=0.02), clock="data_at_1")
        it = mix.prepare(x1, torch.arange(2), t=t, slowed_t=0.9 * t)
        return mix.loss(net(it.x, t), it, reduction="none", weight=torch.tensor([0.5, 3.0]))

    inputs = mean.clone().requires_grad_(), log_var.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("mode", ["moments", "samples"])
def test_detach_leaves_the_source_its_kl_alone(mode: str) -> None:
    x1, mean, log_var = tensors("x1", "mean", "log_var")
    mean.requires_grad_()
    log_var.requires_grad_()
    source = MixedSource(lambda x1: (mean, log_var), mode=mode, lam=LAM, detach=True)
    mix = objective(source, clock="data_at_1")
    it = mix.prepare(x1, torch.arange(B))
    assert not it.x.requires_grad and not it.x0().requires_grad
    loss = mix.loss(net(it.x, it.t), it)
    loss.backward()
    torch.testing.assert_close(mean.grad, LAM * mean.detach() / x1.numel(), rtol=1e-13, atol=0)
    expected = LAM * torch.expm1(log_var.detach()) / (2 * x1.numel())
    torch.testing.assert_close(log_var.grad, expected, rtol=1e-13, atol=0)
    attached = objective(
        MixedSource(lambda x1: (mean, log_var), mode=mode, lam=LAM), clock="data_at_1"
    )
    same = attached.prepare(x1, torch.arange(B))
    assert torch.equal(attached.loss(net(same.x, same.t), same), loss)


@pytest.mark.parametrize("kappa", ["data", "noise", "data+noise", "class"])
def test_a_frozen_source_moves_the_noise_and_adds_no_kl(kappa: str) -> None:
    torch.manual_seed(0)
    channels = 6 if kappa == "data+noise" else 3

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 48)
            self.head = nn.Conv2d(channels, 6, 1)

        def forward(self, kappa: Tensor) -> Tensor:
            picture = kappa if kappa.is_floating_point() else self.table(kappa).view(-1, *SHAPE)
            return self.head(picture)

    predictor = Predictor()
    source = MixedSource(predictor, kappa=kappa, lam=LAM)
    mix = objective(source, clock="data_at_1")
    (x1,) = tensors("x1", dtype=torch.float32)
    y = torch.tensor([0, 1, 2, 3, 1])
    trained = mix.prepare(x1, torch.arange(B), y=y)
    predictor.requires_grad_(False)
    frozen = mix.prepare(x1, torch.arange(B), y=y)
    assert torch.equal(trained.x, frozen.x) and not frozen.x.requires_grad
    assert torch.equal(trained.source.kl, frozen.source.kl) and (frozen.source.kl > 0).all()
    pred = net(trained.x, trained.t).detach()
    with_kl, without = (mix.loss(pred, it, reduction="none") for it in (trained, frozen))
    kl = LAM * trained.source.kl / 48
    torch.testing.assert_close(with_kl, without + kl, rtol=1e-6, atol=0)


def test_weight_multiplies_the_squared_error_alone() -> None:
    x1, mean, log_var = tensors("x1", "mean", "log_var")
    mix = objective(MixedSource(lambda x1: (mean, log_var), lam=LAM), clock="data_at_1")
    it = mix.prepare(x1, torch.arange(B))
    pred = net(it.x, it.t)
    once, nothing = (mix.loss(pred, it, weight=w, reduction="none") for w in (None, 0.0))
    torch.testing.assert_close(nothing, LAM * it.source.kl / 48, rtol=1e-14, atol=0)
    twice = mix.loss(pred, it, weight=2.0, reduction="none")
    torch.testing.assert_close(twice - nothing, 2 * (once - nothing), rtol=1e-13, atol=0)
    loss, samples = mix.loss_and_samples(pred, it, reduction="sum")
    assert torch.equal(samples, once) and torch.equal(loss, once.sum())
