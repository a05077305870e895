"""Time distributions against closed forms and official draws."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from mixflow_fast import MixFlow
from mixflow_fast.flow import (
    DATA_AT_1,
    NOISE_AT_1,
    TimeDistribution,
    resolution_shift,
    shift_time,
    slow_time,
)
from tests.support.golden import load

UNIFORM = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000


@pytest.mark.parametrize(
    ("text", "density"),
    [
        ("uniform", lambda t: torch.ones_like(t)),
        ("beta21", lambda t: 2 * t),
        (
            "logit-normal(0.5, 1.2)",
            lambda t: (
                torch.exp(-0.5 * ((torch.logit(t) - 0.5) / 1.2) ** 2)
                / (1.2 * math.sqrt(2 * math.pi) * t * (1 - t))
            ),
        ),
    ],
)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.001, 0.9)])
def test_law_density(text: str, density, low: float, high: float) -> None:
    """Quantiles of equally spaced u fill bins as the (truncated) density says."""
    t = TimeDistribution.parse(text, low=low, high=high).quantile(UNIFORM)
    edges = torch.linspace(low, high, 41, dtype=torch.float64)
    counts = torch.histogram(t, edges)[0] / len(t)
    fine = torch.linspace(low, high, 40 * 400 + 1, dtype=torch.float64)
    middle = (fine[1:] + fine[:-1]) / 2
    mass = density(middle).view(40, 400).sum(1)
    torch.testing.assert_close(counts, mass / mass.sum(), rtol=0, atol=3e-5)


@pytest.mark.parametrize("k", [1.0, math.sqrt(48)])
@pytest.mark.parametrize("clock", [DATA_AT_1, NOISE_AT_1])
def test_shifted_beta21_density(k: float, clock: str) -> None:
    """Density of t after RAE's shift, paper clock: p(t) = 2 k^2 t / (1 + (k-1) t)^3."""
    t = TimeDistribution.parse("beta21").quantile(UNIFORM)
    shifted = shift_time(t if clock == DATA_AT_1 else 1 - t, k, clock)
    shifted = shifted if clock == DATA_AT_1 else 1 - shifted
    edges = torch.linspace(0, 1, 31, dtype=torch.float64)
    counts = torch.histogram(shifted, edges)[0] / len(t)

    def cdf(x: torch.Tensor) -> torch.Tensor:  # integral of the density: P(raw <= k x / (1+(k-1)x))
        return (k * x / (1 + (k - 1) * x)) ** 2

    torch.testing.assert_close(counts, cdf(edges).diff(), rtol=0, atol=2e-5)
    middle = (edges[1:] + edges[:-1]) / 2
    h = 1e-5
    slope = (cdf(middle + h) - cdf(middle - h)) / (2 * h)
    torch.testing.assert_close(slope, 2 * k**2 * middle / (1 + (k - 1) * middle) ** 3)


def test_shift_values_of_the_spec() -> None:
    half = torch.tensor([0.5], dtype=torch.float64)
    assert shift_time(half, math.sqrt(48), NOISE_AT_1).item() == pytest.approx(0.87387, abs=1e-5)
    assert shift_time(half, math.sqrt(192), NOISE_AT_1).item() == pytest.approx(0.93269, abs=1e-5)


def test_slowing_law_and_mirror() -> None:
    t = torch.full((100_000,), 0.6, dtype=torch.float64)
    v = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    m = slow_time(t, v, 0.8, DATA_AT_1)
    assert m.min().item() == pytest.approx(0.2 * 0.6, abs=1e-5)
    assert m.max().item() == pytest.approx(0.6, abs=1e-5)
    assert m.mean().item() == pytest.approx((0.12 + 0.6) / 2, abs=1e-9)
    torch.testing.assert_close(slow_time(1 - t, v, 0.8, NOISE_AT_1), 1 - m, rtol=0, atol=1e-15)
    assert torch.equal(slow_time(t, v, 0.0, DATA_AT_1), t)
    assert torch.equal(slow_time(t, v, 0.0, NOISE_AT_1), t)


def test_rae_mixflow_times() -> None:
    """The published RAE patch, step by step in float64: Beta, shift, slowing in shifted time."""
    golden, config = load("rae_mixflow_times")
    u = config["t0"] + (config["t1"] - config["t0"]) * golden["u"]
    s = shift_time(1 - TimeDistribution.parse("beta21").quantile(u), config["shift"], NOISE_AT_1)
    torch.testing.assert_close(s, golden["t_rae"], rtol=0, atol=1e-14)
    m = slow_time(s, golden["u2"], config["gamma"], NOISE_AT_1)
    torch.testing.assert_close(m, golden["m_rae"], rtol=0, atol=1e-14)


def test_raes_spelling_of_the_logit_normal_distribution() -> None:
    assert TimeDistribution.parse("logit-normal_0_1") == TimeDistribution.parse("logit-normal")
    assert TimeDistribution.parse("logit-normal_-0.5_2") == TimeDistribution.parse(
        "logit-normal(-0.5, 2)"
    )


@pytest.mark.parametrize(
    "text", ["beta", "logit-normal_0", "logit-normal(0)", "logit-normal(0,-1)", "", None]
)
def test_bad_distribution(text: str | None) -> None:
    with pytest.raises(ValueError, match="logit-normal"):
        TimeDistribution.parse(text)


def test_resolution_shift_is_the_pipelines() -> None:
    """mu of diffusers' pipelines, and the levels that its scheduler makes with it."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    raw = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    for tokens in (1, 256, 1024, 4096, 9000):
        for max_shift in (1.15, 1.16):
            mu = calculate_shift(tokens, max_shift=max_shift)
            k = resolution_shift(tokens, max_shift=max_shift)
            assert k == pytest.approx(math.exp(mu), rel=1e-12)
            theirs = scheduler.time_shift(mu, 1.0, raw)
            torch.testing.assert_close(shift_time(raw, k, NOISE_AT_1), theirs, rtol=1e-12, atol=0)
    assert MixFlow(clock=NOISE_AT_1, shift=resolution_shift(4096)).shift == math.exp(1.15)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens must be"),
        ({"tokens": 64.0}, "tokens must be"),
        ({"base_tokens": 4096}, "base_tokens must be below"),
        ({"base_shift": -1.0}, "below 1"),
    ],
)
def test_bad_resolution_shifts(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolution_shift(**({"tokens": 256} | arguments))
