"""`MixFlow(source=..., impl="triton")`: the kernels against the reference and float64."""

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast import MixFlow, Moments
from mixflow_fast.diagnostics.kernel_checks import against_eager
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.objective.source_health import source_health
from tests.support.kernels import DEVICE, assert_as_exact_as_eager

B, SHAPE = 3, (4, 4, 8)
IDS = torch.tensor([3, 2**33, 11])
CLOCKS = ("data_at_1", "noise_at_1")


def data(dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(2)
    return torch.randn(B, *SHAPE, generator=g).to(DEVICE, dtype)


class Given(nn.Module):
    """Mean and log-variance as parameters, whose gradients are looked at."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.moments = nn.Parameter(torch.randn(B, 8, 4, 8, generator=g))

    def forward(self, kappa: Tensor) -> Tensor:
        return self.moments * 1.0


def mixflow(impl: str, source: MixedSource | None = None, **options) -> MixFlow:
    options = {"gamma": 0, "timesteps": "uniform", "clock": "data_at_1", **options}
    return MixFlow(**options, source=source, impl=impl)


def net(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype)


def step(
    impl: str,
    x1: Tensor | Moments,
    mode: str = "moments",
    patch_size: int | None = None,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    precise: bool = False,
    detach: bool = False,
    **options,
) -> dict[str, Tensor]:
    """Results and gradients of one training step; `precise` is the reference in float64."""
    predictor = Given().to(DEVICE, torch.float64 if precise else torch.float32)
    source = MixedSource(predictor, mode=mode, lam=0.3, detach=detach)
    mix = mixflow(impl, source, **options)
    it = mix.prepare(x1, IDS.to(DEVICE), patch_size=patch_size, dtype=dtype)
    pred = net(it.x, it.t)
    weight = torch.tensor([0.5, 1.0, 2.0], device=DEVICE)
    loss, samples = mix.loss_and_samples(pred, it, weight=weight, reduction=reduction)
    (loss * torch.linspace(1, 2, B, device=DEVICE)).sum().backward()
    return {
        "x": it.x.detach(),
        "x0": it.x0().detach(),
        "kl": it.source.kl.detach(),
        "loss": loss.detach(),
        "samples": samples,
        "grad": predictor.moments.grad,
    }


def assert_as_exact(
    ours: Tensor, eager: Tensor, truth: Tensor, name: str, dtype: torch.dtype
) -> None:
    """As exact as the reference, and for the gradient of a 16-bit step: up to two roundings.

    The target's gradient is read off that of the prediction, which is stored in the network's
    dtype and there multiplied by the upstream gradient.
    """
    if name != "grad" or dtype == torch.float32:
        assert_as_exact_as_eager(ours, eager, truth, name)
        return
    error, limit, _ = against_eager(ours, eager, truth)
    assert error <= limit + torch.finfo(dtype).eps, (name, error, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("mode", ["moments", "samples"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_as_exact_as_the_reference(path: str, mode: str, clock: str, dtype: torch.dtype) -> None:
    x1 = data(dtype)
    options = dict(mode=mode, path=path, clock=clock)
    ours, eager = (step(impl, x1, **options) for impl in ("triton", "reference"))
    truth = step("reference", x1.double(), precise=True, **options)
    for name, value in ours.items():
        assert value.dtype == eager[name].dtype, name
        assert_as_exact(value, eager[name], truth[name], name, dtype)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_reductions_and_tokens(patch_size: int | None, reduction: str) -> None:
    options = dict(patch_size=patch_size, reduction=reduction, clock="noise_at_1", path="vp")
    ours, eager = (step(impl, data(), **options) for impl in ("triton", "reference"))
    truth = step("reference", data().double(), precise=True, **options)
    for name, value in ours.items():
        assert value.shape == eager[name].shape, name
        assert_as_exact_as_eager(value, eager[name], truth[name], name)


def test_moments_of_a_posterior() -> None:
    latents = Moments(data(torch.float16), torch.full_like(data(torch.float16), 0.5), 0.18215)
    ours, eager = (step(impl, latents, dtype=torch.bfloat16) for impl in ("triton", "reference"))
    precise = Moments(latents.mean.double(), latents.std.double(), latents.scale)
    truth = step("reference", precise, precise=True)
    for name, value in ours.items():
        assert_as_exact(value, eager[name], truth[name], name, torch.bfloat16)


def test_detached() -> None:
    ours, eager = (step(impl, data(), detach=True) for impl in ("triton", "reference"))
    for name, value in ours.items():
        torch.testing.assert_close(value, eager[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("clock", "timesteps"), [("data_at_1", "uniform"), ("noise_at_1", "beta21")]
)
@pytest.mark.parametrize("case", ["w = 0, moments", "w = 0, samples", "zero moments"])
def test_bits_of_plain_mixflow(case: str, timesteps: str, clock: str) -> None:
    """Of the kernels of plain MixFlow: times, input, and the noise that they never store."""
    if case == "zero moments":
        source = MixedSource(lambda x1: torch.zeros(B, 8, 4, 8, device=DEVICE), lam=0.3)
    else:
        mode = case.removeprefix("w = 0, ")
        source = MixedSource(Given().to(DEVICE), mode=mode, w=0, lam=0.0)
    options = dict(clock=clock, timesteps=timesteps)
    ours, theirs = mixflow("triton", source, **options), mixflow("triton", **options)
    for dtype, patch_size in ((torch.float32, None), (torch.bfloat16, 2)):
        x1, ids = data(dtype), IDS.to(DEVICE)
        a = ours.prepare(x1, ids, patch_size=patch_size)
        b = theirs.prepare(x1, ids, patch_size=patch_size)
        assert torch.equal(a.t, b.t) and torch.equal(a.slowed_t, b.slowed_t)
        assert torch.equal(a.x, b.x) and torch.equal(a.x0(), b.x0())
        pred = net(b.x, b.t)
        losses = ours.loss(pred, a, reduction="none"), theirs.loss(pred, b, reduction="none")
        assert torch.equal(losses[0], losses[1])


def test_slowed_times_of_a_frozen_source() -> None:
    frozen = Given().to(DEVICE).requires_grad_(False)
    options = dict(gamma=0.4, timesteps="beta21", shift=2.0, clock="noise_at_1")
    source = MixedSource(frozen, lam=1.0)
    a, b, plain = (
        mixflow(impl, chosen, **options).prepare(data(), IDS.to(DEVICE))
        for impl, chosen in (("triton", source), ("reference", source), ("triton", None))
    )
    assert torch.equal(a.t, plain.t) and torch.equal(a.slowed_t, plain.slowed_t)
    torch.testing.assert_close(a.x, b.x, rtol=1e-5, atol=1e-5)
    assert not a.x.requires_grad


@pytest.mark.parametrize("prediction", ["noise", "data"])
def test_other_predictions_take_the_reference(prediction: str) -> None:
    ours, eager = (step(impl, data(), prediction=prediction) for impl in ("triton", "reference"))
    assert all(torch.equal(value, eager[name]) for name, value in ours.items())


def test_compiles_in_one_piece() -> None:
    mix = mixflow("triton", MixedSource(Given().to(DEVICE), lam=0.3))

    def loss(x1: Tensor, ids: Tensor) -> Tensor:
        it = mix.prepare(x1, ids)
        return mix.loss(net(it.x, it.t), it)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    x1, ids = data(), IDS.to(DEVICE)
    expected = torch.autograd.grad(loss(x1, ids), mix.source.predictor.moments)
    got = torch.autograd.grad(compiled(x1, ids), mix.source.predictor.moments)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


def test_health_is_the_same() -> None:
    found = []
    for impl in ("triton", "reference"):
        mix = mixflow(impl, MixedSource(Given().to(DEVICE), lam=0.3))
        it = mix.prepare(data(), IDS.to(DEVICE))
        found.append(source_health(it, mix.loss_and_samples(net(it.x, it.t), it)[1]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6, equal_nan=True)
