"""Paths against autograd and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from mixflow_fast.flow import (
    PATHS,
    get_path,
)
from mixflow_fast.flow.path import LOSS_WEIGHTS


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_against_autograd(name: str) -> None:
    path = get_path(name)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    c = path.coefficients(t)
    (d_alpha,) = torch.autograd.grad(c.alpha.sum(), t, retain_graph=True)
    (d_sigma,) = torch.autograd.grad(c.sigma.sum(), t, retain_graph=True)
    (d_log_alpha,) = torch.autograd.grad(c.alpha.log().sum(), t)
    torch.testing.assert_close(c.d_alpha, d_alpha, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.d_sigma, d_sigma, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(c.d_log_alpha, d_log_alpha, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_path_ends(name: str) -> None:
    c = get_path(name).coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64))
    noise_end = {"vp": math.exp(-(20 - 0.1) / 4 - 0.05)}.get(name, 0.0)
    assert c.alpha.tolist() == pytest.approx([noise_end, 1.0], abs=1e-15)
    assert c.sigma.tolist() == pytest.approx([math.sqrt(1 - noise_end**2), 0.0], abs=1e-15)
    if name != "linear":  # variance preserving
        t = torch.linspace(0, 1, 11, dtype=torch.float64)
        c = get_path(name).coefficients(t)
        torch.testing.assert_close(c.alpha**2 + c.sigma**2, torch.ones_like(t))


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("prediction", ["noise", "score", "data"])
def test_to_velocity(name: str, prediction: str) -> None:
    g = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.5, 0.8, 0.95], dtype=torch.float64)
    path = get_path(name)
    sigma = path.coefficients(t).sigma.view(-1, 1, 1, 1)
    exact = {"noise": x0, "data": x1, "score": -x0 / sigma}[prediction]
    v = path.to_velocity(exact, path.interpolate(x1, x0, t), t, prediction)
    torch.testing.assert_close(v, path.velocity(x1, x0, t))


@pytest.mark.parametrize("weight", [w for w in LOSS_WEIGHTS if w])
def test_velocity_weight_turns_noise_error_into_velocity_error(weight: str) -> None:
    """On the linear path a noise error e is a velocity error e / t."""
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    w = get_path("linear").loss_weight(weight, t)
    expected = {"velocity": 1 / t**2, "likelihood": 1 / (t * (1 - t))}[weight]
    torch.testing.assert_close(w, expected)


def test_unknown_path() -> None:
    with pytest.raises(ValueError, match="linear.*got 'cosine'"):
        get_path("cosine")


def test_velocity_of_the_linear_path_has_the_bits_of_its_formula() -> None:
    """Zeros of both signs, infinities and NaN among them."""
    special = torch.tensor([0.0, -0.0, 1.0, -1.5e-40, 3e38, math.inf, -math.inf, math.nan])
    x1, x0 = special.repeat(8).view(2, 32), special.repeat_interleave(8).view(2, 32)
    times, path = torch.tensor([0.25, math.nan]), get_path("linear")
    c = path.coefficients(times)
    expected = c.d_alpha[:, None] * x1 + c.d_sigma[:, None] * x0
    found = path.velocity(x1, x0, times)
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers].view(torch.int32), expected[numbers].view(torch.int32))
