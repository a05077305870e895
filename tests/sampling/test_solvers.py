"""Solvers against the official integrators' output and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.sampling.solvers import integrate, time_grid
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


def test_time_grid() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    grid = time_grid(4, shift=6.92820323)
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    # RAE's table: k = 6.928 maps 0.5 to 0.87387 in the clock where 1 is noise.
    assert float(grid[2]) == pytest.approx(1 - 0.87387, abs=1e-5)
