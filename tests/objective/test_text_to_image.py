"""The objective beside other trainers' formulas for SD3: SimpleTuner's MixFlow, diffusers' script.

Their formulas are written here from what they compute, with the same draws on both sides.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mixflow_fast import MixFlow
from mixflow_fast.flow import NOISE_AT_1
from mixflow_fast.flow.timesteps import shift_time
from mixflow_fast.models.text_to_image import SD3Adapter
from tests.support.drop_in_trainers import trained_gradients
from tests.support.text_to_image import numbers, sd3, text


def spread(v: Tensor) -> Tensor:
    return v.view(-1, 1, 1, 1)


def test_simple_tuner_s_formulas() -> None:
    """Labels, slowed times and inputs to the bit; the loss to 1e-7; all gradients to 1e-6.

    SimpleTuner: sigma = 1 - sqrt(U), then the schedule's shift, then sigma + U' gamma (1 - sigma).
    """
    network = sd3()
    adapter, cond = SD3Adapter(network), text(4)
    latents, noise = numbers(4, 16, 8, 8), numbers(4, 16, 8, 8, seed=1)
    u, v = torch.tensor([0.03, 0.4, 0.71, 0.98]), torch.tensor([0.9, 0.2, 0.55, 0.01])

    s = 1 - u.sqrt()
    s = 3 * s / (1 + 2 * s)
    m = s + v * 0.8 * (1 - s)
    x = (1 - spread(m)) * latents + spread(m) * noise
    out = network(
        hidden_states=x,
        timestep=1000 * s,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    theirs = F.mse_loss(out, noise - latents)
    theirs.backward()
    gradients = trained_gradients(network)

    mix = MixFlow(gamma=0.8, clock=NOISE_AT_1, shift=3.0)
    assert torch.equal(mix.schedule.time(u), s)
    assert torch.equal(mix.schedule.slowed(s, None, v), m)
    it = mix.prepare(latents, x0=noise, t=s, slowed_t=m)
    assert torch.equal(it.x, x)
    network.zero_grad(set_to_none=True)
    ours = mix.loss(adapter.velocity(it.x, it.t, cond), it)
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, gradient in trained_gradients(network).items():
        assert (gradient - gradients[name]).norm() <= 1e-6 * whole, name


def density(scheme: str, u: Tensor) -> Tensor:
    """Quantiles of the script's u: logit-normal(0, 1), "mode" with scale 1.29, else uniform."""
    if scheme == "logit_normal":
        return torch.sigmoid(torch.special.ndtri(u))
    if scheme == "mode":
        return 1 - u - 1.29 * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def weighting(scheme: str, sigma: Tensor) -> Tensor:
    """The script's weight of the squared error."""
    if scheme == "sigma_sqrt":
        return sigma**-2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return torch.ones_like(sigma)


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("scheme", ["sigma_sqrt", "logit_normal", "mode", "cosmap"])
def test_the_script_s_loss(scheme: str, preconditioned: bool) -> None:
    """All of its weightings, of the velocity or of the data; loss and gradients to 1e-6."""
    network = sd3()
    adapter, cond = SD3Adapter(network), text(4)
    latents, noise = numbers(4, 16, 8, 8), numbers(4, 16, 8, 8, seed=1)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    index = (density(scheme, torch.tensor([0.03, 0.4, 0.71, 0.98])) * 1000).long()
    sigma, timestep = scheduler.sigmas[index], scheduler.timesteps[index]

    x = (1 - spread(sigma)) * latents + spread(sigma) * noise
    pred = network(
        hidden_states=x,
        timestep=timestep,
        encoder_hidden_states=cond["prompt_embeds"],
        pooled_projections=cond["pooled_prompt_embeds"],
        return_dict=False,
    )[0]
    if preconditioned:
        pred, target = x - spread(sigma) * pred, latents
    else:
        target = noise - latents
    theirs = (spread(weighting(scheme, sigma)) * (pred - target) ** 2).flatten(1).mean(1).mean()
    theirs.backward()
    gradients = trained_gradients(network)

    prediction = "data" if preconditioned else "velocity"
    mix = MixFlow(gamma=0.0, clock=NOISE_AT_1, prediction=prediction)
    it = mix.prepare(latents, x0=noise, t=sigma)
    assert torch.equal(it.x, x)
    network.zero_grad(set_to_none=True)
    ours = adapter.velocity(it.x, it.t, cond)
    if preconditioned:
        ours = it.x - spread(it.slowed_t) * ours
    ours = mix.loss(ours, it, weight=weighting(scheme, it.t))
    ours.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, gradient in trained_gradients(network).items():
        assert (gradient - gradients[name]).norm() <= 1e-6 * whole, name


def test_only_sigma_sqrt_makes_the_data_loss_the_velocity_loss() -> None:
    """sigma_sqrt and preconditioning undo each other; preconditioning alone is sigma^2 of it."""
    network = sd3()
    adapter, cond = SD3Adapter(network), text(4)
    latents, noise = numbers(4, 16, 8, 8), numbers(4, 16, 8, 8, seed=1)
    sigma = torch.tensor([0.02, 0.3, 0.7, 1.0])
    losses = {}
    for prediction in ("velocity", "data"):
        mix = MixFlow(gamma=0.0, clock=NOISE_AT_1, prediction=prediction)
        it = mix.prepare(latents, x0=noise, t=sigma)
        with torch.no_grad():
            pred = adapter.velocity(it.x, it.t, cond)
        if prediction == "data":
            pred = it.x - spread(sigma) * pred
        losses[prediction] = mix.loss(pred, it, reduction="none")
    torch.testing.assert_close(losses["data"], sigma**2 * losses["velocity"], rtol=3e-5, atol=0)
    restored = losses["data"] * weighting("sigma_sqrt", sigma)
    torch.testing.assert_close(restored.mean(), losses["velocity"].mean(), rtol=1e-5, atol=0)
    assert losses["data"].mean() < 0.8 * losses["velocity"].mean()


def test_the_mean_label_and_the_mean_input_of_sd3() -> None:
    """With shift 3 and gamma 0.8 labels move towards data while inputs stay as noisy as before.

    E s with s = 3 r / (1 + 2 r), r = 1 - sqrt(u), is the integral of 2 (1 - r) s over r in [0, 1]:
    9/4 - (3/2) ln 3 ... computed here by a fine sum, and m = s + 0.4 (1 - s) on average.
    """
    r = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    label = (2 * (1 - r) * 3 * r / (1 + 2 * r)).mean()
    mix = MixFlow(gamma=0.8, clock=NOISE_AT_1, shift=3.0)
    it = mix.prepare(torch.zeros(40_000, 1), ids=torch.arange(40_000))
    assert abs(it.t.double().mean() - label) < 0.005 and abs(label - 0.528) < 0.001
    assert abs(it.slowed_t.double().mean() - (label + 0.4 * (1 - label))) < 0.005
    assert abs(it.slowed_t.double().mean() - 0.717) < 0.005


def test_the_shift_and_the_input_at_every_level_of_the_scheduler() -> None:
    """All 1000 noise levels: the shifted time to float32's rounding, `scale_noise` to the bit."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    raw = torch.linspace(1000, 1, 1000) / 1000
    sigmas = scheduler.sigmas[:1000]
    assert len(sigmas) == 1000 and torch.equal(scheduler.timesteps, 1000 * sigmas)
    assert (shift_time(raw, 3.0, NOISE_AT_1) - sigmas).abs().max() <= 1.2e-7
    latents, noise = numbers(1000, 16, 2, 2), numbers(1000, 16, 2, 2, seed=1)
    it = MixFlow(gamma=0.0, clock=NOISE_AT_1).prepare(latents, x0=noise, t=sigmas)
    assert torch.equal(it.x, scheduler.scale_noise(latents, scheduler.timesteps, noise))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_gamma_0_and_uniform_is_the_script_s_plain_loss(shift: float) -> None:
    """Without weights and preconditioning, u uniform: at the levels that MixFlow draws itself."""
    network, cond, ids = sd3(), text(4), torch.arange(4)
    adapter, latents = SD3Adapter(network), numbers(4, 16, 8, 8)
    mix = MixFlow(gamma=0.0, clock=NOISE_AT_1, timesteps="uniform", shift=shift, seed=5)
    it = mix.prepare(latents, ids=ids)
    ours = mix.loss(adapter.velocity(it.x, it.t, cond), it)
    assert torch.equal(it.slowed_t, it.t)
    sigma, noise = spread(it.t), it.x0()
    x = (1 - sigma) * latents + sigma * noise
    assert torch.equal(it.x, x)
    out = network(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], 1000 * it.t).sample
    theirs = ((out - (noise - latents)) ** 2).flatten(1).mean(1).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    levels = mix.prepare(torch.zeros(20_000, 1), ids=torch.arange(20_000)).t.double()
    u = levels / (shift - (shift - 1) * levels)
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.003


def test_what_bf16_does_to_simple_tuner_s_labels_and_loss() -> None:
    """Its bf16 path casts the slowed level and 1000 s to bf16; the numbers stand in the docs."""
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    s = 1 - u.sqrt()
    s = (3 * s / (1 + 2 * s)).float()
    error = (1000 * s - (1000 * s).bfloat16().float()).abs()
    assert abs(error.mean() - 0.71) < 0.01 and 1.9 < error.max() <= 2
    network, cond = sd3(), text(4)
    latents, noise = numbers(4, 16, 8, 8), numbers(4, 16, 8, 8, seed=1)
    u, v = torch.tensor([0.03, 0.4, 0.71, 0.98]), torch.tensor([0.9, 0.2, 0.55, 0.01])
    s = 1 - u.sqrt()
    s = 3 * s / (1 + 2 * s)
    m = s + v * 0.8 * (1 - s)
    losses = []
    for level, label in ((m, 1000 * s), (m.bfloat16().float(), (1000 * s).bfloat16().float())):
        x = (1 - spread(level)) * latents + spread(level) * noise
        with torch.no_grad():
            out = network(x, cond["prompt_embeds"], cond["pooled_prompt_embeds"], label).sample
        losses.append(F.mse_loss(out, noise - latents).item())
    assert 5e-5 < abs(losses[1] / losses[0] - 1) < 1e-4
