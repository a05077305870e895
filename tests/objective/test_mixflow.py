"""`MixFlow` and `mixflow_loss`: parity with the official code, draws, directions, bad input."""

import math
from pathlib import Path

import pytest
import torch

from mixflow_fast import MixFlow, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1, get_path
from tests.support.golden import load
from tests.support.kernels import relative_rms

CLOCKS = (DATA_AT_1, NOISE_AT_1)
TRANSPORT = sorted(f.stem for f in (Path(__file__).parents[1] / "golden").glob("transport_*"))


def batch(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, n, 3, 4, 4, generator=g))


def net(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.view(-1, 1, 1, 1)


def test_all_transport_files_are_here() -> None:
    assert len(TRANSPORT) == 18


@pytest.mark.parametrize("name", TRANSPORT)
@pytest.mark.parametrize("target_at", ["slowed", "label"])
def test_transport_parity(name: str, target_at: str) -> None:
    """SiT's transport.training_losses; without slowing both target conventions are SiT's."""
    golden, config = load(name)
    mix = MixFlow(
        gamma=0,
        clock=DATA_AT_1,
        path=config["path"].lower(),
        timesteps="uniform",
        prediction=config["prediction"],
        loss_weight=config["weight"],
        target_at=target_at,
    )
    t = golden["t"]
    it = mix.prepare(golden["x1"], x0=golden["x0"], t=t, slowed_t=t)
    assert relative_rms(it.x, golden["xt"]) < 1e-6
    velocity = mix.path.velocity(golden["x1"], golden["x0"], t)
    assert relative_rms(velocity, golden["ut"]) < 1e-6
    losses = mix.loss(golden["model_out"], it, reduction="none")
    assert losses.dtype == torch.float32
    assert relative_rms(losses, golden["loss"]) < 1e-6


def test_rae_mixflow_parity() -> None:
    """The published RAE patch: interpolation at m, target x0 - x1."""
    golden, config = load("rae_mixflow_times")
    mix = MixFlow(gamma=config["gamma"], clock=NOISE_AT_1, shift=config["shift"])
    it = mix.prepare(golden["x1"], x0=golden["x0"], t=golden["t_rae"], slowed_t=golden["m_rae"])
    assert relative_rms(it.x, golden["x_m"]) < 1e-14
    losses = mix.loss(torch.zeros_like(it.x), it, reduction="none")
    expected = (golden["target"] ** 2).flatten(1).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-13, atol=0)
    assert mix.loss(golden["target"], it).item() < 1e-28


@pytest.mark.parametrize("clock", CLOCKS)
def test_gamma_zero_uniform_is_plain_flow_matching_bit_for_bit(clock: str) -> None:
    x1, x0 = batch()
    mix = MixFlow(gamma=0, clock=clock, timesteps="uniform")
    it = mix.prepare(x1, ids=torch.arange(6), x0=x0)
    t = it.t.view(-1, 1, 1, 1)
    assert torch.equal(it.t, it.slowed_t)
    if clock == DATA_AT_1:
        x_t, target = t * x1 + (1 - t) * x0, x1 - x0
    else:
        x_t, target = (1 - t) * x1 + t * x0, x0 - x1
    assert torch.equal(it.x, x_t)
    pred = net(x_t, it.t)
    assert torch.equal(mix.loss(pred, it, reduction="none"), ((pred - target) ** 2).mean((1, 2, 3)))


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("interval", ["shifted", "raw"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_x_m_is_noisier_than_x_t(clock: str, interval: str, path: str, shift: float) -> None:
    mix = MixFlow(clock=clock, interval=interval, path=path, shift=shift)
    it = mix.prepare(torch.ones(512, 1, 1, 1), x0=torch.zeros(512, 1, 1, 1), ids=torch.arange(512))
    engine_t = it.t if clock == DATA_AT_1 else 1 - it.t
    signal_at_t = get_path(path).coefficients(engine_t).alpha
    signal = it.x.flatten()  # x1 = 1, x0 = 0: x_m is alpha_m
    assert (signal <= signal_at_t + 1e-6).all()
    assert (signal < signal_at_t - 1e-3).float().mean() > 0.9


@pytest.mark.parametrize("interval", ["shifted", "raw", "full"])
@pytest.mark.parametrize("timesteps", ["uniform", "beta21", "logit-normal(0.3,0.8)"])
def test_mirror_of_the_two_clocks(interval: str, timesteps: str) -> None:
    """The same draws in both clocks: times are mirrored, inputs agree, velocities change sign."""
    x1, _ = batch()
    ids = torch.arange(6) + 1000
    mirrored = timesteps.replace("(0.3", "(-0.3")
    a = MixFlow(clock=DATA_AT_1, interval=interval, timesteps=timesteps, shift=2.0)
    b = MixFlow(clock=NOISE_AT_1, interval=interval, timesteps=mirrored, shift=2.0)
    ia, ib = a.prepare(x1, ids), b.prepare(x1, ids)
    assert torch.equal(ia.x0(), ib.x0())
    torch.testing.assert_close(ib.t, 1 - ia.t, rtol=0, atol=2e-7)
    torch.testing.assert_close(ib.slowed_t, 1 - ia.slowed_t, rtol=0, atol=2e-7)
    torch.testing.assert_close(ib.x, ia.x, rtol=0, atol=2e-6)
    pred = net(ia.x, ia.t)
    torch.testing.assert_close(a.loss(pred, ia), b.loss(-pred, ib), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("interval", "low"), [("shifted", 0.6), ("raw", 0.178)])
def test_interval_conventions(interval: str, low: float) -> None:
    """Lower end of m at t = 1, gamma 0.4, k = sqrt(48)."""
    mix = MixFlow(gamma=0.4, clock=DATA_AT_1, interval=interval, shift=math.sqrt(48))
    it = mix.prepare(torch.zeros(20_000, 1), t=torch.ones(20_000), ids=torch.arange(20_000))
    assert it.slowed_t.min().item() == pytest.approx(low, abs=1e-3)
    drawn = mix.prepare(torch.zeros(2000, 1), ids=torch.arange(2000))
    given = mix.prepare(torch.zeros(2000, 1), ids=torch.arange(2000), t=drawn.t)
    torch.testing.assert_close(given.slowed_t, drawn.slowed_t, rtol=0, atol=2e-6)


def test_full_interval_ignores_t() -> None:
    it = MixFlow(clock=DATA_AT_1, interval="full").prepare(
        torch.zeros(50_000, 1), ids=torch.arange(50_000)
    )
    m = it.slowed_t.double()
    assert m.mean().item() == pytest.approx(0.5, abs=0.006)
    assert abs(torch.corrcoef(torch.stack([m, it.t.double()]))[0, 1].item()) < 0.02


def test_joint_distribution_of_t_and_slowed_t_is_uniform_on_the_wedge() -> None:
    """Beta(2,1) and gamma = 1: p(m, t) = 2 on 0 < m < t < 1 (the paper's argument for Beta)."""
    it = MixFlow(gamma=1.0, clock=DATA_AT_1).prepare(
        torch.zeros(200_000, 1), ids=torch.arange(200_000)
    )
    t, m = it.t.double(), it.slowed_t.double()
    boxes = [((0.8, 1.0), (0.0, 0.2)), ((0.4, 0.6), (0.1, 0.3)), ((0.9, 1.0), (0.7, 0.8))]
    for (t0, t1), (m0, m1) in boxes:
        inside = ((t > t0) & (t < t1) & (m > m0) & (m < m1)).double().mean().item()
        expected = 2 * (t1 - t0) * (m1 - m0)
        assert inside == pytest.approx(expected, abs=5 * math.sqrt(expected / 200_000))


def test_draws_depend_on_seed_and_ids_alone() -> None:
    x1, _ = batch()
    ids = torch.tensor([9, 4, 2**40, 7, 1, 0])
    mix = MixFlow(clock=DATA_AT_1, seed=5)
    it = mix.prepare(x1, ids)
    for i in range(6):
        one = mix.prepare(x1[i : i + 1], ids[i : i + 1])
        assert torch.equal(one.x[0], it.x[i])
        assert one.t[0] == it.t[i] and one.slowed_t[0] == it.slowed_t[i]
        assert torch.equal(one.x0()[0], it.x0()[i])
    other = MixFlow(clock=DATA_AT_1, seed=6).prepare(x1, ids)
    assert not (other.t == it.t).any() and not (other.x0() == it.x0()).any()
    assert not (other.slowed_t / other.t == it.slowed_t / it.t).any()
    same = mix.prepare(x1, ids.tolist())
    assert torch.equal(same.x, it.x) and same.ids.dtype == torch.int64


def test_without_ids_every_call_draws_afresh() -> None:
    x1, _ = batch()
    mix = MixFlow(clock=DATA_AT_1)
    first, second = mix.prepare(x1), mix.prepare(x1)
    assert first.ids.tolist() == [0, 1, 2, 3, 4, 5] and second.ids.tolist() == list(range(6, 12))
    assert not torch.equal(first.t, second.t)
    losses = {mixflow_loss(net, x1, clock=DATA_AT_1, seed=77).item() for _ in range(3)}
    assert len(losses) == 3


def test_calls_without_ids_go_on_whatever_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of gamma must not replay the noise; ranks with unequal batches must not meet."""
    seen: list[torch.Tensor] = []

    def spy(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append(t)
        return net(x, t)

    for step in range(3):
        mixflow_loss(spy, batch()[0], clock=DATA_AT_1, seed=99, gamma=0.2 + 0.1 * step)
    assert len(torch.cat(seen).unique()) == 18

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    ids = []
    for rank, sizes in ((0, (4, 3, 5)), (1, (4, 4, 2))):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        mix = MixFlow(clock=DATA_AT_1)
        ids += [mix.prepare(batch(n)[0]).ids for n in sizes]
    assert len(torch.cat(ids).unique()) == 22


@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("given", [False, True])
def test_compiled_step_is_one_graph_and_draws_afresh(
    prediction: str, clock: str, given: bool
) -> None:
    torch._dynamo.reset()
    x1, x0 = batch()
    options = dict(clock=clock, prediction=prediction, path="vp", seed=31)
    mixes = [MixFlow(**options), MixFlow(**options)]
    times = dict(t=torch.full((6,), 0.6), x0=x0) if given else {}
    if given:
        times["slowed_t"] = torch.full((6,), 0.5 if clock == DATA_AT_1 else 0.7)

    def step(mix: MixFlow) -> torch.Tensor:
        it = mix.prepare(x1, **times)
        return mix.loss(net(it.x, it.t), it, reduction="none")

    compiled = torch.compile(lambda: step(mixes[0]), fullgraph=True, backend="eager")
    losses = [compiled() for _ in range(12)]
    for loss in losses:
        torch.testing.assert_close(loss, step(mixes[1]), rtol=1e-6, atol=1e-6)
    assert len({loss[0].item() for loss in losses}) == (1 if given else 12)
    if not given:
        whole = torch.compile(
            lambda: mixflow_loss(net, x1, **(options | {"seed": 32})),
            fullgraph=True,
            backend="eager",
        )
        assert len({whole().item() for _ in range(12)}) == 12


def test_odd_batches() -> None:
    mix = MixFlow(clock=DATA_AT_1)
    empty = mix.prepare(torch.zeros(0, 3, 4, 4))
    assert empty.x.shape == (0, 3, 4, 4) and empty.t.shape == (0,)
    assert mix.loss(empty.x, empty, reduction="none").shape == (0,)
    x1, ids = batch()[0], torch.arange(6)
    plain = mix.prepare(x1, ids)
    for layout in (x1.to(memory_format=torch.channels_last), x1.transpose(2, 3).transpose(2, 3)):
        it = mix.prepare(layout, ids)
        assert torch.equal(it.x, plain.x) and torch.equal(mix.loss(x1, it), mix.loss(x1, plain))
    assert mix.prepare(torch.ones(1, 1), ids[:1]).x.shape == (1, 1)


@pytest.mark.parametrize("timesteps", ["uniform", "beta21", "logit-normal"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_slowing_law_through_prepare(timesteps: str, clock: str) -> None:
    """Given t, m is uniform on [(1 - gamma) t, t] in the paper's clock."""
    n = 50_000
    it = MixFlow(gamma=0.4, clock=clock, timesteps=timesteps).prepare(
        torch.zeros(n, 1), ids=torch.arange(n)
    )
    t, m = (v.double() if clock == DATA_AT_1 else 1 - v.double() for v in (it.t, it.slowed_t))
    far = t > 0.05  # where float32 leaves the ratio its digits
    v = ((1 - m / t) / 0.4)[far]
    assert v.min() > -1e-4 and v.max() < 1 + 1e-4
    counts = torch.histc(v, bins=20, min=0, max=1)
    expected = len(v) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 19 + 5 * math.sqrt(38)
    assert abs(torch.corrcoef(torch.stack([v, t[far]]))[0, 1]) < 5 / math.sqrt(n)


@pytest.mark.parametrize("interval", ["shifted", "raw"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_shifted_density_of_t_through_prepare(clock: str, interval: str) -> None:
    """beta21 with shift k: P(t <= x) = (k x / (1 + (k-1) x))^2 in the paper's clock."""
    k, n = math.sqrt(48), 100_000
    mix = MixFlow(clock=clock, shift=k, interval=interval)
    t = mix.prepare(torch.zeros(n, 1), ids=torch.arange(n)).t.double()
    t = (t if clock == DATA_AT_1 else 1 - t).sort().values
    cdf = (k * t / (1 + (k - 1) * t)) ** 2
    steps = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("weight", ["velocity", "likelihood"])
@pytest.mark.parametrize("target_at", ["slowed", "label"])
def test_score_and_weights_follow_target_at(weight: str, target_at: str) -> None:
    """With t = 0.8 and m = 0.3 on the linear path: weights (1/s)^2, 1/(s (1-s)), scale 1-s."""
    x1, x0 = batch()
    t, m = torch.full((6,), 0.8), torch.full((6,), 0.3)
    time = 0.3 if target_at == "slowed" else 0.8
    factor = {"velocity": 1 / time**2, "likelihood": 1 / (time * (1 - time))}[weight]
    options = dict(clock=DATA_AT_1, loss_weight=weight, target_at=target_at)
    for prediction, error in (("noise", x1 - x0), ("score", x1 * (1 - time) + x0)):
        mix = MixFlow(prediction=prediction, **options)
        it = mix.prepare(x1, x0=x0, t=t, slowed_t=m)
        torch.testing.assert_close(mix.loss(x1, it), factor * (error**2).mean())


@pytest.mark.parametrize("clock", CLOCKS)
def test_mixflow_loss_is_prepare_and_loss(clock: str) -> None:
    x1, x0 = batch()
    ids, y = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    mix = MixFlow(gamma=0.5, clock=clock)
    it = mix.prepare(x1, ids)
    expected = mix.loss(net(it.x, it.t, y), it, reduction="none")
    got = mixflow_loss(net, x1, y, gamma=0.5, clock=clock, ids=ids, reduction="none")
    assert torch.equal(got, expected)


def test_targets_at_label_and_slowed_differ_off_the_linear_path() -> None:
    x1, x0 = batch()
    t, m = torch.full((6,), 0.8), torch.full((6,), 0.3)
    for path, same in [("linear", True), ("gvp", False)]:
        losses = []
        for target_at, time in [("slowed", m), ("label", t)]:
            mix = MixFlow(clock=DATA_AT_1, path=path, target_at=target_at)
            it = mix.prepare(x1, x0=x0, t=t, slowed_t=m)
            exact = get_path(path).velocity(x1, x0, time)
            assert mix.loss(exact, it).item() < 1e-12
            losses.append(mix.loss(torch.zeros_like(x1), it).item())
        assert (losses[0] == losses[1]) is same


def test_weights_and_reductions() -> None:
    x1, x0 = batch()
    mix = MixFlow(clock=DATA_AT_1)
    it = mix.prepare(x1, ids=torch.arange(6))
    pred = net(it.x, it.t)
    square = (pred - (x1 - it.x0())) ** 2
    w, mask = torch.rand(6), (torch.rand(6, 1, 4, 4) > 0.5).float()
    none = mix.loss(pred, it, reduction="none")
    torch.testing.assert_close(none, square.mean((1, 2, 3)))
    torch.testing.assert_close(mix.loss(pred, it, weight=w), (w * none).mean())
    torch.testing.assert_close(
        mix.loss(pred, it, weight=mask, reduction="sum"), (square * mask).mean((1, 2, 3)).sum()
    )


@pytest.mark.parametrize("prediction", ["velocity", "noise", "data", "score"])
def test_gradient_of_the_loss(prediction: str) -> None:
    x1, x0 = (v.double() for v in batch(2))
    mix = MixFlow(clock=NOISE_AT_1, prediction=prediction, path="gvp")
    it = mix.prepare(x1, ids=torch.arange(2))
    pred = torch.randn_like(x1).requires_grad_()
    assert it.x.dtype == torch.float64 and it.t.dtype == torch.float32
    assert torch.autograd.gradcheck(lambda p: mix.loss(p, it, reduction="none"), (pred,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_data_computes_in_float32(dtype: torch.dtype) -> None:
    x1, x0 = batch()
    mix = MixFlow(clock=DATA_AT_1)
    it = mix.prepare(x1.to(dtype), ids=torch.arange(6))
    full = mix.prepare(x1.to(dtype).float(), ids=torch.arange(6))
    assert it.x.dtype == dtype and it.t.dtype == torch.float32
    assert torch.equal(it.x, full.x.to(dtype))
    pred = full.x.to(dtype)
    assert torch.equal(mix.loss(pred, it), mix.loss(pred.float(), full))


@pytest.mark.parametrize(
    ("prediction", "path", "low", "high"),
    [("noise", "linear", 1e-3, 1 - 1e-3), ("velocity", "vp", 0.0, 1 - 1e-5)],
)
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("shift", [1.0, math.sqrt(48)])
@pytest.mark.parametrize("interval", ["shifted", "raw", "full"])
def test_times_keep_off_singular_ends(
    prediction: str, path: str, low: float, high: float, clock: str, shift: float, interval: str
) -> None:
    """SiT's check_interval: 200,000 draws stay inside, come near, and m is never beyond t."""
    n = 200_000
    mix = MixFlow(1.0, clock, path, "uniform", shift, prediction, interval=interval)
    it = mix.prepare(torch.zeros(n, 1), ids=torch.arange(n))
    t, m = (v.double() if clock == DATA_AT_1 else 1 - v.double() for v in (it.t, it.slowed_t))
    for times in (t, m):
        assert times.min() >= low - 1e-7 and times.max() <= high + 1e-7
    assert t.min() < low + 1e-4 and t.max() > high - 40 * shift / n
    if interval != "full":
        assert (m <= t + 1e-7).all()


def test_given_times_at_the_ends_are_used_exactly() -> None:
    t = torch.tensor([0.0, 5e-4, 0.3, 1.0])
    for clock in CLOCKS:
        for options in ({"prediction": "noise"}, {"path": "vp"}, {"interval": "raw", "shift": 6.9}):
            it = MixFlow(0, clock, **options).prepare(torch.zeros(4, 1), t=t)
            assert torch.equal(it.t, t) and torch.equal(it.slowed_t, t)


BAD_OPTIONS = [
    ({}, "clock is required"),
    ({"clock": "sit"}, "clock must be one of"),
    ({"gamma": 1.5}, "gamma"),
    ({"gamma": -0.1}, "gamma"),
    ({"gamma": float("nan")}, "gamma"),
    ({"gamma": "0.8"}, "gamma"),
    ({"shift": 0.5}, "shift"),
    ({"path": "cosine"}, "path"),
    ({"timesteps": "beta"}, "timesteps"),
    ({"prediction": "v"}, "prediction"),
    ({"target_at": "t"}, "target_at"),
    ({"loss_weight": "snr", "prediction": "noise"}, "loss_weight"),
    ({"loss_weight": "velocity"}, "loss_weight"),
    ({"interval": "wide"}, "interval"),
    ({"impl": "cuda"}, "impl"),
    ({"source": object()}, "source"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options(options: dict, message: str) -> None:
    if options:
        options = {"clock": DATA_AT_1, **options}
    with pytest.raises(ValueError, match=message):
        MixFlow(**options)


def test_unknown_option_of_mixflow_loss() -> None:
    with pytest.raises(ValueError, match="gama"):
        mixflow_loss(net, torch.zeros(2, 3), clock=DATA_AT_1, gama=0.3)


X1 = torch.zeros(4, 3, 2, 2)
BAD_BATCHES = [
    (dict(x1=torch.zeros(4)), "x1"),
    (dict(x1=torch.zeros(4, 3, dtype=torch.int64)), "x1"),
    (dict(ids=torch.arange(3)), "ids"),
    (dict(ids=torch.arange(4.0)), "ids"),
    (dict(ids=[True] * 4), "ids"),
    (dict(x0=torch.zeros(4, 3, 2, 1)), "x0"),
    (dict(t=torch.zeros(3)), "t must be"),
    (dict(t=torch.zeros(4, dtype=torch.bfloat16)), "half-precision"),
    (dict(t=torch.full((4,), 500.0)), "divide by 1000"),
    (dict(t=torch.full((4,), float("nan"))), r"\[0, 1\]"),
    (dict(slowed_t=torch.full((4,), -0.1)), "slowed_t"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_BATCHES)
def test_bad_batches(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixFlow(clock=DATA_AT_1).prepare(**{"x1": X1, **arguments})


def test_bad_predictions() -> None:
    mix = MixFlow(clock=DATA_AT_1)
    it = mix.prepare(X1)
    with pytest.raises(ValueError, match="learn_sigma"):
        mix.loss(torch.zeros(4, 6, 2, 2), it)
    with pytest.raises(ValueError, match="pred"):
        mix.loss(torch.zeros(4, 3, 2, 3), it)
    with pytest.raises(ValueError, match="reduction"):
        mix.loss(X1, it, reduction="avg")
    with pytest.raises(ValueError, match="weight"):
        mix.loss(X1, it, weight=torch.ones(3))
    with pytest.raises(ValueError, match="one tensor"):
        mix.loss((X1, []), it)
    torch.testing.assert_close(mix.loss(X1, it, weight=2.0), 2 * mix.loss(X1, it))
    with pytest.raises(ValueError, match="one tensor"):
        mixflow_loss(lambda x, t: (x, []), X1, clock=DATA_AT_1)
