"""The gradient of a given x0, which is part of the target: against autograd in float64."""

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.kernels import philox
from mixflow_fast.kernels.layout import to_tokens
from mixflow_fast.kernels.velocity_loss.op import velocity_loss
from tests.support.kernels import DEVICE, assert_as_exact_as_eager, data, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
SHAPE = (3, 4, 6, 6)
SEED = philox.seed_tensor(3, DEVICE)
TIMES = torch.tensor([0.1, 0.45, 0.8], device=DEVICE)
CLOCKS = (DATA_AT_1, NOISE_AT_1)


def target(x1: Tensor, x0: Tensor, times: Tensor, path: str, clock: str) -> Tensor:
    """d x / d t of the caller's clock, by autograd on x_t itself."""
    t = times.double().view(-1, 1, 1, 1)

    def x(t: Tensor) -> Tensor:
        to_data = t if clock == DATA_AT_1 else 1 - t
        if path == "linear":
            return to_data * x1 + (1 - to_data) * x0
        if path == "gvp":
            half_pi = math.pi / 2
            return torch.sin(half_pi * to_data) * x1 + torch.cos(half_pi * to_data) * x0
        log_alpha = -((1 - to_data) ** 2) * (20 - 0.1) / 4 - (1 - to_data) * 0.1 / 2
        return log_alpha.exp() * x1 + (1 - (2 * log_alpha).exp()).sqrt() * x0

    return torch.func.jvp(x, (t,), (torch.ones_like(t),))[1]


def truth(pred: Tensor, x1: Tensor, x0: Tensor, path: str, clock: str, weight, upstream) -> tuple:
    """(gradient of pred, gradient of x0) of the samples' losses, float64."""
    pred, x0 = (v.detach().double().requires_grad_() for v in (pred, x0))
    error = pred - target(x1.double(), x0, TIMES, path, clock)
    square = error.square() if weight is None else weight.double() * error.square()
    losses = square.flatten(1).mean(1)
    return torch.autograd.grad(losses, [pred, x0], upstream.double())


def ours(pred: Tensor, x1: Tensor, x0: Tensor, upstream: Tensor | None, **options) -> tuple:
    pred, x0 = (v.detach().requires_grad_() for v in (pred, x0))
    options = {"clock": DATA_AT_1, "impl": "triton", "reduction": "none", **options}
    loss, _ = velocity_loss(pred, x1, TIMES, SEED, None, x0=x0, **options)
    return torch.autograd.grad(loss, [pred, x0], upstream)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_paths_and_clocks(path: str, clock: str, impl: str) -> None:
    pred, x1, x0 = (data(*SHAPE, seed=seed) for seed in range(3))
    upstream = torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    weight = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    options = dict(path=path, clock=clock, impl=impl, weight=weight)
    exact = truth(pred, x1, x0, path, clock, weight, upstream)
    for made, expected in zip(ours(pred, x1, x0, upstream, **options), exact, strict=True):
        assert made.dtype == torch.float32 and relative_rms(made, expected) < 2e-6


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reductions_and_the_rounding_of_preds_gradient(dtype: torch.dtype, reduction: str) -> None:
    """For half predictions exactly what pred got, in float32."""
    pred, x1, x0 = (data(*SHAPE, seed=seed) for seed in range(3))
    pred, x1 = pred.to(dtype), x1.to(dtype)
    upstream = torch.rand(3 if reduction == "none" else (), device=DEVICE) + 0.5
    each = upstream.expand(3) / (3 if reduction == "mean" else 1)
    exact = truth(pred, x1, x0, "linear", DATA_AT_1, None, each)
    made = ours(pred, x1, x0, upstream, reduction=reduction)
    assert made[0].dtype == dtype and made[1].dtype == torch.float32
    assert torch.equal(made[1], made[0].float())
    # fp16 with 2 / E of 1/432 is below its normal numbers.
    floor = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    assert relative_rms(made[1], exact[1]) < floor
    mirrored = ours(pred, x1, x0, upstream, reduction=reduction, clock=NOISE_AT_1)
    assert torch.equal(mirrored[1], -mirrored[0].float())


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("patch_size", [0, 2, 3])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_tokens_and_sigma_channels(path: str, patch_size: int, learn_sigma: bool) -> None:
    """Half of pred's channels, in their places in the image."""
    x1, x0 = data(*SHAPE, seed=1), data(*SHAPE, seed=2)
    image = data(3, 8 if learn_sigma else 4, 6, 6)
    upstream = torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    pred = to_tokens(image, patch_size) if patch_size else image
    options = dict(path=path, patch_size=patch_size, learn_sigma=learn_sigma)
    of_x0 = ours(pred, x1, x0, upstream, **options)[1]
    exact = truth(image[:, :4], x1, x0, path, DATA_AT_1, None, upstream)[1]
    assert of_x0.shape == SHAPE
    assert_as_exact_as_eager(of_x0, exact.float(), exact, "dx0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_network_that_is_not_trained(dtype: torch.dtype) -> None:
    pred, x1, x0 = (data(*SHAPE, seed=seed) for seed in range(3))
    x0.requires_grad_()
    loss, samples = velocity_loss(
        pred.to(dtype), x1, TIMES, SEED, None, clock=DATA_AT_1, x0=x0, impl="triton"
    )
    assert not samples.requires_grad
    (of_x0,) = torch.autograd.grad(loss, x0)
    each = torch.full((3,), 1 / 3, device=DEVICE)
    exact = truth(pred.to(dtype), x1, x0, "linear", DATA_AT_1, None, each)[1]
    assert relative_rms(of_x0, exact) < (1e-6 if dtype == torch.float32 else 1e-2)


def test_asked_for_twice_and_both_at_once() -> None:
    """The gradient in memory is scaled in place: x0's must not be a second name of the old one."""
    pred, x1, x0 = (data(*SHAPE, seed=seed).requires_grad_() for seed in range(3))
    x1 = x1.detach()
    loss, _ = velocity_loss(pred, x1, TIMES, SEED, None, clock=DATA_AT_1, x0=x0, impl="triton")
    first = torch.autograd.grad(2 * loss, [pred, x0], retain_graph=True)
    again = torch.autograd.grad(2 * loss, [pred, x0], retain_graph=True)
    (2 * loss).backward()
    for a, b, leaf in zip(first, again, (pred, x0), strict=True):
        assert torch.equal(a, b) and torch.equal(a, leaf.grad)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        loss, _ = velocity_loss(pred, x1, TIMES, SEED, None, clock=DATA_AT_1, x0=x0, impl="triton")
        torch.autograd.grad(loss, x0, create_graph=True)


@pytest.mark.parametrize("prediction", ["noise", "data", "score"])
def test_other_predictions_are_refused(prediction: str) -> None:
    pred, x1, x0 = (data(*SHAPE, seed=seed) for seed in range(3))
    options = dict(clock=DATA_AT_1, prediction=prediction, impl="triton")
    with pytest.raises(ValueError, match='prediction="velocity" alone'):
        velocity_loss(pred, x1, TIMES, SEED, None, x0=x0.requires_grad_(), **options)
    with torch.no_grad():
        velocity_loss(pred, x1, TIMES, SEED, None, x0=x0, **options)


def test_compiled() -> None:
    torch._dynamo.reset()
    x1 = data(*SHAPE, seed=1)

    def step(pred: Tensor, x0: Tensor) -> Tensor:
        tokens = to_tokens(pred, 2)
        options = dict(path="gvp", learn_sigma=True, patch_size=2, impl="triton")
        return velocity_loss(tokens, x1, TIMES, SEED, None, clock=DATA_AT_1, x0=x0, **options)[0]

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pred, x0 = data(3, 8, 6, 6).requires_grad_(), data(*SHAPE, seed=2).requires_grad_()
        (1.5 * call(pred, x0)).backward()
        found.append((pred.grad, x0.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
