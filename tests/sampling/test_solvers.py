"""Solvers against the official integrators' output and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.sampling.grids import time_grid
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.solvers import METHODS, SOLVERS, integrate
from tests.support.golden import load
from tests.support.networks import relative


@pytest.mark.parametrize(
    ("name", "method", "tolerance"),
    [
        ("ode_euler_10", "euler", 1e-6),
        ("ode_heun2_10", "heun", 1e-6),
        ("ode_dopri5_5", "dopri5", 1e-5),
    ],
)
def test_official_integrators(name: str, method: str, tolerance: float) -> None:
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    tensors, config = load(name)
    steps = config["num_steps"] - 1  # theirs counts grid points
    out, nfe = integrate(
        lambda x, t: torch.tanh(0.7 * x) + 0.3 * t[:, None, None, None],
        tensors["z"],
        time_grid(steps),
        method,
    )
    assert out.dtype == torch.float32
    assert relative(out, tensors["out"]) < tolerance
    if method != "dopri5":
        assert nfe == {"euler": 9, "heun": 18}[method]
    else:
        assert nfe > 6


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(method: str, order: int, shift: float) -> None:
    """dx/dt = x cos(5 t) has x(1) = x(0) exp(sin(5) / 5); the error falls as h^order."""
    x0 = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    truth = x0 * math.exp(math.sin(5.0) / 5.0)
    errors = []
    for steps in (64, 128):
        out, nfe = integrate(
            lambda x, t: x * torch.cos(5.0 * t.double())[:, None],
            x0,
            time_grid(steps, shift),
            method,
        )
        assert out.dtype == torch.float64 and nfe == steps * order
        errors.append(relative(out, truth))
    assert errors[1] > 1e-7  # above the rounding of the float32 times
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_dopri5_closed_form() -> None:
    pytest.importorskip("torchdiffeq")
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t.shape)
        assert t.dtype == torch.float32
        return x * torch.cos(3.0 * t.double())[:, None]

    x0 = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    out, nfe = integrate(velocity, x0, time_grid(1), "dopri5")
    assert nfe == len(calls) and set(calls) == {(2,)}
    # Six evaluations a step, each step within rtol = 1e-3, growing by at most exp(1/3) afterwards.
    bound = nfe / 6 * 1e-3 * math.exp(1 / 3)
    assert relative(out, x0 * math.exp(math.sin(3.0) / 3.0)) < bound < 0.01


@pytest.mark.parametrize(
    ("method", "errors"),
    [
        ("euler", (0.134, 0.0692, 0.0352)),
        ("heun", (2.7e-3, 8.1e-4, 2.2e-4)),
        ("midpoint", (2.0e-4, 2.6e-5, 3.2e-6)),
    ],
)
def test_gaussian_flow(method: str, errors: tuple[float, ...]) -> None:
    """Standard deviation of N(0, 0.3) data from its exact velocity, relative error at 10, 20, 40.

    The expected errors are those of an independent computation of the same flow.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None]
        return (0.3 * t - (1 - t)) / (0.3 * t**2 + (1 - t) ** 2) * x

    x = torch.ones(1, 1, dtype=torch.float64)
    for steps, error in zip((10, 20, 40), errors, strict=True):
        out, _ = integrate(velocity, x, time_grid(steps), method)
        assert abs(float(out) / math.sqrt(0.3) - 1) == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize(
    ("method", "theirs"),
    [("euler", "euler"), ("heun", "heun2"), ("midpoint", "midpoint"), ("rk4", "rk4")],
)
def test_torchdiffeq_step_by_step(method: str, theirs: str) -> None:
    """In float64, on a grid that float32 holds exactly."""
    odeint = pytest.importorskip("torchdiffeq").odeint
    times = torch.tensor([0.0, 0.125, 0.375, 0.5, 1.0], dtype=torch.float64)
    x = torch.tensor([[0.5, 2.0], [-1.0, 0.1]], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x) + t.double().reshape(-1, 1) * x

    path = odeint(lambda t, x: velocity(x, t.float()), x, times, method=theirs)
    for n in range(1, len(times)):
        out, nfe = integrate(velocity, x, times[: n + 1], method)
        assert relative(out, path[n]) < 1e-12
        assert nfe == SOLVERS[method].evaluations(n)


def test_heun_with_a_last_euler_step() -> None:
    """Heun up to the last point, then Euler; diffusers counts 19 calls for 10 steps."""
    times, x = time_grid(10), torch.tensor([[0.5], [-2.0]])

    def field(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x) + t[:, None]

    before, _ = integrate(field, x, times[:-1], "heun")
    expected, _ = integrate(field, before, times[-2:], "euler")
    out, nfe = integrate(field, x, times, "heun_last_euler")
    assert torch.equal(out, expected) and nfe == 19
    one, nfe = integrate(field, x, time_grid(1), "heun_last_euler")
    assert torch.equal(one, integrate(field, x, time_grid(1), "euler")[0]) and nfe == 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("integer_times", [False, True])
def test_dpmpp2m_is_that_of_diffusers(steps: int, shift: float, integer_times: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    z = torch.linspace(-2, 2, 12).view(2, 6)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x) + 0.3 * t[:, None]

    x = z
    for k, time in enumerate(scheduler.timesteps):
        # diffusers cuts the time that it tells the network, and keeps the exact noise level.
        noise = time / 1000 if integer_times else scheduler.sigmas[k]
        # Its velocity points to the noise.
        v = -velocity(x, torch.full((2,), 1 - float(noise)))
        x = scheduler.step(v, time, x).prev_sample
    sampler = Sampler("dpmpp2m", steps, shift=shift, start=1e-3, integer_times=integer_times)
    out, nfe = sampler.run(velocity, z)
    assert relative(out, x) < 1e-6 and nfe == steps
    if integer_times and steps == 20:
        exact, _ = Sampler("dpmpp2m", steps, shift=shift, start=1e-3).run(velocity, z)
        assert relative(exact, x) > 1e-5


def test_dpmpp2m_at_the_ends_of_time() -> None:
    """From t = 0 exactly; its error falls faster than by the half of a first-order method."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t.double()[:, None]
        return (0.3 * t - (1 - t)) / (0.3 * t**2 + (1 - t) ** 2) * x

    x = torch.ones(1, 1, dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        out, _ = integrate(velocity, x, time_grid(steps), "dpmpp2m")
        errors.append(abs(float(out) / math.sqrt(0.3) - 1))
    assert errors[1] < 0.35 * errors[0] and errors[1] < 0.01
    with pytest.raises(ValueError, match="times in"):
        integrate(velocity, x, torch.tensor([-0.5, 1.0]), "dpmpp2m")


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_unipc_is_that_of_diffusers(steps: int) -> None:
    """On the grid that diffusers makes by itself, shift 3."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(steps)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(0.7 * x) + 0.3 * t[:, None]

    x = z = torch.linspace(-2, 2, 12).view(2, 6)
    for k, time in enumerate(scheduler.timesteps):
        noise = float(scheduler.sigmas[k])
        x = scheduler.step(-velocity(x, torch.full((2,), 1 - noise)), time, x).prev_sample
    last = None if steps == 1 else 1 - 0.999 * (steps - 1) / steps
    out, nfe = Sampler("unipc", steps, shift=3.0, last_size=last).run(velocity, z)
    assert relative(out, x) < 1e-5 and nfe == steps
    finer, _ = Sampler("heun", 200).run(velocity, z)
    if steps == 20:
        assert relative(out, finer) < 0.01
        # A grid that stops before the data is nearer to the state there than to the data.
        half, _ = Sampler("unipc", steps, end=0.5).run(velocity, z)
        assert relative(half, Sampler("heun", 200, end=0.5).run(velocity, z)[0]) < 0.01


def test_every_method_has_its_row() -> None:
    assert tuple(SOLVERS) == METHODS
