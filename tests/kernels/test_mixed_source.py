"""Kernels of the mixed source against float64, their reference, `interpolate` and themselves."""

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import interpolate, to_tokens
from mixflow_fast.kernels.mixed_source import (
    launch,
    mix_and_interpolate,
    mix_and_interpolate_reference,
)
from mixflow_fast.kernels.mixed_source.reference import source_backward_reference
from mixflow_fast.kernels.philox import Stream
from tests.support.kernels import DEVICE, ON_GPU, assert_as_exact_as_eager, data, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
OPS = torch.ops.mixflow_fast
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
IDS = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)
SEED = philox.seed_tensor(2**63 + 5, DEVICE)
W = torch.tensor([0.125, 0.6, 0.99], device=DEVICE)
M = torch.tensor([0.1, 0.45, 0.8], device=DEVICE)
MODES = ("moments", "samples")
NAMES = ("x", "x0", "kl", "dmean", "dlog_var")


def moments(*shape: int, dtype: torch.dtype = FP32) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, the latter from far below to far above 0."""
    return data(*shape, dtype=dtype, seed=1, scale=1.0), data(*shape, dtype=dtype, seed=2)


def upstream(x: Tensor, x0: Tensor, kl: Tensor) -> list[Tensor]:
    return [
        data(*like.shape, dtype=like.dtype, seed=3 + i, scale=1.0)
        for i, like in enumerate((x, x0, kl))
    ]


def run(call, x1, mean, log_var, w=W, m=M, ids=IDS, given=None, **options) -> dict[str, Tensor]:
    """Results and gradients by name, `given` upstream or `upstream`'s."""
    options = {"clock": DATA_AT_1, "path": "linear", "mode": "moments", **options}
    mean, log_var = (v.detach().requires_grad_() for v in (mean, log_var))
    made = call(x1, mean, log_var, w, m, SEED, ids, **options)
    gradients = torch.autograd.grad(made, [mean, log_var], given or upstream(*made))
    return dict(zip(NAMES, [*(v.detach() for v in made), *gradients], strict=True))


def ours(*arguments: object, **options: object) -> dict[str, Tensor]:
    return run(mix_and_interpolate, *arguments, impl="triton", **options)


def lines(x1, mean, log_var, w, m, eps, eps1, path, clock, mode) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas of the paper in plain PyTorch, in the dtype of mean."""
    w, t = (v.to(mean.dtype).view(-1, *[1] * (mean.dim() - 1)) for v in (w, m))
    t = t if clock == DATA_AT_1 else 1 - t
    if mode == "moments":
        x0 = w * mean + torch.sqrt(w * torch.exp(log_var) + 1 - w) * eps
    else:
        x0 = w * (mean + torch.exp(log_var / 2) * eps1) + (1 - w) * eps
    alpha, sigma = t, 1 - t
    if path == "gvp":
        alpha, sigma = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    kl = 0.5 * (mean**2 + torch.exp(log_var) - 1 - log_var).flatten(1).sum(1)
    return alpha * x1 + sigma * x0, x0, kl


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("shape", "path", "clock"),
    [
        ((64,), "linear", DATA_AT_1),
        ((7, 1023), "gvp", NOISE_AT_1),
        ((4, 6, 6), "gvp", DATA_AT_1),
        ((5, 3, 7), "linear", NOISE_AT_1),
        ((3, 2, 2, 5), "linear", DATA_AT_1),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_error_is_eagers(
    mode: str, shape: tuple[int, ...], path: str, clock: str, dtype: torch.dtype
) -> None:
    """Noise is given, so that truth and eager have the same; truth is the formulas by autograd."""
    x1, (mean, log_var) = data(3, *shape, dtype=dtype), moments(3, *shape)
    eps, eps1 = (data(3, *shape, seed=seed, scale=1.0) for seed in (8, 9))
    options = dict(path=path, clock=clock, mode=mode)
    made = ours(x1, mean, log_var, eps=eps, eps1=eps1, **options)
    given = upstream(made["x"], made["x0"], made["kl"])

    def plain(*, to: torch.dtype) -> dict[str, Tensor]:
        def call(x1, mean, log_var, w, m, *_, **__):
            return lines(x1, mean, log_var, w, m, eps.to(to), eps1.to(to), path, clock, mode)

        return run(call, x1.to(to), mean.to(to), log_var.to(to), given=[g.to(to) for g in given])

    eager, truth = plain(to=FP32), plain(to=torch.float64)
    for name in NAMES:
        expected = eager[name].to(dtype) if name == "x" else eager[name]
        assert_as_exact_as_eager(made[name], expected, truth[name], name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_drawn_noise_is_the_references(mode: str, dtype: torch.dtype) -> None:
    x1, (mean, log_var) = data(3, 4, 6, 6, dtype=dtype), moments(3, 4, 6, 6)
    made = ours(x1, mean, log_var, mode=mode)
    eps, eps1 = (
        philox.normal(SEED, stream, IDS, 144, "triton").view(3, 4, 6, 6)
        for stream in (Stream.NOISE, Stream.SOURCE_NOISE)
    )
    given = ours(x1, mean, log_var, mode=mode, eps=eps, eps1=eps1)
    twin = run(mix_and_interpolate_reference, x1, mean, log_var, mode=mode)
    for name in NAMES:
        assert torch.equal(made[name], given[name]), name
        floor = 4e-3 if made[name].dtype == BF16 else 2e-5 if ON_GPU else 2e-6
        assert relative_rms(made[name], twin[name]) < floor, name


def plain_input(x1: Tensor, clock: str, path: str, patch_size: int = 0, **options) -> Tensor:
    schedule = Schedule.of(clock, "uniform", 0.0, 1.0, "shifted", (0.0, 1.0))
    times = dict(t=M, slowed_t=M, patch_size=patch_size, impl="triton", **options)
    return interpolate(x1, schedule, path, SEED, IDS, **times)[0]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 6, 6), FP32),
        ((4, 6, 6), BF16),
        ((5, 3, 7), FP16),
        ((5, 3, 7), FP32),
        ((4, 8, 40), BF16),
    ],
)
@pytest.mark.parametrize("case", ["w = 0, moments", "w = 0, samples", "zero moments"])
def test_bits_of_plain_interpolation(case: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x1, (mean, log_var) = data(3, *shape, dtype=dtype), moments(3, *shape)
    w, mode = torch.zeros_like(W), case.removeprefix("w = 0, ")
    if case == "zero moments":
        mean, log_var, w, mode = torch.zeros_like(mean), torch.zeros_like(mean), W, "moments"
    noise = philox.normal(SEED, Stream.NOISE, IDS, math.prod(shape), "triton").view(3, *shape)
    for path, clock in (("linear", DATA_AT_1), ("gvp", NOISE_AT_1), ("vp", DATA_AT_1)):
        made = ours(x1, mean, log_var, w, mode=mode, path=path, clock=clock)
        assert torch.equal(made["x"], plain_input(x1, clock, path))
        assert torch.equal(made["x0"], noise)
        if case == "zero moments":
            assert torch.equal(made["kl"], torch.zeros(3, device=DEVICE))
    if not shape[1] % 2 and not shape[2] % 2:
        tokens = ours(x1, mean, log_var, w, mode=mode, patch_size=2)["x"]
        assert torch.equal(tokens, plain_input(x1, DATA_AT_1, "linear", patch_size=2))


@pytest.mark.parametrize("mode", MODES)
def test_weights_at_the_ends(mode: str) -> None:
    """w = 0: the KL's gradient alone. w = 1: q itself, down to the smallest variances."""
    x1, mean = data(3, 4, 6, 6), moments(3, 4, 6, 6)[0]
    log_var = torch.linspace(-12, 6, 144, device=DEVICE).repeat(3, 1).view_as(mean).contiguous()
    eps = data(3, 4, 6, 6, seed=7, scale=1.0)
    noise = dict(eps=eps, eps1=eps, mode=mode)
    one, none = torch.ones_like(W), torch.zeros_like(W)
    exact = log_var.double()
    of_kl = data(3, seed=5, scale=1.0).view(3, 1, 1, 1).double()

    at_0 = ours(x1, mean, log_var, none, **noise)
    assert torch.equal(at_0["x0"], eps)
    assert relative_rms(at_0["dmean"], of_kl * mean.double()) < 1e-6
    assert relative_rms(at_0["dlog_var"], of_kl * torch.expm1(exact) / 2) < 1e-6

    at_1 = ours(x1, mean, log_var, one, **noise)
    std = torch.exp(exact / 2)
    # Element by element: where the variance is e^-12 the digits of 1 + w expm1(l) are gone.
    noise_part = at_1["x0"].double() - mean.double()
    torch.testing.assert_close(noise_part, std * eps.double(), rtol=2e-6, atol=1e-6)
    gradient = (1 - M).view(3, 1, 1, 1).double() * data(3, 4, 6, 6, seed=3, scale=1.0).double()
    gradient = gradient + data(3, 4, 6, 6, seed=4, scale=1.0).double()
    expected = gradient * eps.double() * std / 2 + of_kl * torch.expm1(exact) / 2
    torch.testing.assert_close(at_1["dlog_var"].double(), expected, rtol=1e-5, atol=1e-6)
    expected = gradient + of_kl * mean.double()
    torch.testing.assert_close(at_1["dmean"].double(), expected, rtol=1e-5, atol=1e-6)


def test_small_log_variances_keep_their_digits() -> None:
    """exp(l) - 1 - l is l^2 / 2, of which the difference has no digit left in float32."""
    zero = torch.zeros(3, 4, 6, 6, device=DEVICE)
    for size in (1e-6, 1e-3, 0.1, 0.499, 0.501):
        log_var = zero + torch.tensor([1.0, -1.0, 0.7], device=DEVICE).view(3, 1, 1, 1) * size
        kl = ours(zero, zero, log_var)["kl"].double()
        x = log_var.double()[:, 0, 0, 0]
        # The series where float64's own difference has few digits.
        exact = torch.expm1(x) - x if size > 0.01 else x**2 / 2 + x**3 / 6 + x**4 / 24
        torch.testing.assert_close(kl, 72 * exact, rtol=3e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("patch_size", [0, 2])
def test_gradcheck_of_the_reference(mode: str, path: str, patch_size: int) -> None:
    """Finite differences in float64, of the formulas and of the operator's closed form."""
    ids = IDS[:2].cpu()
    g = torch.Generator().manual_seed(0)
    x1, mean, log_var = (
        torch.randn(2, 2, 2, 2, generator=g, dtype=torch.float64) for _ in range(3)
    )
    w, m = torch.tensor([0.3, 1.0]), torch.tensor([0.2, 0.7])
    options = dict(clock=NOISE_AT_1, path=path, mode=mode, patch_size=patch_size)
    seed = SEED.cpu()

    def call(mean: Tensor, log_var: Tensor) -> tuple[Tensor, ...]:
        return mix_and_interpolate_reference(x1, mean, log_var, w, m, seed, ids, **options)

    def operator(mean: Tensor, log_var: Tensor) -> tuple[Tensor, ...]:
        return mix_and_interpolate(x1, mean, log_var, w, m, seed, ids, impl="reference", **options)

    for function in (call, operator):
        torch.autograd.gradcheck(function, (mean.requires_grad_(), log_var.requires_grad_()))


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_results_that_nobody_used_have_no_gradient(impl: str) -> None:
    """Any subset of the results: the others count as zeros, and none at all is nothing."""
    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    mean.requires_grad_(), log_var.requires_grad_()
    options = dict(clock=DATA_AT_1, path="gvp", mode="moments", impl=impl)
    made = mix_and_interpolate(x1, mean, log_var, W, M, SEED, IDS, **options)
    given = upstream(*made)
    for used in ((0,), (1,), (2,), (0, 1), (1, 2), (0, 2)):
        some = torch.autograd.grad(
            [made[i] for i in used], [mean, log_var], [given[i] for i in used], retain_graph=True
        )
        zeros = [g if i in used else torch.zeros_like(g) for i, g in enumerate(given)]
        every = torch.autograd.grad(made, [mean, log_var], zeros, retain_graph=True)
        for a, b in zip(some, every, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(made, mean, given, create_graph=True)
    frozen = mix_and_interpolate(x1, mean.detach(), log_var.detach(), W, M, SEED, IDS, **options)
    assert not any(result.requires_grad for result in frozen)
    assert all(torch.equal(a, b) for a, b in zip(frozen, made, strict=True))
    (only_mean,) = torch.autograd.grad(
        mix_and_interpolate(x1, mean, log_var.detach(), W, M, SEED, IDS, **options), mean, given
    )
    assert torch.equal(only_mean, torch.autograd.grad(made, mean, given)[0])


@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(4, 6, 6), (34, 6, 6)])
def test_tokens_are_the_same_numbers(
    patch_size: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x1, (mean, log_var) = data(3, *shape, dtype=dtype), moments(3, *shape)
    image = ours(x1, mean, log_var)
    given = upstream(image["x"], image["x0"], image["kl"])
    given[0] = to_tokens(given[0], patch_size)
    tokens = ours(x1, mean, log_var, given=given, patch_size=patch_size)
    assert torch.equal(tokens["x"], to_tokens(image["x"], patch_size))
    for name in ("x0", "dmean", "dlog_var"):
        assert torch.equal(tokens[name], image[name]), name
    # Of the same terms in other tiles.
    assert relative_rms(tokens["kl"], image["kl"]) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 8, 8), (5, 3, 7)])
def test_a_sample_alone_in_a_batch_and_again(mode: str, shape: tuple[int, ...]) -> None:
    """The same bits, gradients included; `ids` is a slice of a longer tensor."""
    ids = torch.arange(9, device=DEVICE) * 1009
    g = torch.Generator().manual_seed(5)
    w, m = (torch.rand(9, generator=g).to(DEVICE) for _ in range(2))
    x1, (mean, log_var) = data(9, *shape, dtype=BF16), moments(9, *shape)
    batch = ours(x1, mean, log_var, w, m, ids, mode=mode)
    given = upstream(batch["x"], batch["x0"], batch["kl"])
    again = ours(x1, mean, log_var, w, m, ids, mode=mode)
    for name in NAMES:
        assert torch.equal(batch[name], again[name])
    for i in (0, 3, 8):
        one = slice(i, i + 1)
        alone = ours(
            x1[one],
            mean[one],
            log_var[one],
            w[one],
            m[one],
            ids[one],
            given=[v[one] for v in given],
            mode=mode,
        )
        for name in NAMES:
            assert torch.equal(alone[name][0], batch[name][i]), (name, i)


def test_bits_of_the_gradient_do_not_depend_on_how_much_a_program_does(monkeypatch) -> None:
    x1, (mean, log_var) = data(3, 5, 1000), moments(3, 5, 1000)
    once = ours(x1, mean, log_var)
    get_layout = launch.get_layout
    for loops in (2, 4):
        monkeypatch.setattr(
            launch,
            "get_layout",
            lambda shape, p, given=None, n=loops: get_layout(shape, p, n if given else None),
        )
        made = ours(x1, mean, log_var)
        assert all(torch.equal(made[name], once[name]) for name in NAMES)


def test_memory_layouts() -> None:
    """Halves of the predictor's one tensor, permuted data and gradients, strides of ids and w."""
    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    expected = ours(x1, mean, log_var)
    given = upstream(expected["x"], expected["x0"], expected["kl"])
    both = torch.cat([mean, log_var], dim=1)
    last = torch.channels_last
    table = torch.stack([IDS, IDS + 1], dim=1)
    columns = torch.stack([W, M], dim=1)
    cases = {
        "halves": (x1, *both.chunk(2, dim=1), W, M, IDS, given),
        "channels last": (
            x1.to(memory_format=last),
            mean.to(memory_format=last),
            log_var.to(memory_format=last),
            W,
            M,
            IDS,
            [given[0].to(memory_format=last), given[1].to(memory_format=last), given[2]],
        ),
        "columns": (x1, mean, log_var, columns[:, 0], columns[:, 1], table[:, 0], given),
    }
    for case, (x1_, mean_, log_var_, w, m, ids, gradients) in cases.items():
        made = ours(x1_, mean_, log_var_, w, m, ids, given=gradients)
        for name in NAMES:
            assert torch.equal(made[name], expected[name]), (case, name)
    # One gradient for all, as a sum sends it.
    ones = [torch.ones((), device=DEVICE).expand_as(g) for g in given]
    a, b = (
        ours(x1, mean, log_var, given=g) for g in (ones, [g.clone().contiguous() for g in ones])
    )
    assert all(torch.equal(a[name], b[name]) for name in NAMES)


@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(4, 6, 6), (5, 3, 7), (64,)])
def test_one_tensor_of_both_halves(shape: tuple[int, ...], mode: str, impl: str) -> None:
    """The bits of two tensors, and a gradient in one, without a pass that puts it together."""
    x1, (mean, log_var) = data(3, *shape), moments(3, *shape)
    options = dict(clock=DATA_AT_1, path="linear", mode=mode, impl=impl, log_var_range=(-1.5, 1.0))
    both = torch.cat([mean, log_var], dim=1).requires_grad_()
    made = mix_and_interpolate(x1, both, None, W, M, SEED, IDS, **options)
    (gradient,) = torch.autograd.grad(made, both, upstream(*made))
    expected = run(mix_and_interpolate, x1, mean, log_var, **options)
    found = dict(zip(NAMES, [*made, *gradient.chunk(2, dim=1)], strict=True))
    assert gradient.is_contiguous()
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)


@pytest.mark.parametrize("mode", MODES)
def test_clamping_is_torchs(mode: str) -> None:
    """Values and gradients of a clamp before the operator, the ends themselves included."""
    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    low, high = -1.5, 1.0
    log_var[:, 0, 0, :2] = torch.tensor([low, high], device=DEVICE)
    inside = (log_var >= low) & (log_var <= high)
    assert 0.3 < inside.float().mean() < 0.7

    def clamped(x1, mean, log_var, *rest, **options) -> tuple[Tensor, Tensor, Tensor]:
        options.update(impl="triton")
        return mix_and_interpolate(x1, mean, log_var.clamp(low, high), *rest, **options)

    expected = run(clamped, x1, mean, log_var, mode=mode)
    made = ours(x1, mean, log_var, mode=mode, log_var_range=(low, high))
    assert all(torch.equal(made[name], expected[name]) for name in NAMES)
    assert torch.equal(made["dlog_var"] != 0, inside)


@pytest.mark.parametrize("source", [FP32, BF16])
def test_dtypes_of_the_results(source: torch.dtype) -> None:
    x1, (mean, log_var) = data(3, 4, 6, 6, dtype=FP16), moments(3, 4, 6, 6, dtype=source)
    made = ours(x1, mean, log_var, dtype=BF16)
    dtypes = {name: value.dtype for name, value in made.items()}
    assert dtypes == {"x": BF16, "x0": FP32, "kl": FP32, "dmean": source, "dlog_var": source}
    twin = run(mix_and_interpolate_reference, x1, mean, log_var, dtype=BF16)
    for name in NAMES:
        floor = 4e-3 if made[name].dtype == BF16 else 2e-5 if ON_GPU else 2e-6
        assert relative_rms(made[name], twin[name]) < floor, name
    # float64 data is the reference's.
    args = [v.double() for v in (x1, mean, log_var)]
    x, x0, kl = mix_and_interpolate(
        *args, W, M, SEED, IDS, clock=DATA_AT_1, path="linear", mode="moments"
    )
    assert x.dtype == x0.dtype == kl.dtype == torch.float64


def test_a_value_that_is_not_finite_shows_in_its_own_sample() -> None:
    x1, (mean, log_var) = data(3, 5, 3, 7), moments(3, 5, 3, 7)
    log_var[1, 0, 0, 0] = math.nan
    made = ours(x1, mean, log_var)
    assert made["kl"].isnan().tolist() == [False, True, False]
    assert made["x"][1, 0, 0, 0].isnan() and made["x"].isnan().sum() == 1
    assert not made["dlog_var"].isnan().any()  # as a clamped one has none
    log_var[2, 0, 0, 0] = math.inf
    for bounds in ((-12.0, 6.0), (-math.inf, math.inf)):
        made = ours(x1, mean, log_var, log_var_range=bounds)
        assert made["kl"].isnan().tolist() == [False, True, True]


def test_empty_batches_and_what_no_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    made = ours(x1[:0], mean[:0], log_var[:0], W[:0], M[:0], IDS[:0], patch_size=2)
    assert made["x"].shape == (0, 9, 16) and made["kl"].shape == (0,)
    assert made["dmean"].shape == (0, 4, 6, 6)
    monkeypatch.setattr(runtime, "MAX_PROGRAMS", 2)
    with pytest.raises(ValueError, match="split the batch"):
        ours(x1, mean, log_var)
    monkeypatch.setattr(runtime, "MAX_SAMPLE", 100)
    with pytest.raises(ValueError, match='impl="reference"'):
        ours(x1, mean, log_var)
    with pytest.raises(ValueError, match="float64"):
        ours(x1, mean.double(), log_var)


@pytest.mark.parametrize(
    ("impl", "mode", "drawn"),
    [("triton", "moments", True), ("triton", "samples", False), ("reference", "samples", True)],
)
def test_opcheck(impl: str, mode: str, drawn: bool) -> None:
    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    mean.requires_grad_(), log_var.requires_grad_()
    noise = (None, None) if drawn else (data(3, 4, 6, 6, seed=8), data(3, 4, 6, 6, seed=9))
    patch_size, dtype = (2, BF16) if drawn else (0, None)
    arguments = x1, mean, log_var, W, M, SEED, IDS, *noise, NOISE_AT_1, "gvp", mode
    rest = patch_size, -1.5, 1.0, impl, dtype
    torch.library.opcheck(OPS.mix_and_interpolate, (*arguments, *rest))
    both = torch.cat([mean, log_var], dim=1).detach().requires_grad_()
    torch.library.opcheck(OPS.mix_and_interpolate, (x1, both, None, *arguments[3:], *rest))
    shape = (3, 9, 16) if drawn else (3, 4, 6, 6)
    gradients = data(*shape, dtype=dtype or FP32), None if drawn else data(3, 4, 6, 6), W
    source = W, M, SEED, IDS, noise[1 if mode == "samples" else 0]
    rest = NOISE_AT_1, "gvp", mode, patch_size, -1.5, 1.0, impl == "triton"
    for moments_ in ((mean.detach(), log_var.detach()), (both.detach(), None)):
        torch.library.opcheck(OPS.source_backward, (*gradients, *moments_, *source, *rest))


@pytest.mark.parametrize("how", [{}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("patch_size", [0, 2])
def test_compiled_in_one_graph(how: dict, patch_size: int) -> None:
    torch._dynamo.reset()
    weight = data(8, 4, 1, 1, seed=6, scale=0.3)

    def step(x1: Tensor, weight: Tensor, w: Tensor, m: Tensor, ids: Tensor) -> Tensor:
        mean, log_var = torch.nn.functional.conv2d(x1, weight).chunk(2, dim=1)
        options = dict(clock=DATA_AT_1, path="linear", mode="moments", impl="triton")
        x, x0, kl = mix_and_interpolate(
            x1, mean, log_var, w, m, SEED, ids, patch_size=patch_size, **options
        )
        return x.square().sum() + x0.sin().sum() + 0.1 * kl.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", **how)
    for batch, side in ((3, 6), (2, 8)) if how else ((3, 6),):
        found = []
        for call in (step, compiled):
            leaf = weight.clone().requires_grad_()
            loss = call(data(batch, 4, side, side), leaf, W[:batch], M[:batch], IDS[:batch])
            loss.backward()
            found.append((loss.detach(), leaf.grad))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_one_launch_each_way_beside_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.launches import Launches

    x1, (mean, log_var) = data(3, 4, 6, 6), moments(3, 4, 6, 6)
    mean.requires_grad_(), log_var.requires_grad_()
    options = dict(clock=DATA_AT_1, path="linear", mode="moments", impl="triton")
    with Launches() as launches:
        made = mix_and_interpolate(x1, mean, log_var, W, M, SEED, IDS, **options)
    assert launches.counts == {"_mixed_source_kernel": 1, "_reduce_kernel": 1}
    given = upstream(*made)
    with Launches() as launches:
        torch.autograd.grad(made, [mean, log_var], given)
    assert launches.counts == {"_source_backward_kernel": 1}


def test_the_closed_form_is_that_of_the_formulas() -> None:
    """`source_backward_reference` against autograd through the formulas, in float64."""
    x1, (mean, log_var) = data(3, 4, 6, 6).double(), moments(3, 4, 6, 6)
    mean, log_var = mean.double(), log_var.double()
    for mode in MODES:
        truth = run(mix_and_interpolate_reference, x1, mean, log_var, mode=mode)
        given = upstream(truth["x"], truth["x0"], truth["kl"])
        found = source_backward_reference(
            *given,
            mean,
            log_var,
            W,
            M,
            SEED,
            IDS,
            None,
            clock=DATA_AT_1,
            path="linear",
            mode=mode,
            patch_size=0,
            low=-math.inf,
            high=math.inf,
        )
        for name, value in zip(("dmean", "dlog_var"), found, strict=True):
            assert relative_rms(value, truth[name]) < 1e-14
