"""The interpolation kernel against its reference, float64 and itself: times, paths, layouts."""

import itertools

import pytest
import torch

from mixflow_fast import MixFlow, Moments
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1, get_path
from mixflow_fast.flow.schedule import Schedule
from mixflow_fast.kernels import philox, runtime
from mixflow_fast.kernels.interpolate import (
    interpolate,
    interpolate_reference,
    launch,
    to_tokens,
)
from mixflow_fast.kernels.layout import get_layout
from mixflow_fast.kernels.philox import Stream
from tests.support.kernels import DEVICE, ON_GPU, assert_as_exact_as_eager, relative_rms

pytestmark = pytest.mark.usefixtures("poisoned_memory")
IDS = torch.tensor([5, 2**40 + 3, 11], device=DEVICE)
SEED = 2**63 + 5
DISTRIBUTIONS = ("uniform", "beta21", "logit-normal(0.3,0.8)")
INTERVALS = ("shifted", "raw", "full")
CLOCKS = (DATA_AT_1, NOISE_AT_1)


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g).to(dtype).to(DEVICE)


def pair(**options: object) -> tuple[MixFlow, MixFlow]:
    """The same objective on the kernels and on the reference."""
    options = {"clock": DATA_AT_1, "seed": SEED, **options}
    return MixFlow(impl="triton", **options), MixFlow(impl="reference", **options)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("interval", INTERVALS)
@pytest.mark.parametrize("shift", [1.0, 6.9])
def test_times_are_the_references(
    clock: str, distribution: str, interval: str, shift: float
) -> None:
    """Many positions through one kernel each; bounds by prediction="noise" where it matters."""
    ids = torch.arange(10, device=DEVICE) * 977
    ours, plain = pair(
        clock=clock, timesteps=distribution, interval=interval, shift=shift, prediction="noise"
    )
    x1 = torch.zeros(10, 1, device=DEVICE)
    x0 = torch.zeros_like(x1)
    a, b = ours.prepare(x1, ids, x0=x0), plain.prepare(x1, ids, x0=x0)
    for name in ("t", "slowed_t"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=3e-7, atol=1e-7)
    if distribution == "uniform" and shift == 1:
        assert torch.equal(a.t, b.t)
    given = ours.prepare(x1, ids, x0=x0, t=b.t)
    assert torch.equal(given.t, b.t)
    expected = plain.prepare(x1, ids, x0=x0, t=b.t).slowed_t
    torch.testing.assert_close(given.slowed_t, expected, rtol=3e-7, atol=1e-7)
    exact = ours.prepare(x1, ids, x0=x0, t=b.t, slowed_t=b.slowed_t)
    assert torch.equal(exact.slowed_t, b.slowed_t)


@pytest.mark.parametrize("clock", CLOCKS)
def test_gamma_zero_uses_t_exactly(clock: str) -> None:
    t = torch.tensor([0.0, 5e-4, 0.3, 0.999, 1.0], device=DEVICE)
    for interval, shift in (("shifted", 1.0), ("raw", 6.9)):
        ours, _ = pair(gamma=0, clock=clock, prediction="noise", interval=interval, shift=shift)
        it = ours.prepare(torch.ones(5, 1, device=DEVICE), t=t)
        assert torch.equal(it.t, t) and torch.equal(it.slowed_t, t)


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_paths_at_given_times(path: str, clock: str) -> None:
    """x1 = 1, x0 = 0 gives alpha, and the other way round sigma: against float64."""
    m = torch.cat([torch.linspace(0, 1, 9), torch.tensor([1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])])
    m = m.to(DEVICE)
    ours, _ = pair(path=path, clock=clock)
    exact = m.double() if clock == DATA_AT_1 else 1 - m.double()
    c = get_path(path).coefficients(exact.cpu(), None if clock == DATA_AT_1 else m.double().cpu())
    one, zero = torch.ones(len(m), 1, device=DEVICE), torch.zeros(len(m), 1, device=DEVICE)
    for x1, x0, truth in ((one, zero, c.alpha), (zero, one, c.sigma)):
        x = ours.prepare(x1, x0=x0, t=m, slowed_t=m).x[:, 0].cpu()
        torch.testing.assert_close(x.double(), truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64,), (7, 1023), (4, 6, 6), (5, 3, 7), (3, 2, 2, 5)])
def test_error_is_eagers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Drawn inside the kernel; truth and eager get the same noise and times."""
    ours, _ = pair(path="gvp")
    x1 = data(3, *shape, dtype=dtype)
    it = ours.prepare(x1, IDS)
    assert it.x.dtype == dtype and it.x.shape == x1.shape
    m = it.slowed_t.view(-1, *[1] * len(shape))
    alpha, sigma = torch.sin(torch.pi / 2 * m), torch.cos(torch.pi / 2 * m)
    eager = (alpha * x1 + sigma * it.x0()).to(dtype)
    m = m.double()
    truth = torch.sin(torch.pi / 2 * m) * x1.double()
    truth = truth + torch.cos(torch.pi / 2 * m) * it.x0().double()
    assert_as_exact_as_eager(it.x, eager, truth, "x")


def test_x0_on_demand_is_what_the_kernel_used() -> None:
    """At m = 0 the input is the noise itself; PyTorch's twin agrees to rounding."""
    ours, plain = pair()
    x1, m = data(3, 4, 6, 6), torch.zeros(3, device=DEVICE)
    it = ours.prepare(x1, IDS, t=m, slowed_t=m)
    assert torch.equal(it.x, it.x0()) and it.x0() is not it.x0()
    atol = 1e-5 if ON_GPU else 2e-6
    torch.testing.assert_close(it.x0(), plain.prepare(x1, IDS).x0(), rtol=0, atol=atol)


@pytest.mark.parametrize("patch_size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 6, 6), (40, 6, 12), (3, 9, 3)])
def test_tokens_are_the_same_numbers(
    patch_size: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    if shape[1] % patch_size or shape[2] % patch_size:
        shape = (shape[0], 2 * shape[1], 2 * shape[2])
    ours, _ = pair()
    x1 = data(2, *shape, dtype=dtype)
    image, tokens = ours.prepare(x1, IDS[:2]), ours.prepare(x1, IDS[:2], patch_size=patch_size)
    assert torch.equal(tokens.x, to_tokens(image.x, patch_size))
    assert torch.equal(tokens.t, image.t) and torch.equal(tokens.slowed_t, image.slowed_t)


def test_tokens_through_a_linear_layer_are_the_patch_embedding() -> None:
    """Conv2d with kernel = stride = p, as SiT and RAE embed patches: another library's truth."""
    conv = torch.nn.Conv2d(4, 24, 2, stride=2)  # on the CPU: a GPU's would be TF32
    ours, _ = pair()
    x1 = data(2, 4, 6, 8)
    image = conv(ours.prepare(x1, IDS[:2]).x.cpu()).flatten(2).transpose(1, 2)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    tokens = ours.prepare(x1, IDS[:2], patch_size=2).x.cpu()
    assert relative_rms(torch.nn.functional.linear(tokens, weight, conv.bias), image) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("patch_size", [None, 2])
def test_moments_are_sampled_in_registers(dtype: torch.dtype, patch_size: int | None) -> None:
    mean, std = data(3, 4, 6, 6, dtype=dtype), data(3, 4, 6, 6, dtype=dtype, seed=1).abs()
    moments = Moments(mean, std, 0.18215)
    ours, plain = pair()
    it = ours.prepare(moments, IDS, patch_size=patch_size)
    eps = philox.normal_reference(SEED, Stream.POSTERIOR, IDS, 144).view(3, 4, 6, 6)
    x1 = (mean.float() + std.float() * eps) * 0.18215
    torch.testing.assert_close(it.x1, x1, rtol=1e-5, atol=1e-5 if ON_GPU else 1e-6)
    torch.testing.assert_close(plain.prepare(moments, IDS).x1, x1, rtol=1e-6, atol=1e-7)
    expected = plain.prepare(x1, IDS, patch_size=patch_size)
    assert it.x.dtype == dtype
    floor = (2e-6 if ON_GPU else 1e-6) if dtype == torch.float32 else 4e-3
    assert relative_rms(it.x, expected.x) < floor
    # The posterior does not share its numbers with the noise.
    assert abs(torch.corrcoef(torch.stack([eps.flatten(), it.x0().flatten()]))[0, 1]) < 0.15


def test_a_sample_alone_and_in_a_batch_of_256() -> None:
    """The same bits for input and loss."""
    ids = torch.arange(256, device=DEVICE) * 1009
    x1, pred = data(256, 4, 4, 4), data(256, 4, 4, 4, seed=1)
    ours, _ = pair()
    batch = ours.prepare(x1, ids)
    losses = ours.loss(pred, batch, reduction="none")
    for i in (0, 255):
        one = ours.prepare(x1[i : i + 1], ids[i : i + 1])
        assert torch.equal(one.x[0], batch.x[i]) and one.t[0] == batch.t[i]
        assert ours.loss(pred[i : i + 1], one, reduction="none")[0] == losses[i]


def test_bits_do_not_depend_on_how_much_a_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair()
    x1 = data(1, 5, 1000)
    once = ours.prepare(x1, IDS[:1]).x
    for loops in (2, 4, 8):
        monkeypatch.setattr(
            launch, "get_layout", lambda shape, p, _, loops=loops: get_layout(shape, p, loops)
        )
        assert torch.equal(ours.prepare(x1, IDS[:1]).x, once)


def test_bits_do_not_depend_on_the_dtype_of_the_data() -> None:
    """bf16 and fp32 make their normals in groups of other sizes: the numbers are the same."""
    ours, _ = pair()
    m = torch.zeros(3, device=DEVICE)
    full = ours.prepare(torch.zeros(3, 4, 6, 6, device=DEVICE), IDS, t=m, slowed_t=m).x
    for dtype in (torch.bfloat16, torch.float16):
        x1 = torch.zeros(3, 4, 6, 6, dtype=dtype, device=DEVICE)
        assert torch.equal(ours.prepare(x1, IDS, t=m, slowed_t=m).x, full.to(dtype))


def test_layouts_of_the_input() -> None:
    ours, _ = pair()
    x1 = data(3, 4, 6, 6)
    plain = ours.prepare(x1, IDS).x
    wide = data(3, 9, 6, 6)
    wide[:, 2:6] = x1
    for same in (x1.to(memory_format=torch.channels_last), wide[:, 2:6]):
        assert not same.is_contiguous()
        assert torch.equal(ours.prepare(same, IDS).x, plain)
    x0 = data(3, 6, 6, 4, seed=2).permute(0, 3, 1, 2)
    expected = ours.prepare(x1, IDS, x0=x0.contiguous()).x
    assert torch.equal(ours.prepare(x1, IDS, x0=x0).x, expected)
    moments = Moments(x0, x0.abs())
    assert torch.equal(
        ours.prepare(moments, IDS).x,
        ours.prepare(Moments(x0.contiguous(), x0.abs().contiguous()), IDS).x,
    )
    row = ours.prepare(x1[:1].expand(3, 4, 6, 6), IDS).x
    assert torch.equal(row, ours.prepare(x1[:1].repeat(3, 1, 1, 1), IDS).x)
    assert ours.prepare(x1[:0], IDS[:0]).x.shape == (0, 4, 6, 6)
    assert ours.prepare(x1[:0], IDS[:0], patch_size=2).x.shape == (0, 9, 16)


def test_layouts_of_ids_and_times() -> None:
    """Columns of tables, every other entry, one time for all."""
    ours, _ = pair()
    x1 = data(3, 4, 6, 6)
    table = torch.stack([IDS, IDS + 1], dim=1)
    plain = ours.prepare(x1, IDS)
    for ids in (table[:, 0], table.flatten()[::2]):
        assert torch.equal(ids, IDS) and not ids.is_contiguous()
        it = ours.prepare(x1, ids)
        assert torch.equal(it.x, plain.x) and torch.equal(it.x0(), plain.x0())
        assert torch.equal(ours.loss(x1, it), ours.loss(x1, plain))
    every = torch.linspace(0.1, 0.9, 6, device=DEVICE)[::2]
    one = torch.full((1,), 0.25, device=DEVICE).expand(3)
    for time in (every, one):
        a = ours.prepare(x1, IDS, t=time, slowed_t=time)
        b = ours.prepare(x1, IDS, t=time.clone(), slowed_t=time.contiguous().clone())
        assert torch.equal(a.t, time) and torch.equal(a.slowed_t, time)
        assert torch.equal(a.x, b.x) and torch.equal(ours.loss(x1, a), ours.loss(x1, b))


@pytest.mark.parametrize("clock", CLOCKS)
def test_slowed_times_are_kept_within_bounds(clock: str) -> None:
    """Times t just inside and outside of SiT's [1e-3, 1 - 1e-3], and m anywhere in it."""
    low = torch.tensor([5e-4, 1e-3, 2e-3, 0.5], device=DEVICE)
    t = low if clock == DATA_AT_1 else 1 - low
    ours, plain = pair(clock=clock, prediction="noise", gamma=1.0)
    x1, ids = torch.zeros(4, 1, device=DEVICE), torch.arange(4, device=DEVICE)
    a, b = (mix.prepare(x1, ids, t=t).slowed_t for mix in (ours, plain))
    torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-7)
    engine = a if clock == DATA_AT_1 else 1 - a
    assert engine[0].item() == pytest.approx(5e-4, rel=1e-3)  # never beyond t
    assert engine[1:].min().item() >= 1e-3 - 1e-7
    # Positions whose uniform numbers fall outside of the bounds, by search.
    many = torch.arange(20_000)
    v = philox.uniform(SEED, Stream.SLOWING, many)[:, 0]
    u = philox.uniform(SEED, Stream.TIME, many)[:, 0]
    ids = torch.stack([v.argmin(), v.argmax(), u.argmin(), u.argmax()]).to(DEVICE)
    assert v.min() < 1e-3 and v.max() > 1 - 1e-3 and u.max() > 1 - 1e-4
    for options in (dict(prediction="noise", interval="full"), dict(path="vp", interval="full")):
        mixes = pair(clock=clock, timesteps="uniform", **options)
        a, b = (mix.prepare(x1, ids) for mix in mixes)
        low, high = mixes[0].path.train_bounds(mixes[0].prediction)
        for name in ("t", "slowed_t"):
            ours, plain = getattr(a, name), getattr(b, name)
            torch.testing.assert_close(ours, plain, rtol=3e-7, atol=1e-7)
            engine = ours if clock == DATA_AT_1 else 1 - ours
            assert engine.min() >= low - 1e-7 and engine.max() <= high + 1e-7


@pytest.mark.parametrize("bad", [500.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_times_that_nobody_could_check_give_nan(
    bad: float, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where the check of values would be a synchronisation."""
    from mixflow_fast.objective import checks

    monkeypatch.setattr(checks.torch.compiler, "is_compiling", lambda: True)
    x1, t = data(2, 4, 6, 6), torch.tensor([0.5, bad], device=DEVICE)
    for path in ("linear", "gvp"):
        mix = MixFlow(clock=DATA_AT_1, path=path, impl=impl)
        fine = torch.full((2,), 0.4, device=DEVICE)
        for times in (dict(t=t), dict(t=t, slowed_t=fine), dict(t=fine, slowed_t=t)):
            x = mix.prepare(x1, IDS[:2], **times).x
            assert x[0].isfinite().all() and x[1].isnan().all()


def test_grids_and_samples_that_no_launch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits lowered, so that small tensors are beyond them."""
    ours, _ = pair()
    x1 = data(3, 4, 6, 6)
    it = ours.prepare(x1, IDS)
    pred = x1.clone().requires_grad_()
    loss = ours.loss(pred, it)
    monkeypatch.setattr(runtime, "MAX_PROGRAMS", 2)
    for call in (
        lambda: ours.prepare(x1, IDS),
        lambda: ours.loss(x1, it),
        lambda: philox.normal(1, Stream.NOISE, IDS, 5, "triton"),
        lambda: (3 * loss).backward(),
    ):
        with pytest.raises(ValueError, match="split the batch"):
            call()
    monkeypatch.setattr(runtime, "MAX_SAMPLE", 100)
    for call in (lambda: ours.prepare(x1, IDS), lambda: ours.loss(x1, it)):
        with pytest.raises(ValueError, match='impl="reference"'):
            call()


def test_batches_of_more_than_2_31_elements_are_addressed() -> None:
    """Three samples 2**30 elements apart: the third's offset does not fit 32 bits."""
    stride = 1 << 30
    storage = torch.zeros(1, dtype=torch.bfloat16, device=DEVICE)
    storage = storage.new_empty(0).set_(
        torch.UntypedStorage(2 * (2 * stride + 64), device=DEVICE), 0, (2 * stride + 64,)
    )
    far = storage.as_strided((3, 64), (stride, 1))
    x1, pred = data(3, 64, dtype=torch.bfloat16), data(3, 64, dtype=torch.bfloat16, seed=1)
    far.copy_(x1)
    ours, _ = pair()
    it, near = ours.prepare(far, IDS), ours.prepare(x1, IDS)
    assert torch.equal(it.x, near.x)
    losses = ours.loss(pred, near, reduction="none")
    assert torch.equal(ours.loss(pred, it, reduction="none"), losses)
    far.copy_(pred)
    assert torch.equal(ours.loss(far, near, reduction="none"), losses)


def test_too_large_for_the_kernels_says_so() -> None:
    mixes = pair()
    like = torch.empty(1, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(ValueError, match=r"2\*\*29"):
        mixes[0].prepare(like.expand(1, 2**29 + 1), IDS[:1])


def test_seed_and_ids_are_read_from_device_memory() -> None:
    """A captured graph replays with the same tensors and other contents."""
    schedule = Schedule.of(DATA_AT_1, "beta21", 0.8, 1.0, "shifted", (0.0, 1.0))
    x1, ids, seed = data(3, 4, 6, 6), IDS.clone(), philox.seed_tensor(1, DEVICE)
    arguments = (x1, schedule, "linear", seed, ids)
    runs = [interpolate(*arguments, impl="triton")]
    ids += 3
    runs.append(interpolate(*arguments, impl="triton"))
    seed += 1
    runs.append(interpolate(*arguments, impl="triton"))
    for a, b in itertools.combinations(runs, 2):
        assert not (a[0] == b[0]).any() and not (a[1] == b[1]).any()
    torch.testing.assert_close(
        runs[2][0], interpolate_reference(x1, schedule, "linear", 2, ids)[0], rtol=0, atol=2e-6
    )


def test_auto_is_the_reference_without_a_gpu() -> None:
    x1 = data(3, 4, 6, 6)
    auto = MixFlow(clock=DATA_AT_1, seed=SEED).prepare(x1, IDS)
    chosen = pair()[0 if ON_GPU else 1].prepare(x1, IDS)
    assert torch.equal(auto.x, chosen.x) and auto._impl == chosen._impl


BAD = [
    (dict(patch_size=4), "divisible"),
    (dict(patch_size=0), "patch_size"),
    (dict(patch_size=True), "patch_size"),
    (dict(x1=torch.zeros(3, 12, device=DEVICE), patch_size=2), r"\(B, C, H, W\)"),
    (dict(x1=torch.zeros(3, 4, 6, 6, dtype=torch.float64, device=DEVICE)), "float32, bfloat16"),
    (dict(x1=[1.0]), "tensor or Moments"),
    (dict(x1=Moments(torch.zeros(3, 4), torch.zeros(3, 5))), "std"),
    (dict(x1=Moments(torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.float16))), "std"),
    (dict(x1=Moments(torch.zeros(3, 4), torch.zeros(3, 4), float("nan"))), "scale"),
    (dict(x0=torch.zeros(3, 4, 6, 6, device="meta")), "x0 must be like x1"),
    (dict(t=torch.zeros(3, device="meta")), "t must be"),
    (dict(t=0.5), "t must be a"),
    (dict(slowed_t=[0.5] * 3), "slowed_t must be a"),
    (dict(x0=[1.0]), "x0 must be a tensor"),
    (dict(x1=Moments(torch.zeros(3, 4), 1.0)), "two tensors"),
    (dict(x1=Moments(Moments(torch.zeros(3, 4), 1.0), torch.zeros(3, 4))), "two tensors"),
    (dict(x1=torch.zeros(3, 0, device=DEVICE)), "must have elements"),
    (dict(dtype=torch.int32), "dtype must be torch.float32"),
    (dict(dtype="bf16"), "dtype must be torch.float32"),
    (dict(dtype=torch.float64), "float32, bfloat16"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair()[0].prepare(**{"x1": data(3, 4, 6, 6), "ids": IDS, **arguments})


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", [0, 1])
def test_x_in_the_type_of_the_run_is_rounded_once(stored: torch.dtype, implementation: int) -> None:
    """fp16 data in a bf16 run: what float32 gives, rounded to bf16, and never to fp16 before."""
    mix = pair()[implementation]
    mean, std = data(3, 16, 8, 8, dtype=stored), data(3, 16, 8, 8, dtype=stored, seed=1).abs()
    for x1 in (mean, Moments(mean, std, 0.18215)):
        wide = Moments(mean.float(), std.float(), 0.18215) if isinstance(x1, Moments) else x1
        wide = wide if isinstance(wide, Moments) else wide.float()
        exact = mix.prepare(wide, IDS).x
        assert exact.dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert torch.equal(mix.prepare(x1, IDS, dtype=dtype).x, exact.to(dtype))
            tokens = mix.prepare(x1, IDS, patch_size=2, dtype=dtype).x
            assert torch.equal(tokens, to_tokens(exact, 2).to(dtype))
        # These numbers would tell.
        twice = exact.to(torch.float16).to(torch.bfloat16)
        assert not torch.equal(twice, exact.to(torch.bfloat16))


@pytest.mark.parametrize(("shape", "patch_size"), [((4, 6, 6), 2), ((4, 7, 5), None)])
def test_moments_in_one_buffer_are_read_where_they_lie(
    shape: tuple[int, int, int], patch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and std are views, a sample of one lies behind a sample of the other: no copies."""
    given, unit_rows = [], runtime.with_unit_rows

    def spy(x: torch.Tensor) -> torch.Tensor:
        given.append(unit_rows(x) is x)
        return unit_rows(x)

    monkeypatch.setattr(runtime, "with_unit_rows", spy)
    buffer = data(3, 2 * shape[0], *shape[1:], dtype=torch.float16)
    buffer[:, shape[0] :].abs_()
    views = Moments(*buffer.chunk(2, dim=1), 0.5)
    copies = Moments(views.mean.clone(), views.std.clone(), 0.5)
    assert not views.mean.is_contiguous() and not views.std.is_contiguous()
    mix, found = pair()[0], []
    for moments in (views, copies):
        it = mix.prepare(moments, IDS, patch_size=patch_size, dtype=torch.bfloat16)
        found.append((it.x, mix.loss(it.x.float(), it)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    # Mean and std of the input; prediction, mean and std of the loss.
    assert given == 2 * 5 * [True]
    mix.prepare(Moments(views.mean.transpose(2, 3), views.std.transpose(2, 3)), IDS)
    assert given[-2:] == [False, False]


def test_the_operator_traces_with_the_type_of_the_run() -> None:
    schedule = Schedule.of(DATA_AT_1, "beta21", 0.8, 1.0, "shifted", (0.0, 1.0))
    seed = philox.seed_tensor(1, DEVICE)
    rows = data(3, 8, 6, 6, dtype=torch.float16)

    def run(rows: torch.Tensor) -> torch.Tensor:
        moments = Moments(rows[:, :4], rows[:, 4:].abs(), 0.5)
        return interpolate(
            moments, schedule, "linear", seed, IDS, impl="triton", dtype=torch.bfloat16
        )[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(rows)
    assert compiled.dtype == torch.bfloat16 and torch.equal(compiled, run(rows))
