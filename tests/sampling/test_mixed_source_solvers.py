"""Solvers against the official implementation of mixed sources (arXiv 2604.09181)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixflow_fast.sampling.grids import time_grid
from mixflow_fast.sampling.sampler import ALL_METHODS, Sampler
from mixflow_fast.sampling.solvers import SOLVERS, Counted, Tolerances, integrate, states
from tests.support.golden import load
from tests.support.networks import relative

DOCS = Path(__file__).parents[2] / "docs"
FIXED = {
    "mixed_ode_euler_5": "euler",
    "mixed_ode_heun2_4": "heun",
    "mixed_ode_manual_heun_3": "heun_last_euler",
    "mixed_ode_manual_heun_5": "heun_last_euler",
    "mixed_ode_midpoint_4": "midpoint",
}
ADAPTIVE = {
    "mixed_ode_rk45_scipy_10": "rk45",
    "mixed_ode_rk45_scipy_6_wavy": "rk45",
    "mixed_ode_rk45_dopri5_10": "dopri5",
    "mixed_ode_rk45_dopri5_6_wavy": "dopri5",
}


class Recorded:
    """The golden files' velocity, and the times that it was asked at."""

    def __init__(self, wavy: bool) -> None:
        self.wavy, self.times = wavy, []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.times.append(float(t[0]))
        drift = 0.3 * t.to(x)[:, None, None, None]
        return (2 * torch.sin(9 * x) if self.wavy else torch.tanh(0.7 * x)) + drift


def close(times: list[float], theirs: Tensor, tolerance: float = 2e-7) -> bool:
    return len(times) == len(theirs) and float((torch.tensor(times) - theirs).abs().max()) < (
        tolerance
    )


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("suffix", ["", ".f64"])
def test_official_fixed_grids(name: str, suffix: str) -> None:
    """Every state, how often and at which times the velocity is asked."""
    tensors, config = load(name)
    steps, velocity = config["num_inference_timesteps"], Recorded(False)
    x = tensors["x0"].to(torch.float64 if suffix else torch.float32)
    counted = Counted(velocity)
    path = [x, *states(counted, x, time_grid(steps), FIXED[name])]
    # Their grid is float64 where their states are, and ours is float32.
    assert relative(torch.stack(path), tensors[f"trajectory{suffix}"]) < 2e-7
    assert torch.equal(path[-1], integrate(velocity, x, time_grid(steps), FIXED[name])[0])
    assert counted.calls == int(tensors["nfe"]) == Sampler(FIXED[name], steps).nfe
    assert close(velocity.times[: counted.calls], tensors["t_calls"])


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("suffix", ["", ".f64"])
def test_official_adaptive_solvers(name: str, suffix: str) -> None:
    """The end, and the same evaluations at the same times; N does not matter."""
    pytest.importorskip("scipy" if ADAPTIVE[name] == "rk45" else "torchdiffeq")
    tensors, config = load(name)
    velocity = Recorded("wavy" in name)
    x = tensors["x0"].to(torch.float64 if suffix else torch.float32)
    sampler = Sampler(ADAPTIVE[name], 3, rtol=config["rtol"], atol=config["atol"])
    out, nfe = sampler.run(velocity, x)
    assert nfe == int(tensors["nfe"]) and out.dtype == x.dtype and sampler.nfe is None
    assert relative(out, tensors[f"out{suffix}"]) < 1e-5
    # Step sizes follow from errors of steps, in which rounding shows.
    assert close(velocity.times, tensors["t_calls"], 1e-3)
    assert integrate(velocity, x, time_grid(50), ADAPTIVE[name], sampler.tolerances)[1] == nfe


def test_scipy_itself() -> None:
    """solve_ivp with the same tolerances: the same numbers, and the same count."""
    solve_ivp = pytest.importorskip("scipy.integrate").solve_ivp
    x = torch.linspace(-2, 2, 12, dtype=torch.float64).view(2, 6)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(7 * x) + t.double()[:, None]

    for rtol, atol in ((1e-5, 1e-5), (1e-3, 1e-6), (1e-8, 1e-9)):
        found = solve_ivp(
            lambda t, y: velocity(
                torch.from_numpy(y).view(2, 6), torch.full((2,), t, dtype=torch.float32)
            ).numpy().ravel(),
            (0.0, 1.0),
            x.numpy().ravel(),
            method="RK45",
            rtol=rtol,
            atol=atol,
        )  # fmt: skip
        out, nfe = integrate(velocity, x, time_grid(4), "rk45", Tolerances(rtol, atol))
        assert nfe == found.nfev
        assert torch.equal(out, torch.from_numpy(found.y[:, -1]).view(2, 6))


def test_smaller_tolerances_take_more_evaluations() -> None:
    pytest.importorskip("scipy")
    tensors, _ = load("mixed_ode_rk45_scipy_6_wavy")
    counts, errors = [], []
    for tolerance in (1e-3, 1e-5, 1e-7):
        sampler = Sampler("rk45", rtol=tolerance, atol=tolerance)
        out, nfe = sampler.run(Recorded(True), tensors["x0"].double())
        counts.append(nfe)
        errors.append(relative(out, tensors["out.f64"]))
    assert counts[0] < counts[1] == 92 < counts[2]
    assert errors[1] < 1e-6 < errors[0]


def test_an_adaptive_solver_keeps_one_state() -> None:
    """The official one returns N + 1 of them, to use the last."""
    pytest.importorskip("scipy")
    x = torch.ones(2, 1, 2, 2)
    for method in ("rk45", "dopri5"):
        found = list(Sampler(method, 1001).trajectory(Recorded(False), x))
        assert len(found) == 1 and found[0].shape == x.shape


@pytest.mark.parametrize(
    "name", ["manual_heun", "heun2", "RK45", "scipy", "rk23", "euler ", "midpoint2", "", "Heun"]
)
def test_a_name_that_is_unknown_is_refused(name: str) -> None:
    """The official code runs midpoint, or fails later, depending on what is installed."""
    asked = Recorded(False)
    for refused in (
        lambda: integrate(asked, torch.ones(1, 1, 2, 2), time_grid(2), name),
        lambda: Sampler(name),
    ):
        with pytest.raises(ValueError, match="method must be one of euler, heun, heun_last_euler"):
            refused()
    assert asked.times == []


def test_a_method_never_stands_for_another_where_its_package_is_missing(monkeypatch) -> None:
    for method, package in (("rk45", "scipy.integrate"), ("dopri5", "torchdiffeq")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        asked = Recorded(False)
        with pytest.raises(ValueError, match=f"method '{method}' needs {package.split('.')[0]}"):
            integrate(asked, torch.ones(1, 1, 2, 2), time_grid(2), method)
        assert asked.times == []


def test_rk45_says_where_it_cannot_go_on() -> None:
    pytest.importorskip("scipy")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return x / (0.5 - t)[:, None].clamp_min(0)

    with pytest.raises(ValueError, match="rk45 cannot keep its tolerances at t = 0"):
        integrate(velocity, torch.ones(1, 2), time_grid(2), "rk45")


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "unipc"])
def test_tolerances_of_a_fixed_grid_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match=f"{method} has a fixed grid and takes no tolerances"):
        integrate(
            Recorded(False), torch.ones(1, 1, 2, 2), time_grid(2), method, Tolerances(1e-5, 1e-5)
        )


def test_evaluations_are_counted_as_the_documentation_says() -> None:
    """The official README calls 5 and 9 steps of Heun 5 and 9 evaluations; they are 9 and 17."""
    counts = {"euler": (3, 5, 9), "heun_last_euler": (5, 9, 17), "heun": (6, 10, 18)}
    for method, expected in {**counts, "midpoint": (6, 10, 18)}.items():
        found = tuple(Sampler(method, steps).run(Recorded(False), torch.ones(1, 1, 2, 2))[1]
                      for steps in (3, 5, 9))  # fmt: skip
        assert found == expected == tuple(Sampler(method, steps).nfe for steps in (3, 5, 9))
    text = (DOCS / "sampling.md").read_text(encoding="utf-8")
    said = re.findall(r"`--method (\w+) --steps (\d+)` is (\d+) network calls", text)
    assert len(said) >= 2
    for method, steps, calls in said:
        assert method in SOLVERS and method in ALL_METHODS
        assert Sampler(method, int(steps)).nfe == int(calls), (method, steps)
