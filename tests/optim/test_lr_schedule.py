"""Learning-rate schedules and their formulas."""

from __future__ import annotations

import math

import pytest

from mixflow_fast.optim.lr_schedule import learning_rate


def test_learning_rate_schedules() -> None:
    common = dict(lr=1.0, warmup_images=100, decay_images=1100, final_lr=0.1)
    assert learning_rate(50, **common) == 0.5
    assert learning_rate(100, **common) == 1.0
    assert learning_rate(10**9, **common) == 1.0
    assert learning_rate(600, schedule="linear", **common) == pytest.approx(0.55)
    assert learning_rate(350, schedule="cosine", **common) == pytest.approx(
        0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    )
    for schedule in ("linear", "cosine"):
        assert learning_rate(1100, schedule=schedule, **common) == pytest.approx(0.1)
        assert learning_rate(5000, schedule=schedule, **common) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="schedule"):
        learning_rate(0, lr=1.0, schedule="step")
