"""Slow flow of samplers whose states are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mixflow_fast.evaluation.examples import Examples
from mixflow_fast.evaluation.slow_flow import Settings, SlowFlow, deficit, slow_flow
from mixflow_fast.evaluation.slowed_times import dct

SHAPE = (1, 8, 8)
# Standard deviation of each DCT coefficient: a spectrum that falls, as that of images.
SCALE = 1.5 / (1 + torch.arange(8.0)[:, None] + torch.arange(8.0)) ** 0.8


def gaussian(count: int, seed: int = 0, size: float = 1.0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    z = size * SCALE * torch.randn(count, *SHAPE, generator=generator)
    return Examples(inverse_dct(z), None, "Gaussian images")


def inverse_dct(z: Tensor) -> Tensor:
    """The orthonormal transform's inverse is its transpose."""
    basis = dct(torch.eye(64).view(64, *SHAPE)).float()
    return (z.flatten(1) @ basis.T).view(z.shape)


class GaussianFlow:
    """The exact velocity for Gaussian data, and one that does as if time were (1 - c) t."""

    def __init__(self, slow: float = 0.0, clock: str = "data_at_1", size: float = 1.0) -> None:
        self.clock, self._slow, self.size = clock, slow, size

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        own = t if self.clock == "data_at_1" else 1 - t
        keep = 1 - self._slow
        m = (keep * own).double()[:, None]
        s = (self.size * SCALE).double().flatten().square()
        z = dct(x)
        velocity = keep * z * (m * s - (1 - m)) / (m**2 * s + (1 - m) ** 2)
        out = inverse_dct(velocity.float().view(x.shape))
        return out if self.clock == "data_at_1" else -out


def measure(flow: GaussianFlow, **settings: object) -> SlowFlow:
    defaults = {"steps": (5, 40), "states": 1000, "fine": 60, "method": "heun"}
    return slow_flow(flow, gaussian(20_000, size=flow.size), Settings(**{**defaults, **settings}))


def test_an_exact_flow_is_not_slow_and_its_pairs_seem_so() -> None:
    found = measure(GaussianFlow(size=0.6)).by_steps[40]
    assert [point.t for point in found.marginal] == pytest.approx([0.4, 0.6, 0.8, 1.0])
    for point, level in zip(found.marginal, found.noise.median, strict=True):
        assert point.ratio == pytest.approx(1, abs=max(0.01, 3 * point.se))
        assert level == pytest.approx(point.t, abs=0.01)
    assert found.overshoot == []
    # The documented bias: a state is not on the way to an example it has nothing to do with.
    assert found.pair.median[-1] < 0.85 and found.pair.high[-1] <= 1


def test_a_slow_flow_is_found_by_all_estimators() -> None:
    """Its states at t are the exact ones of (1 - c) t, on every grid but for the solver's error."""
    c = 0.1
    found = measure(GaussianFlow(slow=c, size=0.6))
    for points in (found.by_steps[40].marginal, found.by_steps[40].fine):
        for point in points:
            assert point.ratio == pytest.approx(1 - c, abs=max(0.01, 3 * point.se))
    for level, t in zip(found.by_steps[40].noise.median, (0.4, 0.6, 0.8, 1.0), strict=True):
        assert level == pytest.approx((1 - c) * t, abs=0.01)


def test_eulers_own_error_is_found() -> None:
    """Its states are Gaussian with known deviations, so the nearest m is known as well."""
    size = 0.5
    s = (size * SCALE).double().flatten().square()
    candidates = torch.linspace(0.5, 1.2, 1401, dtype=torch.float64)[:, None]
    true = (candidates**2 * s + (1 - candidates) ** 2).sqrt()
    flow = measure(GaussianFlow(size=size), method="euler", steps=(5, 20), states=4000)
    for steps in (5, 20):
        deviation, wanted = torch.ones_like(s), {}
        for place in range(steps):
            t = place / steps
            deviation = deviation * (1 + (t * s - (1 - t)) / (t**2 * s + (1 - t) ** 2) / steps)
            nearest = (deviation - true).square().sum(1).argmin()
            wanted[round((place + 1) / steps, 3)] = float(candidates[nearest])
        points = flow.by_steps[steps].marginal
        for point in points[1:]:
            assert point.ratio * point.t == pytest.approx(
                wanted[round(point.t, 3)], abs=max(0.01, 3 * point.se)
            )
        assert abs(deficit(flow.by_steps[steps].fine)[0]) < 0.01


class Toward:
    """Every state goes straight to 0.9 of the way to one image, and has done t^2 of that at t."""

    clock = "data_at_1"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None, None, None]
        return 1.8 * t * (1 - x) / (1 - 0.9 * t**2)


def test_what_a_coarse_grid_loses() -> None:
    """Euler's share of the way that is left is a product; the exact one is 1 - 0.9 t^2."""
    settings = Settings(steps=(4, 10), states=100, fine=200)
    found = slow_flow(Toward(), gaussian(2000), settings).by_steps
    for steps in (4, 10):
        left, lags = 1.0, []
        for place in range(steps):
            t = place / steps
            left *= 1 - 1.8 * t / (1 - 0.9 * t**2) / steps
            after = (place + 1) / steps
            when = math.sqrt(max(0.0, (1 - left) / 0.9))
            assert found[steps].endpoint.median[place] == pytest.approx(when, abs=2e-3)
            if after >= 0.2:
                lags.append(1 - when / after)
        assert found[steps].lag == pytest.approx((max(lags), max(lags)), abs=5e-3)


def test_both_clocks_and_any_batches_agree() -> None:
    options = {"states": 300, "steps": (4,), "fine": 20}
    one = measure(GaussianFlow(), batch_size=300, **options).to_record()
    two = measure(GaussianFlow(clock="noise_at_1"), batch_size=77, **options).to_record()
    for name in ("deficit", "fine_deficit"):
        assert one["steps"][0][name] == pytest.approx(two["steps"][0][name], abs=1e-5)
    for name in ("pair", "endpoint"):
        assert one["steps"][0][name]["median"] == pytest.approx(
            two["steps"][0][name]["median"], abs=1e-5
        )


def test_too_much_signal_is_an_overshoot() -> None:
    class Eager(GaussianFlow):
        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return 1.3 * super().__call__(x, t)

    found = measure(Eager(), states=500).by_steps[40]
    assert found.overshoot and all(point.ratio > 1 for point in found.overshoot)


def test_what_is_refused() -> None:
    for wrong, text in (
        ({"steps": ()}, "steps must be different"),
        ({"steps": (0,)}, "steps must be different"),
        ({"method": "dopri5"}, "method must be one of euler, heun"),
        ({"states": 5}, "states must be >= 100"),
        ({"steps": (9,), "fine": 8}, "fine must be at least the most steps, 9"),
        ({"batch_size": 0}, "batch_size"),
        ({"path": "cosine"}, "path must be one of"),
    ):
        with pytest.raises(ValueError, match=text):
            Settings(**wrong)
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        network = torch.nn.Linear(1, 1)
        network.clock = "data_at_1"
        slow_flow(network, gaussian(10))

    class Broken(GaussianFlow):
        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(x, math.nan)

    with pytest.raises(ValueError, match="not finite"):
        measure(Broken(), states=100, steps=(2,), fine=4)
