"""Training-free remedies: closed forms, brute force, nothing changed where they are off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixflow_fast.sampling.guidance import Guidance, guided_velocity
from mixflow_fast.sampling.remedies import (
    REMEDIES,
    EpsilonScale,
    LabelScale,
    TimeShift,
    VelocityScale,
    parse_remedy,
)
from mixflow_fast.sampling.samples import sample
from tests.support.networks import Mirrored, Net, Toy, relative

X = torch.linspace(-2, 3, 3 * 16).view(3, 1, 4, 4)
T = torch.tensor([0.0, 0.4, 0.9])


@pytest.mark.parametrize(
    "remedy", [VelocityScale(0.0, 2.0), LabelScale(1.0), EpsilonScale(1.0), TimeShift(0.0)]
)
def test_off_changes_no_bit(remedy) -> None:
    net, arguments = Net(), dict(num=3, steps=4, batch_size=3, cfg_scale=1.5)
    assert torch.equal(sample(net, remedy=remedy, **arguments).x, sample(net, **arguments).x)


@pytest.mark.parametrize("remedy", ["ssc", "label_scale=0.9", "epsilon=1.02", "time_shift"])
def test_the_clock_of_the_network_does_not_matter(remedy: str) -> None:
    net, arguments = Net(), dict(num=3, steps=4, batch_size=3, remedy=parse_remedy(remedy))
    out = sample(net, **arguments).x
    assert relative(sample(Mirrored(net), **arguments).x, out) < 1e-5
    assert relative(sample(net, num=3, steps=4, batch_size=3).x, out) > 1e-3


def test_ssc_scales_the_velocity() -> None:
    v = torch.tanh(X)
    out = VelocityScale(0.1, 2.0).corrected(v, X, T)
    for row, t in enumerate((0.0, 0.4, 0.9)):
        torch.testing.assert_close(out[row], (1 + 0.1 * (1 - t) ** 2) * v[row])


def test_label_scale_reaches_the_network_and_not_the_interval() -> None:
    """Both halves are told kappa t; guidance is still decided at the true time."""
    told = []

    class Watched(Toy):
        def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            told.append(t.tolist())
            return super().__call__(x, t, y)

    guidance = Guidance(2.0, None, (0.5, 1.0))
    y = torch.tensor([1, 2])
    velocity = guided_velocity(Watched("data_at_1"), y, guidance, remedy=LabelScale(0.5))
    velocity(X[:2], torch.tensor([0.25, 0.25]))
    velocity(X[:2], torch.tensor([0.5, 0.5]))
    assert told == [[0.125] * 2, [0.25] * 4]
    assert LabelScale(1.5).told(X, T).tolist() == pytest.approx([0.0, 0.6, 1.0])


def test_epsilon_scaling() -> None:
    """Data and noise from the velocity; the noise divided, the state kept."""
    x, t = X.double(), T.double()[:, None, None, None]
    v = torch.tanh(x)
    noise = x - t * v
    out = EpsilonScale(1.02).corrected(v, x, T)
    shrunk = noise / 1.02
    data = (x - (1 - t) * shrunk) / t
    torch.testing.assert_close(out[1:], (data - shrunk)[1:], rtol=1e-6, atol=1e-6)
    assert torch.equal(out[0], v[0])  # all noise: undefined, so unchanged


@pytest.mark.parametrize("variance", [0.3, 1.0, 2.5])
def test_time_shift_finds_the_nearest_variance(variance: float) -> None:
    remedy = TimeShift(window=0.1, cutoff=0.2, variance=variance)
    times = torch.tensor([0.0, 0.05, 0.3, 0.5, 0.7, 0.79, 0.85])
    scales = torch.tensor([0.2, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.5])
    t, scale = (grid.reshape(-1) for grid in torch.meshgrid(times, scales, indexing="ij"))
    x = torch.randn(len(t), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x / x.flatten(1).std(1)[:, None, None, None] * scale[:, None, None, None]
    told = remedy.told(x, t)
    lowest = 1 / (1 + variance)
    candidates = torch.linspace(0, 1, 20001, dtype=torch.float64)
    curve = candidates**2 * variance + (1 - candidates) ** 2
    for time, tau, value in zip(t.tolist(), told.tolist(), (scale**2).tolist(), strict=True):
        if time >= 0.8:
            assert tau == pytest.approx(time)
            continue
        branch = (candidates <= lowest) if time < lowest else (candidates >= lowest)
        allowed = branch & ((candidates - time).abs() <= 0.1 + 1e-9)
        error = torch.where(allowed, (curve - value).abs(), torch.inf)
        assert tau == pytest.approx(float(candidates[error.argmin()]), abs=2e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssc", VelocityScale()),
        ("ssc=0.2", VelocityScale(0.2)),
        ("ssc=0.2,3", VelocityScale(0.2, 3.0)),
        ("label_scale=0.85", LabelScale(0.85)),
        ("epsilon=1.017", EpsilonScale(1.017)),
        ("time_shift=0.02,0.6,0.3", TimeShift(0.02, 0.6, 0.3)),
    ],
)
def test_reading_a_remedy(text: str, expected) -> None:
    found = parse_remedy(text)
    assert found == expected and found.to_record()["name"] == text.partition("=")[0]
    assert found.describe().startswith(found.name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sss", f"remedy must be one of {', '.join(REMEDIES)}"),
        ("ssc=a", "ssc=A,B with numbers"),
        ("epsilon=1,2", "epsilon takes 1 numbers"),
        ("ssc=-1", "a must be > -1"),
        ("ssc=0.1,0", "b must be > 0"),
        ("label_scale=0", "kappa must be > 0"),
        ("epsilon=nan", "scale must be > 0"),
        ("time_shift=2", r"window must be in \[0, 1\]"),
        ("time_shift=0.1,0", r"cutoff must be in \(0, 1\]"),
    ],
)
def test_bad_remedies(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_remedy(text)
