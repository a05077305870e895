"""Stochastic samplers on Gaussian data, where every variance is known; their noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.flow.path import PATHS, get_path
from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.samples import sample, sde_noise
from mixflow_fast.sampling.sde import FORMS, Diffusion
from tests.support.networks import Net, relative

VARIANCE = 0.3  # of the data


def _gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity of N(0, 0.3) data on the linear path."""
    t = t.double()[:, None]
    return (t * VARIANCE - (1 - t)) / (t**2 * VARIANCE + (1 - t) ** 2) * x


def _variance(sampler: Sampler) -> float:
    """Exact variance of what comes out: all is linear in the start and in each step's noise.

    Row 0 starts at 1 without noise, row k + 1 starts at 0 and gets the noise of step k alone.
    """
    rows = torch.eye(sampler.steps + 1, dtype=torch.float64)
    out, _ = sampler.run(_gaussian, rows[:, :1], lambda step: rows[:, step + 1, None])
    return float(out.square().sum())


# Specification of this engine's evaluation, section 11: N = 250, t1 = 0.96, over the true variance.
EXACT = {
    "sigma": (0.9244, 0.9806, 0.9916),
    "linear": (0.9244, 0.9806, 0.9916),
    "decreasing": (0.9223, 0.9893, 0.9893),
    "increasing-decreasing": (0.9271, 0.9901, 0.9945),
    "constant": (0.9306, 0.7402, 0.9982),
    "sbdm": (0.9275, 0.9834, 0.9948),
}


@pytest.mark.parametrize("form", FORMS)
def test_variance_of_euler_maruyama(form: str) -> None:
    stopped = Sampler("sde_euler", 249, form=form, last="none", end=0.96)
    found = [stopped] + [Sampler("sde_euler", 250, form=form, last=k) for k in ("mean", "euler")]
    ratios = [_variance(sampler) / VARIANCE for sampler in found]
    assert ratios == pytest.approx(EXACT[form], abs=1.5e-4)


WEIGHTS = {
    "sigma": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "sbdm": lambda t: (1 - t) / t,
    "decreasing": lambda t: (math.cos(math.pi * t) + 1) ** 2 / 4,
    "increasing-decreasing": lambda t: math.sin(math.pi * t) ** 2,
}


@pytest.mark.parametrize("form", FORMS)
def test_variance_of_heun(form: str) -> None:
    """The recursion x' = (x + c noise) (1 + h/2 (a + a' (1 + h a))) for the drift a(t) x."""

    def slope(t: float) -> float:
        spread = t * t * VARIANCE + (1 - t) ** 2
        return (t * VARIANCE - (1 - t) - WEIGHTS[form](t)) / spread

    truth = 0.81 * VARIANCE + 0.01
    errors = []
    for steps in (50, 100):
        sampler = Sampler("sde_heun", steps, form=form, last="none", end=0.9)
        grid, variance = sampler.grid().tolist(), 1.0
        for t, t_next in zip(grid, grid[1:], strict=False):
            h = t_next - t
            gain = 1 + h / 2 * (slope(t) + slope(t_next) * (1 + h * slope(t)))
            variance = gain**2 * (variance + 2 * WEIGHTS[form](t) * h)
        # The velocity is told the float32 of a time, which the grid is: only sums are rounded.
        assert _variance(sampler) == pytest.approx(variance, rel=1e-9)
        errors.append(abs(variance / truth - 1))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_score_of_a_gaussian(path: str, t: float) -> None:
    """-x / Var(x_t), from the exact velocity on every path."""
    diffusion = Diffusion(get_path(path))
    c = diffusion.path.coefficients(torch.tensor(t, dtype=torch.float64))
    variance = c.alpha**2 * VARIANCE + c.sigma**2
    x = torch.tensor([[0.7], [-1.3]], dtype=torch.float64)
    v = (c.alpha * c.d_alpha * VARIANCE + c.sigma * c.d_sigma) / variance * x
    assert relative(diffusion.score(v, x, t), -x / variance) < 1e-12
    # Where the score is right, w = g keeps the marginals: drift of the reversed forward process.
    g = float(c.sigma**2 * c.d_log_alpha - c.sigma * c.d_sigma)
    weight = Diffusion(get_path(path), "sbdm", 0.5).weight(t)
    assert weight == pytest.approx(0.5 * g, rel=1e-12)


def test_last_steps_on_the_linear_path() -> None:
    """Euler and Tweedie are the same there; on another path they are not."""

    def out(path: str, last: str) -> Tensor:
        sampler = Sampler("sde_euler", 5, last=last, path=path)
        zero = torch.zeros(1, 2, dtype=torch.float64)
        x = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
        return sampler.run(lambda x, t: torch.tanh(x), x, lambda step: zero)[0]

    assert relative(out("linear", "euler"), out("linear", "tweedie")) < 1e-12
    assert relative(out("gvp", "euler"), out("gvp", "tweedie")) > 1e-4


def test_paths_have_the_exact_variance() -> None:
    """20,000 paths from the sampler's own noise, within 4 standard errors."""
    sampler, ids = Sampler("sde_euler", 60, form="constant", last="euler"), torch.arange(20_000)
    start = normal(1, Stream.SAMPLE_NOISE, ids, 1).double()
    out, _ = sampler.run(_gaussian, start, lambda step: sde_noise(1, ids, step, (1,)))
    error = math.sqrt(2 / len(ids))
    assert abs(float(out.var()) / _variance(sampler) - 1) < 4 * error
    assert abs(float(out.mean())) < 4 * float(out.std()) / math.sqrt(len(ids))


def test_noise_is_a_function_of_seed_id_and_step() -> None:
    ids = torch.arange(3000)
    draws = torch.stack([sde_noise(5, ids, step, (4, 2)) for step in range(3)]).flatten(2)
    assert torch.equal(draws[1, 70:73], sde_noise(5, ids[70:73], 1, (4, 2)).flatten(1))
    n = draws[0].numel()
    assert abs(float(draws.mean())) < 4 / math.sqrt(3 * n)
    assert abs(float(draws.var()) - 1) < 4 * math.sqrt(2 / (3 * n))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert abs(float((draws[a] * draws[b]).mean())) < 4 / math.sqrt(n)
    assert relative(sde_noise(6, ids, 0, (8,)), draws[0]) > 1


def test_stochastic_samples_are_functions_of_seed_and_id() -> None:
    net, sampler = Net(), Sampler("sde_euler", 4)
    full = sample(net, num=7, sampler=sampler, batch_size=4)
    assert full.nfe == 4
    some = sample(net, ids=torch.tensor([5, 2]), labels=full.labels[[5, 2]], sampler=sampler)
    assert relative(some.x, full.x[[5, 2]]) < 1e-5
    assert relative(sample(net, num=7, sampler=sampler, seed=1, batch_size=4).x, full.x) > 0.1
    # The noise arrives: without it the same grid and start give something else.
    quiet = sample(net, num=7, sampler=Sampler("sde_euler", 4, norm=0.0), batch_size=4)
    assert relative(quiet.x, full.x) > 0.1
