"""Samplers against the official ones: SiT, REPA, RAE, LightningDiT, with their noise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mixflow_fast.sampling.guidance import Guidance, guided_velocity
from mixflow_fast.sampling.sampler import ALL_METHODS, Sampler
from mixflow_fast.sampling.sde import FORMS, LAST_STEPS
from tests.support.golden import load
from tests.support.networks import Toy, relative

LAST = {"mean": "Mean", "euler": "Euler", "tweedie": "Tweedie", "none": "None"}


def _recorded(noise: Tensor) -> Callable[[int], Tensor]:
    return lambda step: noise[step]


@pytest.mark.parametrize("last", LAST_STEPS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_sit_sde(method: str, form: str, last: str) -> None:
    tensors, config = load(f"sit_sde_{method}_10")
    key = f"{'SBDM' if form == 'sbdm' else form}.{LAST[last]}"
    ends = config["runs"][key]
    # Theirs counts points: without a last step there are num_steps - 1 intervals.
    sampler = Sampler(f"sde_{method}", 9 if last == "none" else 10, form=form, last=last)
    if last == "none":
        sampler = dataclasses.replace(sampler, end=ends["t1"])
    grid = sampler.grid()
    assert grid[0] == pytest.approx(ends["t0"], abs=1e-7)
    assert grid[9] == pytest.approx(ends["t1"], abs=1e-6)
    net = Toy("data_at_1")
    velocity = guided_velocity(net, tensors["y"], Guidance())
    trajectory = sampler.trajectory(velocity, tensors["z"], _recorded(tensors["noise"]))
    states = list(trajectory)
    assert len(net.rows) == trajectory.evaluations == sampler.nfe == sampler.network_calls
    assert len(states) == sampler.steps and states[-1].dtype == torch.float32
    # What float32 costs the official code by itself, from the files' README.
    tolerance = 2e-5
    if method == "heun":
        tolerance = 5e-4 if key in ("constant.None", "decreasing.None") else tolerance
        tolerance = 1e-4 if form == "sbdm" else tolerance
    assert relative(states[-1], tensors[f"out.{key}"]) < tolerance
    if f"traj.{key}" in tensors:
        assert relative(torch.stack(states), tensors[f"traj.{key}"]) < 2e-5


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_sit_sde_with_guidance(method: str) -> None:
    tensors, _ = load(f"sit_sde_{method}_10")
    velocity = guided_velocity(Toy("data_at_1", channels=3), tensors["y"], Guidance(1.5))
    noise = _recorded(tensors["noise_cfg"])
    out, nfe = Sampler(f"sde_{method}", 10).run(velocity, tensors["z"], noise)
    assert relative(out, tensors["out_cfg.sigma.Mean"]) < 2e-5
    assert nfe == (10 if method == "euler" else 19)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_sit_ode_with_guidance(method: str) -> None:
    tensors, _ = load(f"sit_ode_cfg_{'heun2' if method == 'heun' else 'euler'}_10")
    net = Toy("data_at_1", channels=3)
    sampler = Sampler(method, 9)
    velocity = guided_velocity(net, tensors["y"], Guidance(1.5))
    states = list(sampler.trajectory(velocity, tensors["z"]))
    torch.testing.assert_close(sampler.grid(), tensors["grid"], rtol=0, atol=1e-7)
    assert relative(torch.stack([tensors["z"], *states]), tensors["traj"]) < 1e-6
    assert relative(states[-1], tensors["out"]) < 1e-6
    assert net.rows == [6] * sampler.nfe  # one forward of both halves


@pytest.mark.parametrize("setting", ["plain", "cfg", "interval"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_repa_ode(method: str, setting: str) -> None:
    """Their corrector asks the interval at the time when the step began."""
    tensors, config = load("repa_ode_6")
    sampler = Sampler("heun_last_euler" if method == "heun" else "euler", 6)
    z, y = tensors["z"].double(), tensors["y"]
    expected = tensors[f"out.{method}.{setting}"]

    def error(by_step: bool) -> float:
        guidance = _repa_guidance(config["settings"][setting], by_step)
        out, nfe = sampler.run(guided_velocity(Toy("noise_at_1"), y, guidance), z)
        assert out.dtype == torch.float64 and nfe == (11 if method == "heun" else 6)
        return relative(out, expected)

    torch.testing.assert_close(1 - sampler.grid().double(), tensors["grid"], rtol=0, atol=1e-7)
    assert error(by_step=True) < 1e-6
    if method == "heun" and setting == "interval":
        assert error(by_step=False) > 1e-3


@pytest.mark.parametrize("setting", ["plain", "cfg", "interval"])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_official_repa_sde(path: str, setting: str) -> None:
    tensors, config = load("repa_sde_6")
    name = "gvp" if path == "cosine" else path
    sampler = Sampler("sde_euler", 6, form="linear", path=name)
    guidance = _repa_guidance(config["settings"][setting], by_step=False)
    velocity = guided_velocity(Toy("noise_at_1"), tensors["y"], guidance)
    out, nfe = sampler.run(velocity, tensors["z"].double(), _recorded(tensors["noise"]))
    torch.testing.assert_close(1 - sampler.grid().double(), tensors["grid"], rtol=0, atol=1e-7)
    assert relative(out, tensors[f"out.{path}.{setting}"]) < 1e-6 and nfe == 6


def _repa_guidance(setting: dict[str, float], by_step: bool) -> Guidance:
    interval = 1 - setting["guidance_high"], 1 - setting["guidance_low"]
    return Guidance(setting["cfg_scale"], None, interval, by_step=by_step)


class _Guide:
    """g(x, t) = tanh(0.4 x) + 0.1 t, in RAE's clock."""

    clock = "noise_at_1"

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(0.4 * x) + 0.1 * t[:, None, None, None]


@pytest.mark.parametrize(
    "run", ["none", "cfg", "cfg_interval", "autoguidance", "autoguidance_interval"]
)
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_rae_ode(method: str, run: str) -> None:
    tensors, config = load("rae_ode_8")
    settings = config["runs"][run]
    auto = run.startswith("autoguidance")
    low, high = settings.get("interval", (0.0, 1.0))
    guidance = Guidance(
        settings.get("scale" if auto else "cfg_scale", 1.0),
        interval=(1 - high, 1 - low),
        kind="autoguidance" if auto else "cfg",
    )
    net = Toy("noise_at_1")
    velocity = guided_velocity(net, tensors["y"], guidance, _Guide() if auto else None)
    sampler = Sampler(method, 7, shift=config["shift"], end=0.999)
    states = list(sampler.trajectory(velocity, tensors["z"]))
    torch.testing.assert_close(1 - sampler.grid(), tensors["grid"], rtol=0, atol=2e-7)
    key = f"{'heun2' if method == 'heun' else method}.{run}"
    assert relative(states[-1], tensors[f"out.{key}"]) < 2e-6
    if f"traj.{key}" in tensors:
        assert relative(torch.stack([tensors["z"], *states]), tensors[f"traj.{key}"]) < 2e-6
    if run == "cfg_interval":
        assert 3 in net.rows and 6 in net.rows  # outside the interval half of the rows
    if auto:
        assert set(net.rows) == {3}  # never the null class


@pytest.mark.parametrize("run", ["none", "cfg", "cfg_interval"])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_official_lightningdit_ode(method: str, run: str) -> None:
    tensors, config = load("lightningdit_ode_10")
    start = config["cfg_interval_start"] if run == "cfg_interval" else 0.0
    scale = 1.0 if run == "none" else config["cfg_scale"]
    guidance = Guidance(scale, 3, (start, 1.0))
    velocity = guided_velocity(Toy("data_at_1"), tensors["y"], guidance)
    sampler = Sampler(method, 9, shift=1 / config["timestep_shift"])
    states = list(sampler.trajectory(velocity, tensors["z"]))
    torch.testing.assert_close(sampler.grid(), tensors["grid"], rtol=0, atol=2e-7)
    key = f"{'heun2' if method == 'heun' else method}.{run}"
    assert relative(states[-1], tensors[f"out.{key}"]) < 1e-6
    if f"traj.{key}" in tensors:
        assert relative(torch.stack([tensors["z"], *states]), tensors[f"traj.{key}"]) < 1e-6


@pytest.mark.parametrize("method", ALL_METHODS)
def test_a_sampler_counts_its_network_calls(method: str) -> None:
    sampler = Sampler(method, 5)
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return torch.tanh(x)

    needs = {"dopri5": "torchdiffeq", "rk45": "scipy", "unipc": "diffusers"}
    if method in needs:
        pytest.importorskip(needs[method])
    _, nfe = sampler.run(velocity, torch.ones(2, 3), lambda step: torch.zeros(2, 3))
    assert nfe == len(calls) and sampler.nfe == (None if sampler.tolerances else nfe)
    assert method in sampler.describe()
    assert json.loads(json.dumps(sampler.to_record())) == sampler.to_record()


def test_a_description_names_the_times_and_says_which_method_has_its_own() -> None:
    assert "1 intervals, 1 network calls; grid 0, 1 (" in Sampler("euler", 1).describe()
    assert "grid 0, 0.5, 1 (" in Sampler("euler", 2).describe()
    assert "grid 0, 0.25 .. 0.75, 1 (" in Sampler("euler", 4).describe()
    assert "4 intervals" not in Sampler("dopri5", 4).describe()
    assert "rtol 0.0001, atol 1e-05" in Sampler("rk45", rtol=1e-4).describe()


def test_records_name_tolerances_but_those_that_dopri5_always_had() -> None:
    records = [Sampler("rk45").to_record(), Sampler("rk45", rtol=1e-4, atol=1e-6).to_record()]
    assert records[0]["tolerances"] == {"rtol": 1e-5, "atol": 1e-5}
    assert records[1]["tolerances"] == {"rtol": 1e-4, "atol": 1e-6}
    assert "tolerances" not in Sampler("dopri5", rtol=1e-3, atol=1e-6).to_record()
    assert Sampler("dopri5", atol=1e-5).to_record()["tolerances"] == {"rtol": 1e-3, "atol": 1e-5}
    assert all("tolerances" not in Sampler(name).to_record() for name in ("euler", "sde_euler"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "heun", "rtol": 1e-5}, "rtol and atol have no meaning for heun"),
        ({"method": "sde_euler", "atol": 1e-5}, "rtol and atol have no meaning for sde_euler"),
        ({"method": "rk45", "rtol": 0.0}, "rtol must be a number > 0"),
        ({"method": "rk45", "atol": float("nan")}, "atol must be a number > 0"),
    ],
)
def test_tolerances_that_are_none(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**arguments)


def test_records_tell_samplers_apart() -> None:
    changes = [{}, {"steps": 9}, {"shift": 2.0}, {"end": 0.99}, {"start": 0.01}, {"form": "linear"}]
    changes += [{"norm": 0.5}, {"last": "euler"}, {"last_size": 0.05}, {"path": "gvp"}]
    changes += [{"integer_times": True}, {"method": "sde_heun"}]
    records = [
        json.dumps(Sampler(**({"method": "sde_euler", "steps": 10} | change)).to_record())
        for change in changes
    ]
    assert len(set(records)) == len(changes)
    # What is meant by default is the same as what is written out.
    plain = Sampler("sde_euler", 10).to_record()
    assert plain == Sampler("sde_euler", 10, start=0.0, end=1.0, last_size=0.04).to_record()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "heun2"}, "method must be one of"),
        ({"form": "linear"}, "no meaning for euler"),
        ({"method": "dpmpp2m", "path": "gvp"}, "needs path='linear'"),
        ({"method": "sde_euler", "form": "increasing"}, "form must be one of sigma"),
        ({"method": "sde_euler", "last": "last"}, "last must be one of mean"),
        ({"method": "sde_euler", "norm": -1.0}, "norm must be"),
        ({"method": "sde_euler", "form": "sbdm", "start": 0.0}, "infinite at t = 0"),
        ({"method": "sde_heun", "last": "none", "end": 1.0}, "singular"),
        ({"method": "sde_euler", "steps": 1}, "at least 2 steps"),
        ({"path": "cosine"}, "path must be one of"),
    ],
)
def test_bad_fields(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**fields)


def test_stochastic_methods_need_noise() -> None:
    with pytest.raises(ValueError, match="needs noise"):
        Sampler("sde_euler", 4).run(lambda x, t: x, torch.ones(1, 2))
