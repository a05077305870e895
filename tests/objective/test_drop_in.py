"""Drop-in proofs: in four trainers MixFlow gives the plain loss and gradients, and noisier inputs.

The trainers, before and after, are in drop_in_trainers.py; docs/drop-in.md is executed in
test_drop_in_docs.py.
"""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from mixflow_fast import MixFlow, mixflow_loss
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.flow.timesteps import shift_time
from tests.support.drop_in_trainers import (
    IMPLS,
    OTHER,
    PROJ_COEFF,
    TOLERANCE,
    TRAINERS,
    Trainer,
    assert_same,
    images,
    loss_and_gradients,
    relative,
    repa,
    repa_loss,
    repa_with_mixflow,
    sd3,
    sd3_loss,
    sd3_with_mixflow,
    sit_losses,
    spread,
)
from tests.support.golden import load


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on tensors this small mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=TRAINERS)
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return TRAINERS[request.param]


T = torch.tensor([0.25, 0.5, 0.875])


def slower(trainer: Trainer) -> Tensor:
    """Slowed times for T: two fifths of the way to the noise."""
    return 0.6 * T if trainer.options["clock"] == DATA_AT_1 else T + 0.4 * (1 - T)


@pytest.mark.parametrize("slowed", [False, True])
def test_loss_and_all_gradients_equal_the_plain_trainer(
    trainer: Trainer, impl: str, slowed: bool
) -> None:
    model, b = trainer.build()
    x0 = images(*b["x1"].shape, seed=1)
    m = slower(trainer) if slowed else T
    given = {"x0": x0, "t": T} | ({"slowed_t": m} if slowed else {})
    mix = MixFlow(**trainer.options | ({} if slowed else {"gamma": 0}), impl=impl)
    it = mix.prepare(b["x1"], **given)
    data, noise = (spread(level) for level in trainer.levels(m))
    x_m = data * b["x1"] + noise * x0
    assert torch.equal(it.t, T) and torch.equal(it.slowed_t, m)
    assert torch.equal(it.x, x_m) if impl == "reference" else relative(it.x, x_m) < TOLERANCE
    target = (b["x1"] - x0) if trainer.options["clock"] == DATA_AT_1 else (x0 - b["x1"])
    assert mix.loss(target, it).item() < 1e-12
    plain = trainer.plain(model, b, x0, T, m)
    plain = loss_and_gradients(model, plain)
    ours = loss_and_gradients(model, trainer.after(mix, model, b, **given))
    assert_same(ours, plain)
    if impl == "reference":  # to the last bit; the losses' sums may be ordered differently
        assert all(torch.equal(ours[1][name], g) for name, g in plain[1].items())
    # The mirrored clock is no rounding error: every comparison above would see it.
    mirrored = {"clock": OTHER[trainer.options["clock"]], "interval": "full"}
    wrong = MixFlow(**trainer.options | mirrored, impl=impl)
    with torch.no_grad():
        assert abs(trainer.after(wrong, model, b, **given) / plain[0] - 1) > 1000 * TOLERANCE


def measured_noise(x: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    """(B,) s of x = a x1 + s x0 by least squares, from the tensors alone; a + s is 1."""
    ends = torch.stack([x1.flatten(1), x0.flatten(1)], dim=2).double()
    a, s = torch.linalg.lstsq(ends, x.double().flatten(1).unsqueeze(2)).solution.squeeze(2).T
    assert (a + s - 1).abs().max() < 1e-5
    return s


@pytest.mark.parametrize("direction", ["right", "mirrored", "backwards"])
def test_the_input_is_noisier_than_t_says(trainer: Trainer, impl: str, direction: str) -> None:
    """On drawn times. With the other clock, or slowed towards the data, the check fails."""
    n = 64 if impl == "reference" else 8
    x1, x0 = images(n, 4, 4, 4), images(n, 4, 4, 4, seed=1)
    clock, ids = trainer.options["clock"], torch.arange(n)
    if direction == "mirrored":
        clock = OTHER[clock]
    mix = MixFlow(**trainer.options | {"clock": clock}, impl=impl)
    it = mix.prepare(x1, ids=ids, x0=x0)
    if direction == "backwards":
        v = 0.8 * images(n, seed=9).sigmoid()
        m = it.t + v * (1 - it.t) if clock == DATA_AT_1 else it.t * (1 - v)
        with pytest.raises(ValueError, match="slowed_t must be at least as noisy as t"):
            mix.prepare(x1, x0=x0, t=it.t, slowed_t=m)
        mix = MixFlow(**trainer.options | {"interval": "full"}, impl=impl)
        it = mix.prepare(x1, x0=x0, t=it.t, slowed_t=m)
    measured, claimed = measured_noise(it.x, x0, x1), trainer.levels(it.t)[1]
    noisier = bool((measured >= claimed - 1e-5).all())
    assert noisier is (direction == "right")
    if noisier:
        assert (measured > claimed + 1e-3).float().mean() > 0.8


@pytest.mark.parametrize("clock", [None, "sit", "noise", "t=1", 1, True])
def test_missing_or_misspelt_clock(trainer: Trainer, clock: Any) -> None:
    options = {k: v for k, v in trainer.options.items() if k != "clock"}
    if clock is not None:
        options["clock"] = clock
    message = "clock is required" if clock is None else "clock must be one of"
    with pytest.raises(ValueError, match=message):
        MixFlow(**options)
    with pytest.raises(ValueError, match=message):
        mixflow_loss(lambda x, t: x, images(2, 4, 2, 2), **options)


def test_sit_equals_the_official_transport(impl: str) -> None:
    g, _ = load("transport_linear_velocity_none")
    b = {"x1": g["x1"], "y": None}

    def net(x: Tensor, t: Tensor, y: None) -> Tensor:
        return torch.tanh(0.7 * x) + 0.3 * spread(t)

    assert relative(sit_losses(net, b, g["x0"], g["t"], g["t"]), g["loss"]) < TOLERANCE
    mix = MixFlow(gamma=0, clock=DATA_AT_1, impl=impl)
    it = mix.prepare(g["x1"], x0=g["x0"], t=g["t"])
    assert relative(it.x, g["xt"]) < TOLERANCE
    losses = mix.loss(net(it.x, it.t, None), it, reduction="none")
    assert relative(losses, g["loss"]) < TOLERANCE


def test_repa_equals_the_official_loss(impl: str) -> None:
    g, _ = load("repa_loss_0")
    model, b = repa()
    b |= {"x1": g["x1"], "y": load("repa_0")[0]["y"], "zs": [g["target_z0"]]}
    truth = g["denoising_loss"].mean() + PROJ_COEFF * g["proj_loss"]
    plain = repa_loss(model, b, g["noise"], g["t_repa"], g["t_repa"])
    mix = MixFlow(gamma=0, clock=NOISE_AT_1, impl=impl)
    ours = repa_with_mixflow(mix, model, b, x0=g["noise"], t=g["t_repa"])
    for loss in (plain, ours):  # two implementations of a network: 1e-5, as in test_sit.py
        assert relative(loss.detach().view(1), truth.view(1)) < 1e-5


def test_rae_equals_the_published_patch(impl: str) -> None:
    """Beta(2,1), then the shift, then slowing in shifted time; and the shift's own value."""
    g, config = load("rae_mixflow_times")
    k, gamma = TRAINERS["rae"].options["shift"], TRAINERS["rae"].options["gamma"]
    assert (k, gamma) == (pytest.approx(config["shift"], rel=1e-12), config["gamma"])
    assert k == pytest.approx(math.sqrt(768 * 16 * 16 / 4096), rel=1e-12)
    raw = 1 - (config["t1"] * g["u"]).sqrt()
    t = k * raw / (1 + (k - 1) * raw)
    m = t + g["u2"] * gamma * (1 - t)
    assert relative(t, g["t_rae"]) < 1e-12 and relative(m, g["m_rae"]) < 1e-12
    n = 64 if impl == "reference" else 8
    x1, x0, t, m = (g[key][:n].float() for key in ("x1", "x0", "t_rae", "m_rae"))
    mix = MixFlow(**TRAINERS["rae"].options, impl=impl)
    it = mix.prepare(x1, x0=x0, t=t, slowed_t=m)
    assert relative(it.x, g["x_m"][:n]) < TOLERANCE
    assert mix.loss(g["target"][:n].float(), it).item() < 1e-12
    losses = mix.loss(torch.zeros_like(x1), it, reduction="none")
    assert relative(losses, (g["target"][:n] ** 2).mean((1, 2, 3))) < TOLERANCE


def test_sd3_inputs_and_target_are_the_scheduler_s(impl: str) -> None:
    """`scale_noise` makes the input; one Euler step along the target is the next `scale_noise`."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    x1, x0 = images(4, 4, 4, 4), images(4, 4, 4, 4, seed=1)
    index = torch.tensor([0, 100, 700, 998])
    times, sigmas = scheduler.timesteps[index], scheduler.sigmas[index]
    assert relative(sigmas * 1000, times) < TOLERANCE
    raw = 1 - index / 1000
    assert relative(shift_time(raw, 3.0, NOISE_AT_1), sigmas) < TOLERANCE
    mix = MixFlow(gamma=0, clock=NOISE_AT_1, impl=impl)
    it = mix.prepare(x1, x0=x0, t=sigmas)
    assert relative(it.x, scheduler.scale_noise(x1, times, x0)) < TOLERANCE
    target = x0 - x1
    assert mix.loss(target, it).item() < 1e-12
    stepped = it.x + spread(scheduler.sigmas[index + 1] - sigmas) * target
    following = scheduler.scale_noise(x1, scheduler.timesteps[index + 1], x0)
    assert relative(stepped, following) < TOLERANCE


def test_sd3_sigma_laws_mirror_the_mean() -> None:
    """diffusers' u counts from the noise end: logit_mean m is logit-normal(-m, s) of sigma."""
    n, scheduler = 20_000, FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = compute_density_for_timestep_sampling(
        "logit_normal", n, 0.5, 0.8, generator=torch.Generator().manual_seed(0)
    )
    theirs = scheduler.sigmas[(u * 1000).long()].sort().values
    for mean, same in ((-0.5, True), (0.5, False)):
        mix = MixFlow(0, NOISE_AT_1, timesteps=f"logit-normal({mean}, 0.8)", shift=3.0)
        ours = mix.prepare(torch.zeros(n, 1), ids=torch.arange(n)).t.sort().values
        assert bool((ours - theirs).abs().mean() < 0.01) is same


def test_sd3_in_bf16_keeps_sigmas_in_float32(impl: str) -> None:
    model, b = sd3()
    model.bfloat16()
    b = {k: v.bfloat16() if isinstance(v, Tensor) else v for k, v in b.items()}
    sigmas = torch.tensor([0.997, 0.6, 0.0123])
    x0 = images(3, 4, 8, 8, seed=1).bfloat16()
    mix = MixFlow(gamma=0, clock=NOISE_AT_1, impl=impl)
    it = mix.prepare(b["x1"], x0=x0, t=sigmas)
    exact = (1 - spread(sigmas)) * b["x1"].float() + spread(sigmas) * x0.float()
    assert it.x.dtype == torch.bfloat16 and it.t.dtype == torch.float32
    assert torch.equal(it.x, exact.bfloat16())
    plain = sd3_loss(model, b, x0, sigmas, sigmas).detach()
    ours = sd3_with_mixflow(mix, model, b, x0=x0, t=sigmas).detach()
    torch.testing.assert_close(ours, plain, rtol=TOLERANCE, atol=0)
    rounded = sigmas.bfloat16()
    assert abs(rounded.float() / sigmas - 1).max() > 1e-3  # what the check below saves one from
    for name in ("t", "slowed_t"):
        with pytest.raises(ValueError, match="half-precision times lose the noise level"):
            mix.prepare(b["x1"], x0=x0, **{"t": sigmas} | {name: rounded})
    with pytest.raises(ValueError, match="divide by 1000"):
        mix.prepare(b["x1"], x0=x0, t=sigmas * 1000)


def test_a_scaled_fp16_loss_keeps_its_small_gradients(impl: str) -> None:
    """A GradScaler multiplies the loss so that gradients below fp16's range survive."""
    x1, x0 = images(2, 4, 32, 32), images(2, 4, 32, 32, seed=1)
    pred = (x1 - x0 + 0.003 * images(2, 4, 32, 32, seed=2)).half()
    scale, target = 2.0**16, x1 - x0
    truth = 2 * (pred.float() - target) / pred.numel()
    lost = truth.half().float()
    assert relative(lost, truth) > 0.01  # without the scale
    mix = MixFlow(gamma=0, clock=DATA_AT_1, impl=impl)
    it = mix.prepare(x1, x0=x0, t=torch.tensor([0.3, 0.8]))
    pred.requires_grad_()
    for loss in (mix.loss(pred, it) * scale, mix.loss(pred, it, weight=scale)):
        (gradient,) = torch.autograd.grad(loss, pred)
        assert relative(gradient.float() / scale, truth) < 1e-3
