"""Curvature against the official implementation, closed forms and its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.curvature import (
    ADAPTIVE,
    TABLE,
    Curvature,
    network_curvature,
    path_curvature,
    solver_rows,
)
from mixflow_fast.evaluation.uncertainty import difference
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.sampling import (
    Guidance,
    PreparedSampling,
    Sampler,
    sample_source,
    sampling_noise,
    time_grid,
)
from mixflow_fast.sampling.solvers import Counted, states
from tests.support.golden import load
from tests.support.networks import relative


def toy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x) + 0.3 * t.to(x).view(-1, *[1] * (x.dim() - 1))


def naive(velocity, x0: Tensor, steps: int) -> Tensor:
    """As it is written: all states are kept."""
    path = [x0, *states(Counted(velocity), x0, time_grid(steps), "euler")]
    far = (path[-1] - path[0]).flatten(1)
    moves = [
        steps * (after - before).flatten(1)
        for before, after in zip(path[:-1], path[1:], strict=True)
    ]
    return torch.stack([(far - move).square().mean(dim=1) for move in moves]).mean(dim=0)


class Gaussian:
    """The best velocity of x1 ~ N(0, S^2), x0 = a x1 + sigma eps: x V'(t) / 2 V(t)."""

    def __init__(self, s: float, a: float = 0.0, sigma: float = 1.0) -> None:
        self.s, self.a, self.sigma = s, a, sigma

    def variance(self, t: Tensor) -> Tensor:
        return (t + (1 - t) * self.a) ** 2 * self.s**2 + (1 - t) ** 2 * self.sigma**2

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = t.double()
        slope = (1 - self.a) * (t + (1 - t) * self.a) * self.s**2 - (1 - t) * self.sigma**2
        return x * (slope / self.variance(t))[:, None]

    def exact(self) -> float:
        """Of exact trajectories from z_0 ~ N(0, 1), by quadrature of (d/dt sqrt(V/V_0))^2."""
        t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
        ratio = self.variance(t) / self.variance(torch.zeros(1, dtype=torch.float64))
        slope = self(torch.ones(1, 1, dtype=torch.float64), t).flatten()
        end = math.sqrt(float(self.variance(torch.ones(1, dtype=torch.float64)))) / math.sqrt(
            float(self.variance(torch.zeros(1, dtype=torch.float64)))
        )
        return float((slope * ratio.sqrt()).square().mean()) - (end - 1) ** 2


def test_official_curvature() -> None:
    """Each trajectory's, their mean, and the population's standard deviation (not n - 1)."""
    tensors, config = load("mixed_curvature_0")
    steps = config["num_inference_timesteps"]
    for suffix, dtype, tolerance in ((".f64", torch.float64, 1e-12), ("", torch.float32, 1e-6)):
        values, _ = path_curvature(toy, tensors["x0"].to(dtype), steps)
        assert relative(values, tensors[f"curvature{suffix}"]) < tolerance
        found = Curvature(values, steps)
        assert found.mean == pytest.approx(float(tensors[f"mean{suffix}"]), rel=tolerance)
        assert found.std == pytest.approx(float(tensors[f"std{suffix}"]), rel=10 * tolerance)
        other = float(values.std()) / float(tensors[f"std{suffix}"])
        assert other == pytest.approx(math.sqrt(8 / 7), rel=1e-4)


def test_rectified_flow_of_a_gaussian() -> None:
    """2 - pi/2 of exact paths, 0.424928 of 128 Euler steps; both times z_0^2."""
    z0 = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    values, end = path_curvature(Gaussian(1.0), z0, 128)
    assert float(values[0]) == pytest.approx(0.424928, abs=5e-7)
    assert float(values[1]) == pytest.approx(4 * 0.424928, abs=2e-6)
    assert float(end[0]) == pytest.approx(1.0, abs=0.01)
    fine = [float(path_curvature(Gaussian(1.0), z0[:1], n)[0]) for n in (1024, 2048)]
    assert 2 * fine[1] - fine[0] == pytest.approx(2 - math.pi / 2, abs=2e-6)
    assert Gaussian(1.0).exact() == pytest.approx(2 - math.pi / 2, abs=1e-8)


@pytest.mark.parametrize(("s", "a", "sigma"), [(0.5, 0.74, 0.756), (1.0, 0.613, 0.623), (2, 0, 1)])
def test_velocity_of_an_aligned_gaussian(s: float, a: float, sigma: float) -> None:
    """Extrapolated to infinitely many steps it is that of the exact paths."""
    field, z0 = Gaussian(s, a, sigma), torch.ones(1, 1, dtype=torch.float64)
    coarse, fine = (float(path_curvature(field, z0, n)[0]) for n in (1024, 2048))
    assert 2 * fine - coarse == pytest.approx(field.exact(), rel=1e-4)


def test_mean_over_drawn_trajectories() -> None:
    """From z_0 ~ N(0, 1) the mean is that of z_0 = 1, within its standard error."""
    z0 = normal(3, Stream.SAMPLE_NOISE, torch.arange(4000), 1).double()
    found = Curvature(path_curvature(Gaussian(1.0), z0, 128)[0], 128)
    assert abs(found.mean - 0.424928) < 4 * found.se
    # C = 0.424928 z_0^2, and z_0^2 has the standard deviation sqrt(2).
    assert found.std == pytest.approx(0.424928 * math.sqrt(2), rel=0.1)
    assert found.se == pytest.approx(found.std / math.sqrt(3999), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_straight_paths_have_none_exactly(dtype: torch.dtype) -> None:
    x0 = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    to = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(2)).to(dtype) * 100
    values, end = path_curvature(lambda x, t: to - x0, x0, 100)
    assert values.tolist() == [0.0, 0.0, 0.0]
    assert relative(end, to) < 1e-5
    # The definition on stored states, and a difference of two sums, are not zero in float32.
    if dtype == torch.float32:
        assert float(naive(lambda x, t: to - x0, x0, 100).max()) > 0


@pytest.mark.parametrize(
    ("steps", "offset", "tolerance"),
    # Times are float32, so seven steps are equal to seven digits only, and eight exactly.
    [(1, 1000.0, 0.0), (8, 1000.0, 1e-9), (128, 1000.0, 1e-9), (7, 0.0, 1e-6), (100, 0.0, 1e-6)],
)
def test_running_sums_are_the_definition(steps: int, offset: float, tolerance: float) -> None:
    x0 = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def wavy(x: Tensor, t: Tensor) -> Tensor:
        return offset + 2 * torch.sin(9 * x) + 0.3 * t.double()[:, None, None]

    values, _ = path_curvature(wavy, x0, steps)
    assert torch.allclose(values, naive(wavy, x0, steps), rtol=tolerance, atol=1e-18)
    assert (float(values.max()) == 0.0) == (steps == 1)


def test_paired_difference_of_two_fields() -> None:
    """Shared noise cancels: the error of the difference is smaller than that of either."""
    z0 = normal(0, Stream.SAMPLE_NOISE, torch.arange(500), 1).double()
    one, two = (
        Curvature(path_curvature(Gaussian(1.0, a, 1.0), z0, 32)[0], 32) for a in (0.0, 0.05)
    )
    apart = difference(two.estimate, one.estimate)
    assert apart.value == pytest.approx(two.mean - one.mean, abs=1e-12)
    assert apart.se < 0.3 * one.se and apart.interval()[1] < 0


def test_refusals_and_a_single_trajectory() -> None:
    for wrong in (torch.zeros(0), torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="one of each trajectory"):
            Curvature(wrong, 128)
    with pytest.raises(ValueError, match="steps must be an integer"):
        path_curvature(toy, torch.zeros(1, 2, 3, 3), 0)
    record = Curvature(torch.tensor([0.5], dtype=torch.float64), 4).to_record()
    assert record == {"mean": 0.5, "std": 0.0, "se": None, "n": 1, "steps": 4}


class Bent(torch.nn.Module):
    """A curved field that depends on the label, on data (2, 3, 3)."""

    clock = "data_at_1"

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 2, "input_size": 3, "num_classes": 3}
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(len(x))
        turned = torch.sin((2 + y.view(-1, 1, 1, 1)) * x.flip(1))
        return turned + 0.3 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("kind", ["uniform", "discrete", "discrete(3)", None])
def test_curvature_of_a_network_from_its_source(kind: str | None) -> None:
    """Nine trajectories in batches of four, of a source of classes; weights drawn or given.

    The official code stops with a TypeError where weights are discrete and none is given.
    """
    table = torch.randn(3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    source = MixedSource(lambda y: table[y], "class", w=kind or 0.25, lam=1.0)
    begins = sample_source(source, None if kind else 0.25)
    prepared = PreparedSampling(Bent(), Sampler(), Guidance(), batch_size=4, source=begins)
    found = network_curvature(prepared, 9, seed=3, steps=16)
    y = torch.arange(9) % 3
    x0 = sampling_noise(source, 3, torch.arange(9), (2, 3, 3), y=y, w=begins.w)
    expected = naive(lambda x, t: Bent()(x, t, y), x0.double(), 16)
    assert len(found.values) == 9 and relative(found.values, expected) < 1e-5
    plain = PreparedSampling(Bent(), Sampler(), Guidance(), batch_size=4)
    assert relative(network_curvature(plain, 9, seed=3, steps=16).values, expected) > 0.01


def test_rows_of_solvers() -> None:
    """Evaluations as they were made, ends against those of the adaptive solver."""
    pytest.importorskip("scipy")
    net = Bent()
    prepared = PreparedSampling(net, Sampler(), Guidance(), batch_size=4)
    rows = solver_rows(prepared, 6, seed=3)
    assert [(row.method, row.steps) for row in rows[:-1]] == [(s.method, s.steps) for s in TABLE]
    assert [row.nfe for row in rows[:-1]] == [s.nfe for s in TABLE]
    # Batches of four and two, of which the second is filled up, and both are counted.
    made = len(net.rows) - 2 * sum(s.nfe for s in TABLE)
    assert set(net.rows) == {4} and rows[-1].nfe == made / 2
    assert (rows[-1].method, rows[-1].steps, rows[-1].apart) == ("rk45", None, None)
    euler, heun = prepared.with_sampler(TABLE[0]), prepared.with_sampler(ADAPTIVE)
    ends = [
        torch.cat([p.draw(ids, seed=3, balanced=True).x for ids in torch.arange(6).split(4)])
        for p in (euler, heun)
    ]
    apart = float((ends[0] - ends[1]).double().square().mean().sqrt())
    assert rows[0].apart == pytest.approx(apart, rel=1e-6)
    errors = [row.apart for row in rows if row.method == "euler"]
    assert errors == sorted(errors, reverse=True) and errors[0] > 10 * errors[-1] > 0
    with pytest.raises(ValueError, match="num must be >= 1 samples"):
        solver_rows(prepared, 0)
