"""Scheduled sampling: the network's own step as input, without a gradient, by ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixflow_fast import MixFlow
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1
from mixflow_fast.objective.rollout import roll_in
from tests.support.networks import relative

STEPS = 5


def _batch(n: int = 400) -> tuple[Tensor, Tensor]:
    ids = torch.arange(n) + 7
    return torch.linspace(-1, 1, n * 8).view(n, 2, 2, 2), ids


@pytest.mark.parametrize("clock", [DATA_AT_1, NOISE_AT_1])
def test_a_perfect_network_changes_nothing(clock: str) -> None:
    """With the true velocity of each pair the step ends on the straight line at t."""
    x1, ids = _batch()
    mix = MixFlow(0.0, clock=clock, timesteps="uniform", seed=3)
    it = mix.prepare(x1, ids=ids)
    told = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        told.append(t)
        velocity = x1 - it.x0()
        return velocity if clock == DATA_AT_1 else -velocity

    rolled = roll_in(mix, net, it, None, STEPS)
    torch.testing.assert_close(rolled.x, it.x, rtol=0, atol=2e-6)
    assert torch.equal(rolled.t, it.t) and torch.equal(rolled.x0(), it.x0())
    # h ~ U(0, min(t, 1/N)), in the engine's clock.
    time, began = (it.t, told[0]) if clock == DATA_AT_1 else (1 - it.t, 1 - told[0])
    share = (time - began) / time.clamp(max=1 / STEPS)
    assert float(share.min()) > -1e-4 and float(share.max()) < 1 + 1e-4
    assert abs(float(share.mean()) - 0.5) < 4 / (12 * len(ids)) ** 0.5
    assert torch.equal(rolled.slowed_t, told[0])


def test_input_and_loss_of_a_wrong_network() -> None:
    """x = x_(t-h) + h v(x_(t-h), t-h); the loss still asks for x1 - x0."""
    x1, ids = _batch(6)
    y = torch.arange(6)
    mix = MixFlow(0.0, clock=DATA_AT_1, timesteps="uniform", seed=3)
    net = lambda x, t, y: (torch.tanh(x) + (t + y)[:, None, None, None], [x])  # noqa: E731
    it = mix.prepare(x1, ids=ids)
    rolled = roll_in(mix, net, it, y, STEPS)
    began = rolled.slowed_t[:, None, None, None]
    start = began * x1 + (1 - began) * it.x0()
    h = it.t[:, None, None, None] - began
    assert relative(rolled.x, start + h * net(start, rolled.slowed_t, y)[0]) < 1e-6
    assert relative(rolled.x, it.x) > 1e-2 and not rolled.x.requires_grad
    pred = torch.sin(x1)
    expected = (pred - (x1 - it.x0())).square().flatten(1).mean(1)
    assert relative(mix.loss(pred, rolled, reduction="none"), expected) < 1e-6
    # A function of the ids, whatever the batch.
    part = roll_in(mix, net, mix.prepare(x1[2:4], ids=ids[2:4]), y[2:4], STEPS)
    assert relative(part.x, rolled.x[2:4]) < 1e-6


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        ({"path": "gvp"}, 5, "linear path"),
        ({"prediction": "noise"}, 5, "velocity prediction"),
        ({}, 0, "steps of a rollout"),
    ],
)
def test_refusals(options: dict, steps: int, message: str) -> None:
    x1, ids = _batch(2)
    mix = MixFlow(clock=DATA_AT_1, **options)
    with pytest.raises(ValueError, match=message):
        roll_in(mix, lambda x, t: x, mix.prepare(x1, ids=ids), None, steps)


def test_without_ids() -> None:
    x1, _ = _batch(2)
    mix = MixFlow(clock=DATA_AT_1)
    t = torch.tensor([0.2, 0.5])
    it = mix.prepare(x1, x0=x1, t=t, slowed_t=t)
    with pytest.raises(ValueError, match="pass ids"):
        roll_in(mix, lambda x, t: x, it, None, 5)
