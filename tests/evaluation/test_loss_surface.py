"""The loss surface of a network whose losses are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixflow_fast.config.loading import load_config
from mixflow_fast.evaluation.loss_surface import CUTS, loss_surface
from mixflow_fast.evaluation.validation_loss import TIMES, ValidationLoss
from mixflow_fast.training.build import build_data, build_objective, build_validation


def test_the_surface_is_that_of_the_formula() -> None:
    """A network that answers with its input: |x_m - u|^2 = |(m - 1) x1 + (2 - m) x0|^2."""
    pytest.importorskip("sklearn")
    config = load_config("photos")
    dataset = build_data(config.data, config.model)
    losses = ValidationLoss(
        build_validation(config.data, config.model, dataset),
        build_objective(config.objective, "data_at_1", 0),
        torch.device("cpu"),
        examples=12,
        batch_size=5,
    )
    seen: set[tuple[float, float]] = set()

    def net(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.add((float(t[0]), 0.0))
        return x

    found = loss_surface(losses, net, grid=4)
    both = losses(net)
    # A loss depends on m alone here: every row is constant, and the diagonal is a cut.
    assert found.times == [0.125, 0.375, 0.625, 0.875]
    for row in range(4):
        values = found.grid[row][row:]
        assert found.grid[row][:row] == [None] * row
        assert max(values) == pytest.approx(min(values), rel=1e-6)
    assert found.cuts[1.0] == pytest.approx(both.loss_by_t)
    assert list(found.cuts) == list(CUTS) and len(found.cut_times) == TIMES
    # Along m = 0.5 t the loss is that of the diagonal at half the time: cuts at t = 2 m.
    at_half = losses.at(net, [(t / 2, t / 2) for t in found.cut_times])
    assert found.cuts[0.5] == pytest.approx(at_half, rel=1e-6)
    assert {t for t, _ in seen} >= {0.125, 0.875}
    with pytest.raises(ValueError, match="grid must be >= 2, got 1"):
        loss_surface(losses, net, grid=1)
