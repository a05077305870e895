"""What `MixFlow.prepare` refuses because it would be wrong without a word."""

import pytest
import torch

from mixflow_fast import MixFlow, Moments
from mixflow_fast.flow import DATA_AT_1, NOISE_AT_1


def batch(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, n, 3, 4, 4, generator=g))


@pytest.mark.parametrize("name", ["x1", "mean", "std", "x0", "t", "slowed_t"])
def test_a_gradient_that_would_be_cut_off_is_refused(name: str) -> None:
    """An encoder that is trained along would get none, without a word."""
    x1, x0 = batch()
    given = {"x0": x0, "t": torch.full((6,), 0.5), "slowed_t": torch.full((6,), 0.4)}
    mix, data = MixFlow(clock=DATA_AT_1), x1
    for value in (mix.prepare(data, **given), mix.prepare(Moments(x1, x1.abs(), 1.0))):
        assert not (value.x.requires_grad or value.x0().requires_grad or value.t.requires_grad)
    if name in given:
        given[name] = given[name].clone().requires_grad_()
    elif name == "x1":
        data = x1.clone().requires_grad_()
    else:
        ends = {"mean": x1, "std": x1.abs()}
        data = Moments(**ends | {name: ends[name].clone().requires_grad_()}, scale=1.0)
    shown = "x1" if name == "mean" else name
    with pytest.raises(ValueError, match=f"{shown} must not require a gradient.*{shown}.detach"):
        mix.prepare(data, **given)
    with torch.no_grad():  # nobody expects a gradient here
        assert not mix.prepare(data, **given).x.requires_grad


@pytest.mark.parametrize("clock", [DATA_AT_1, NOISE_AT_1])
def test_times_slowed_to_the_clean_side_are_refused(clock: str) -> None:
    x1, x0 = batch()
    t = torch.full((6,), 0.5)
    noisier, cleaner = (0.4, 0.6) if clock == DATA_AT_1 else (0.6, 0.4)
    mix = MixFlow(clock=clock)
    for m in (t, torch.full((6,), noisier), t + 1e-7, t - 1e-7):
        mix.prepare(x1, x0=x0, t=t, slowed_t=m)
    wrong = torch.full((6,), noisier)
    wrong[4] = cleaner
    with pytest.raises(ValueError, match=f"slowed_t = {cleaner} for t = 0.5 in row 4 .1 of 6."):
        mix.prepare(x1, x0=x0, t=t, slowed_t=wrong)
    full = MixFlow(clock=clock, interval="full").prepare(x1, x0=x0, t=t, slowed_t=wrong)
    assert torch.equal(full.slowed_t, wrong)
