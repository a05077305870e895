"""Mixed sources against Gaussian closed forms, exactly: quadrature in the place of draws.

x1 ~ N(0, S^2), mean = a x1, variance sigma^2, so x0 = a x1 + sigma eps. With linear paths and
V(t) = (t + (1 - t) a)^2 S^2 + (1 - t)^2 sigma^2:
    optimal velocity   v(x, t) = x V'(t) / (2 V(t))
    irreducible loss   Var(x1 - x0 | x_t) = S^2 sigma^2 / V(t)
In mode "moments" at a known w: a becomes w a, and sigma^2 becomes w sigma^2 + 1 - w; in mode
"samples" w^2 sigma^2 + (1 - w)^2. All integrands are polynomials of degree 2 in x1 and in the
noise, so three nodes each are exact.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from mixflow_fast import MixFlow
from mixflow_fast.flow.source import MixedSource
from mixflow_fast.kernels.philox import Stream
from tests.support.recorded_draws import use_recorded


def normal_nodes(n: int = 3) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return nodes, weights / weights.sum()


def unit_nodes(n: int) -> tuple[np.ndarray, np.ndarray]:
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


class Quadrature:
    """A batch whose weighted mean is an expectation over x1, noise, t and w, through `MixFlow`.

    Args:
        S: standard deviation of the data.
        t, w: nodes and weights; one node fixes a value.
        mode: of the source.
    """

    def __init__(self, monkeypatch, S: float, t, w, mode: str = "moments") -> None:
        axes = [normal_nodes(), normal_nodes(), normal_nodes(), t, w]
        axes[2] = axes[2] if mode == "samples" else (np.zeros(1), np.ones(1))
        grids = np.meshgrid(*(nodes for nodes, _ in axes), indexing="ij")
        weights = np.ones(())
        for axis, (_, parts) in enumerate(axes):
            weights = weights * parts.reshape([-1 if i == axis else 1 for i in range(5)])
        z, eps, eps1, t, w = (torch.from_numpy(grid.reshape(-1).copy()) for grid in grids)
        self.S, self.mode, self.t, self.w = S, mode, t, w
        self.x1 = S * z[:, None]
        self.weights = torch.from_numpy(np.broadcast_to(weights, grids[0].shape).reshape(-1).copy())
        draws = {Stream.NOISE: eps, Stream.SOURCE_NOISE: eps1, Stream.SOURCE_WEIGHT: w}
        use_recorded(monkeypatch, draws)

    def expected(self, values: Tensor) -> Tensor:
        return (self.weights * values).sum()

    def variance(self, sigma: float) -> Tensor:
        """Of x0 given x1, at each w."""
        if self.mode == "moments":
            return self.w * sigma**2 + 1 - self.w
        return self.w**2 * sigma**2 + (1 - self.w) ** 2

    def velocity(self, x: Tensor, a: float, sigma: float) -> Tensor:
        """The optimal one for a network that sees w, too."""
        t, variance = self.t, self.variance(sigma)
        reach = t + (1 - t) * self.w * a
        V = reach**2 * self.S**2 + (1 - t) ** 2 * variance
        half_slope = reach * (1 - self.w * a) * self.S**2 - (1 - t) * variance
        return x * (half_slope / V)[:, None]

    def losses(self, a: Tensor, log_sigma: Tensor, lam: float, off: float = 0.0) -> Tensor:
        """Losses of the nodes with the optimal network plus `off` x.

        The network is a constant for the gradient.
        """

        def predictor(x1: Tensor) -> tuple[Tensor, Tensor]:
            return a * x1, (2 * log_sigma).expand_as(x1)

        source = MixedSource(predictor, mode=self.mode, lam=lam)
        mix = MixFlow(gamma=0, timesteps="uniform", clock="data_at_1", source=source)
        it = mix.prepare(self.x1, torch.arange(len(self.t)), t=self.t, slowed_t=self.t)
        v = self.velocity(it.x, a.item(), math.exp(log_sigma.item()))
        return mix.loss(v + off * it.x, it, reduction="none")


ONE = np.ones(1)


def variable(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("mode", ["moments", "samples"])
@pytest.mark.parametrize("w", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.35, 1.0])
def test_the_optimal_velocity_has_the_irreducible_loss(monkeypatch, t, w, mode) -> None:
    S, a, sigma = 0.5, 0.8, 0.6
    batch = Quadrature(monkeypatch, S, (np.array([t]), ONE), (np.array([w]), ONE), mode)
    loss = batch.expected(batch.losses(variable(a), variable(math.log(sigma)), 0.0))
    variance = batch.variance(sigma)[0].item()
    V = (t + (1 - t) * w * a) ** 2 * S**2 + (1 - t) ** 2 * variance
    assert loss.item() == pytest.approx(S**2 * variance / V, rel=1e-12)
    # A velocity that is off by c x is worse by c^2 E[x^2].
    worse = batch.expected(batch.losses(variable(a), variable(math.log(sigma)), 0.0, off=1.1))
    assert worse.item() == pytest.approx(S**2 * variance / V + 1.1**2 * V, rel=1e-12)


def test_rectified_flow_of_a_unit_gaussian_loses_half_of_pi(monkeypatch) -> None:
    batch = Quadrature(monkeypatch, 1.0, unit_nodes(40), (np.zeros(1), ONE))
    loss = batch.expected(batch.losses(variable(0.3), variable(-1.0), 0.0))
    assert loss.item() == pytest.approx(math.pi / 2, rel=1e-12)


def test_the_kl_is_that_of_the_unmixed_source(monkeypatch) -> None:
    S, a, sigma, lam = 0.5, 0.8, 0.6, 2.5
    batch = Quadrature(monkeypatch, S, (np.array([0.4]), ONE), (np.array([0.3]), ONE))
    with_kl, without = (
        batch.expected(batch.losses(variable(a), variable(math.log(sigma)), weight)).item()
        for weight in (lam, 0.0)
    )
    kl = 0.5 * (a**2 * S**2 + sigma**2 - 1 - math.log(sigma**2))
    assert with_kl - without == pytest.approx(lam * kl, rel=1e-12)


# S, lam, then (a, sigma, variance of the aggregate, irreducible loss) of forward coupling (w = 1)
# and (a, sigma, variance of the aggregate) of the mixture with w ~ U[0, 1]. Found by others from
# the closed form; they printed 1.89 and 3.08 for the two largest variances, where a and sigma give
# a^2 S^2 / 3 + (1 + sigma^2) / 2 = 1.883 and 3.067.
OPTIMA = [
    (0.5, 20, (0.050, 0.981, 0.962, 0.758), (0.025, 0.990, 0.990)),
    (0.5, 10, (0.100, 0.962, 0.927, 0.730), (0.050, 0.981, 0.981)),
    (0.5, 3, (0.322, 0.878, 0.797, 0.610), (0.166, 0.938, 0.942)),
    (0.5, 0.614, (0.969, 0.587, 0.579, 0.259), (0.740, 0.756, 0.831)),
    (0.5, 0.0307, (1.389, 0.147, 0.504, 0.015), (4.01, 0.293, 1.883)),
    (1.0, 20, (0.050, 0.962, 0.927, 1.461), (0.025, 0.981, 0.981)),
    (1.0, 3, (0.292, 0.776, 0.687, 0.939), (0.164, 0.883, 0.899)),
    (1.0, 0.614, (0.587, 0.440, 0.538, 0.284), (0.613, 0.623, 0.820)),
    (1.0, 0.0307, (0.701, 0.104, 0.502, 0.015), (2.76, 0.235, 3.067)),
]


def optimum(batch: Quadrature, lam: float) -> tuple[float, float, float]:
    """(a, sigma, loss without KL) where the gradient of `MixFlow.loss` vanishes.

    The network is the best one for every (a, sigma), so the gradient with the network held fixed
    is that of the whole.
    """

    def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        a, log_sigma = (variable(float(value)) for value in point)
        loss = batch.expected(batch.losses(a, log_sigma, lam))
        loss.backward()
        return loss.item(), np.array([a.grad.item(), log_sigma.grad.item()])

    found = minimize(
        value_and_gradient, np.array([0.5, -0.5]), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    a, log_sigma = found.x
    floor = batch.expected(batch.losses(variable(a), variable(log_sigma), 0.0))
    return float(a), math.exp(log_sigma), floor.item()


def printed(value: float) -> object:
    """Equal up to the table's rounding, three digits after the point or three in all."""
    return pytest.approx(value, abs=6e-4 if round(value, 2) != value or value < 1 else 6e-3)


@pytest.mark.parametrize(("S", "lam", "coupled", "mixed"), OPTIMA)
def test_table_of_optima(monkeypatch, S, lam, coupled, mixed) -> None:
    a, sigma, floor = optimum(Quadrature(monkeypatch, S, unit_nodes(40), (ONE, ONE)), lam)
    assert (a, sigma) == (printed(coupled[0]), printed(coupled[1]))
    assert a**2 * S**2 + sigma**2 == printed(coupled[2])
    assert floor == printed(coupled[3])
    batch = Quadrature(monkeypatch, S, unit_nodes(40), unit_nodes(40))
    a, sigma, _ = optimum(batch, lam)
    assert (a, sigma) == (printed(mixed[0]), printed(mixed[1]))
    assert a**2 * S**2 / 3 + (1 + sigma**2) / 2 == printed(mixed[2])
