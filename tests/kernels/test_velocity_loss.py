"""The loss kernel and its gradient against the reference, float64 and itself."""

import itertools

import pytest
import torch
from torch.autograd import forward_ad

from mixflow_fast import MixFlow, Moments, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.kernels.interpolate import to_tokens
from mixflow_fast.kernels.layout import from_tokens
from tests.support.kernels import DEVICE, assert_as_exact_as_eager, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IDS = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)
SHAPE = (3, 4, 6, 6)
PREDICTIONS = [
    ("velocity", "linear", None),
    ("velocity", "gvp", None),
    ("velocity", "vp", None),
    ("noise", "linear", "likelihood"),
    ("noise", "vp", "velocity"),
    ("data", "linear", None),
    ("score", "gvp", "likelihood"),
    ("score", "linear", None),
]


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def uniform(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)


WEIGHTS = {
    "none": None,
    "number": 0.7,
    "sample": uniform(3),
    "mask": uniform(3, 1, 6, 6) > 0.3,
    "channel": uniform(1, 4, 1, 1),
    "rows": uniform(3, 4, 6, 1),
    "element": uniform(*SHAPE),
}


def run(impl: str, pred: torch.Tensor, x1: object = None, **arguments: object) -> tuple:
    """(loss, gradient of pred) for an upstream gradient of 1, or `upstream`."""
    options = {
        key: arguments.pop(key)
        for key in ("clock", "prediction", "path", "loss_weight", "target_at")
        if key in arguments
    }
    mix = MixFlow(impl=impl, seed=3, **{"clock": DATA_AT_1, **options})
    upstream = arguments.pop("upstream", None)
    it = mix.prepare(data(*SHAPE) if x1 is None else x1, arguments.pop("ids", IDS))
    pred = pred.detach().requires_grad_()
    loss = mix.loss(pred, it, **arguments)
    loss.backward(torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), pred.grad


def assert_like_reference(pred: torch.Tensor, floor: float = 1e-6, **arguments: object) -> None:
    ours, plain = (run(impl, pred, **arguments) for impl in ("triton", "reference"))
    for name, a, b in zip(("loss", "gradient"), ours, plain, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert relative_rms(a, b) < floor, name


@pytest.mark.parametrize(("prediction", "path", "loss_weight"), PREDICTIONS)
@pytest.mark.parametrize("clock", [DATA_AT_1, NOISE_AT_1])
@pytest.mark.parametrize("target_at", ["slowed", "label"])
def test_predictions_paths_and_weights(
    prediction: str, path: str, loss_weight: str | None, clock: str, target_at: str
) -> None:
    options = dict(prediction=prediction, path=path, loss_weight=loss_weight, clock=clock)
    assert_like_reference(data(*SHAPE, seed=1), 2e-6, target_at=target_at, **options)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_and_reductions(weight: str, reduction: str) -> None:
    arguments = dict(weight=WEIGHTS[weight], reduction=reduction)
    assert_like_reference(data(*SHAPE, seed=1), **arguments)


@pytest.mark.parametrize("weight", ["none", "sample", "mask", "channel", "rows"])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("learn_sigma", [False, True])
def test_token_predictions(weight: str, patch_size: int, learn_sigma: bool) -> None:
    """The same loss as of the image, the same gradient moved, nothing for the sigma half."""
    image = data(3, 8 if learn_sigma else 4, 6, 6, seed=1)
    arguments = dict(weight=WEIGHTS[weight], learn_sigma=learn_sigma, reduction="none")
    loss, gradient = run("triton", to_tokens(image, patch_size), **arguments)
    whole, expected = run("reference", image, **arguments)
    assert relative_rms(loss, whole) < 1e-6
    gradient = from_tokens(gradient, expected.shape, patch_size)
    assert relative_rms(gradient, expected) < 1e-6
    if learn_sigma:
        assert not gradient[:, 4:].any() and gradient[:, :4].any()


def test_sigma_half_of_images_gets_zero() -> None:
    image = data(3, 8, 6, 6, seed=1)
    loss, gradient = run("triton", image, learn_sigma=True)
    half, expected = run("triton", image[:, :4])
    assert torch.equal(loss, half)
    assert torch.equal(gradient[:, :4], expected) and not gradient[:, 4:].any()


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("shape", [(3, 64), (2, 7, 1023), (2, 20_000), (3, 5, 3, 7)])
def test_shapes(moments: bool, shape: tuple[int, ...]) -> None:
    """Odd sizes, no channels, several programs a sample, more than one tile a program."""
    x1 = data(*shape)
    given = Moments(x1, data(*shape, seed=2).abs(), 0.5) if moments else x1
    arguments = dict(x1=given, ids=IDS[: shape[0]], reduction="none")
    assert_like_reference(data(*shape, seed=1), **arguments)


@pytest.mark.parametrize("prediction", ["velocity", "score"])
@pytest.mark.parametrize(
    ("dtype", "pred_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_errors_by_time_are_eagers(
    prediction: str, dtype: torch.dtype, pred_dtype: torch.dtype
) -> None:
    """Loss and gradient against float64 in four buckets of t, two samples each."""
    t = torch.tensor([0.01, 0.2, 0.3, 0.45, 0.55, 0.7, 0.8, 0.99], device=DEVICE)
    x1, x0 = data(8, 3, 20, dtype=dtype), data(8, 3, 20, seed=1)
    given = data(8, 3, 20, seed=2, dtype=pred_dtype)
    mix = MixFlow(clock=DATA_AT_1, prediction=prediction, impl="triton")
    it = mix.prepare(x1, x0=x0, t=t, slowed_t=t)
    upstream = torch.linspace(0.3, 2.9, 8, device=DEVICE)
    results = {}
    for name, compute in (("ours", None), ("eager", torch.float32), ("truth", torch.float64)):
        if compute is None:
            pred = given.clone().requires_grad_()
            losses = mix.loss(pred, it, reduction="none")
            (losses * upstream).sum().backward()
        else:
            # The network's output is what it is: eager rounds its gradient to that dtype.
            source = torch.float64 if name == "truth" else pred_dtype
            pred = given.detach().to(source, copy=True).requires_grad_()
            p, a, b = (v.to(compute) for v in (pred, x1, x0))
            sigma = 1 - t.to(compute).view(-1, 1, 1)
            error = p - (a - b) if prediction == "velocity" else p * sigma + b
            losses = (error**2).flatten(1).mean(1)
            (losses * upstream.to(compute)).sum().backward()
        results[name] = losses.detach(), pred.grad
    for bucket in range(4):
        rows = (t >= bucket / 4) & (t < (bucket + 1) / 4)
        for i, what in enumerate(("loss", "gradient")):
            ours, eager, truth = (results[name][i][rows] for name in ("ours", "eager", "truth"))
            assert_as_exact_as_eager(ours, eager, truth, f"{what}, bucket {bucket}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_any_upstream_gradient(dtype: torch.dtype, reduction: str) -> None:
    """A number, a row, an expanded one, zero; 1 leaves the bits of the first pass alone."""
    pred = data(*SHAPE, seed=1, dtype=dtype)
    x1 = data(*SHAPE, dtype=dtype)
    _, plain = run("triton", pred, x1=x1, reduction=reduction)
    shape, eps = (3,) if reduction == "none" else (), torch.finfo(dtype).eps
    for value in (2.0, 0.0, -0.37, 65536.0 if dtype != torch.float16 else 16.0):
        upstream = torch.full(shape, value, device=DEVICE)
        _, scaled = run("triton", pred, x1=x1, reduction=reduction, upstream=upstream)
        if value == 0 or (value in (2.0, 65536.0) and dtype != torch.float16):
            assert torch.equal(scaled, plain * value)  # powers of two do not round
        else:
            assert relative_rms(scaled, plain.double() * value) < eps
    if reduction == "none":
        upstream = torch.tensor([1.0, 3.0, 0.0], device=DEVICE)
        _, rows = run("triton", pred, x1=x1, reduction="none", upstream=upstream)
        assert torch.equal(rows[0], plain[0]) and not rows[2].any()
        assert relative_rms(rows[1], 3 * plain[1].double()) < eps
        expanded = torch.full((), 2.0, device=DEVICE).expand(3)
        _, doubled = run("triton", pred, x1=x1, reduction="none", upstream=expanded)
        assert relative_rms(doubled, 2 * plain.double()) < eps


def test_fp16_gradients_survive_a_loss_scaler() -> None:
    """2 weight / (E B) is below float16's range: only with the scale inside is it right."""
    arguments = dict(x1=data(*SHAPE, dtype=torch.float16), weight=1e-5)
    pred = data(*SHAPE, seed=1, dtype=torch.float16)
    scale = torch.tensor(65536.0, device=DEVICE)
    _, scaled = run("triton", pred, upstream=scale, **arguments)
    _, exact = run("reference", pred.float(), **(arguments | {"x1": arguments["x1"].float()}))
    assert relative_rms(scaled.double() / 65536, exact) < 2e-3
    _, unscaled = run("triton", pred, **arguments)
    assert relative_rms(unscaled, exact) > 0.05  # the loss of digits that the scaler is for


def test_a_gradient_can_be_asked_for_twice_but_not_for_its_own() -> None:
    mix = MixFlow(clock=DATA_AT_1, impl="triton")
    it = mix.prepare(data(*SHAPE), IDS)
    pred = data(*SHAPE, seed=1).requires_grad_()
    loss = mix.loss(pred, it)
    twice, thrice, once = (
        torch.autograd.grad(factor * loss, pred, retain_graph=factor != 1)[0]
        for factor in (2, 3, 1)
    )
    assert torch.equal(twice, 2 * once) and relative_rms(thrice, 3 * once) < 1e-7
    with pytest.raises(RuntimeError, match='impl="reference"'):
        torch.autograd.grad(mix.loss(pred, it), pred, create_graph=True)


def test_two_runs_give_the_same_bits() -> None:
    pred, x1 = data(1, 20_000, seed=1), data(1, 20_000)
    for reduction in ("none", "mean"):
        runs = [run("triton", pred, x1=x1, ids=IDS[:1], reduction=reduction) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_mean_and_sum_are_those_of_the_samples() -> None:
    mix = MixFlow(clock=DATA_AT_1, impl="triton")
    it = mix.prepare(data(*SHAPE), IDS)
    pred = data(*SHAPE, seed=1)
    none, total, mean = (mix.loss(pred, it, reduction=r) for r in ("none", "sum", "mean"))
    assert none.shape == (3,) and none.dtype == torch.float32
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(mean, none.mean())
    # Without a gradient to write the loss is the same.
    assert torch.equal(mean, mix.loss(pred.requires_grad_(), it).detach())


def test_predictions_in_other_memory_layouts() -> None:
    pred = data(*SHAPE, seed=1)
    loss, gradient = run("triton", pred)
    wide = data(3, 9, 6, 6)
    wide[:, 2:6] = pred
    for same in (pred.to(memory_format=torch.channels_last), wide[:, 2:6]):
        assert not same.is_contiguous()
        second, moved = run("triton", same)
        assert torch.equal(second, loss) and torch.equal(moved, gradient)


def test_empty_batches() -> None:
    for impl in ("triton", "reference"):
        mix = MixFlow(clock=DATA_AT_1, impl=impl)
        it = mix.prepare(data(0, 4, 6, 6), IDS[:0])
        pred = data(0, 4, 6, 6).requires_grad_()
        assert mix.loss(pred, it, reduction="none").shape == (0,)
        total = mix.loss(pred, it, reduction="sum")
        total.backward()
        assert total.item() == 0 and pred.grad.shape == (0, 4, 6, 6)
        with pytest.raises(ValueError, match="empty"):
            mix.loss(pred, it)


def test_a_closed_form() -> None:
    """x0 given as 0 and x1 = 0: the loss is mean(pred^2), the gradient 2 pred / count."""
    mix = MixFlow(clock=NOISE_AT_1, impl="triton")
    zero = torch.zeros(SHAPE, device=DEVICE)
    it = mix.prepare(zero, IDS, x0=zero)
    pred = data(*SHAPE, seed=1).requires_grad_()
    loss = mix.loss(pred, it)
    loss.backward()
    torch.testing.assert_close(loss, (pred**2).mean())
    torch.testing.assert_close(pred.grad, 2 * pred.detach() / pred.numel())


BAD = [
    (dict(pred=torch.zeros(3, 8, 6, 6, device=DEVICE)), "learn_sigma=True"),
    (dict(pred=torch.zeros(3, 9, 32, device=DEVICE)), "learn_sigma=True"),
    (dict(pred=torch.zeros(3, 9, 17, device=DEVICE)), "tokens"),
    (dict(pred=torch.zeros(3, 7, 16, device=DEVICE)), "tokens"),
    (dict(pred=torch.zeros(2, 9, 16, device=DEVICE)), "tokens"),
    (dict(pred=torch.zeros(SHAPE, device=DEVICE), learn_sigma=True), "pred must have"),
    (dict(pred=torch.zeros(SHAPE, device="meta")), "pred must be a floating"),
    (dict(pred=torch.zeros(SHAPE, dtype=torch.int64, device=DEVICE)), "pred must be a floating"),
    (dict(weight=torch.ones(3, device=DEVICE).requires_grad_()), "must not require"),
    (dict(weight=torch.ones(3, 4, 6, device=DEVICE)), "broadcast"),
    (dict(weight=torch.ones(4, device=DEVICE)), "broadcast"),
    (dict(weight="a"), "weight must be a number"),
    (dict(weight=torch.ones(3, dtype=torch.complex64, device=DEVICE)), "real"),
    (dict(it=None), "what prepare returned"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_bad_input(arguments: dict, message: str, impl: str) -> None:
    mix = MixFlow(clock=DATA_AT_1, impl=impl)
    it = mix.prepare(data(*SHAPE), IDS)
    with pytest.raises(ValueError, match=message):
        mix.loss(**{"pred": data(*SHAPE), "it": it, **arguments})


def test_what_the_loss_reads_must_not_have_changed_since_prepare() -> None:
    """Static buffers that are filled too early: ids give other noise, x1 another target."""
    for impl in ("triton", "reference"):
        mix = MixFlow(clock=DATA_AT_1, impl=impl)
        for change in ("ids", "x1"):
            x1, ids = data(*SHAPE), IDS.clone()
            it = mix.prepare(x1, ids)
            {"ids": ids, "x1": x1}[change].add_(1)
            with pytest.raises(ValueError, match="changed in place"):
                mix.loss(data(*SHAPE), it)
        it = mix.prepare(data(*SHAPE), IDS, t=torch.full((3,), 0.5, device=DEVICE))
        slowed = it.slowed_t.clone()
        it.t.mul_(1000)
        assert torch.equal(it.slowed_t, slowed)


def test_the_loss_of_another_objective_is_refused() -> None:
    it = MixFlow(clock=DATA_AT_1).prepare(data(*SHAPE), IDS)
    for other in (dict(clock=NOISE_AT_1), dict(clock=DATA_AT_1, path="gvp")):
        with pytest.raises(ValueError, match="prepared for clock and path"):
            MixFlow(**other).loss(data(*SHAPE), it)


def test_learn_sigma_needs_a_channel_dimension() -> None:
    mix = MixFlow(clock=DATA_AT_1)
    it = mix.prepare(data(3, 9, 16), IDS)
    with pytest.raises(ValueError, match="learn_sigma needs data"):
        mix.loss(data(3, 9, 32), it, learn_sigma=True)


def test_inference_mode_first_and_training_afterwards() -> None:
    """Lightning validates before it trains: kept tensors must not become inference tensors."""
    for impl in ("triton", "reference"):
        mix = MixFlow(clock=DATA_AT_1, impl=impl, seed=909 + len(impl))
        with torch.inference_mode():
            mix.loss(data(*SHAPE), mix.prepare(data(*SHAPE)))
            mixflow_loss(lambda x, t: x, data(*SHAPE), clock=DATA_AT_1, seed=77 + len(impl))
        for dtype in (torch.float32, torch.float16):
            pred = data(*SHAPE, dtype=dtype).requires_grad_()
            mix.loss(pred, mix.prepare(data(*SHAPE, dtype=dtype))).backward()
            assert pred.grad.isfinite().all()
        mixflow_loss(lambda x, t: x, data(*SHAPE), clock=DATA_AT_1, seed=77 + len(impl))


def test_functorch_and_forward_mode_are_served_by_the_reference() -> None:
    x1, direction = data(*SHAPE), data(*SHAPE, seed=4)
    mixes = [MixFlow(clock=DATA_AT_1, impl=impl, seed=3) for impl in ("triton", "reference")]
    found = []
    for mix in mixes:
        it = mix.prepare(x1, IDS)
        pred = data(*SHAPE, seed=1)
        value, tangent = torch.func.jvp(lambda p, m=mix, i=it: m.loss(p, i), (pred,), (direction,))
        gradient = torch.func.grad(lambda p, m=mix, i=it: m.loss(p, i))(pred)
        with forward_ad.dual_level():
            dual = mix.loss(forward_ad.make_dual(pred, direction), it)
            assert torch.equal(forward_ad.unpack_dual(dual).tangent, tangent)
        leaf = pred.clone().requires_grad_()
        losses = mix.loss(leaf, it, reduction="none")
        eye = torch.eye(3, device=DEVICE)
        (rows,) = torch.autograd.grad(losses, leaf, eye, is_grads_batched=True)
        found.append((value, tangent, gradient, rows))
    for ours, plain in zip(*found, strict=True):
        assert relative_rms(ours, plain) < 1e-6 and plain.abs().max() > 0


def test_tokens_of_every_patch_size_come_back() -> None:
    for p, (c, h, w) in itertools.product((1, 2, 4), ((3, 4, 8), (8, 8, 4))):
        x = data(2, c, h, w)
        tokens = to_tokens(x, p)
        assert tokens.shape == (2, h * w // p**2, p * p * c)
        assert torch.equal(from_tokens(tokens, x.shape, p), x)
        # SiT's unpatchify, as its paper's figure has it: rows of patches, patches, rows, columns.
        by_hand = torch.einsum("nhwpqc->nchpwq", tokens.view(2, h // p, w // p, p, p, c))
        assert torch.equal(by_hand.reshape(x.shape), x)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_of_the_samples_in_the_same_pass(
    impl: str, reduction: str, dtype: torch.dtype
) -> None:
    """Loss, gradient and samples have the bits that `loss` gives, one reduction at a time."""
    # Once more rows than one program of the sum takes at once: each costs the interpreter time.
    batch = 70 if (reduction, dtype) == ("mean", torch.float32) else 3
    mix = MixFlow(clock=DATA_AT_1, impl=impl, seed=3)
    it = mix.prepare(data(batch, 4, 4, 4), torch.arange(batch, device=DEVICE))
    found = []
    for take in (mix.loss, mix.loss_and_samples):
        pred = data(batch, 4, 4, 4, dtype=dtype, seed=1).requires_grad_()
        loss = take(pred, it, weight=uniform(batch), reduction=reduction)
        loss, samples = loss if isinstance(loss, tuple) else (loss, None)
        loss.backward(torch.full_like(loss, 0.5))
        found.append((loss.detach(), pred.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.equal(samples, mix.loss(pred, it, weight=uniform(batch), reduction="none"))
    assert not samples.requires_grad and samples.dtype == torch.float32
