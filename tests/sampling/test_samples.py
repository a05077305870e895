"""Samples as pure functions of seed and id; labels, bad arguments."""

import math

import pytest
import torch
from torch import Tensor, nn

from mixflow_fast.kernels.philox import Stream, normal, uniform
from mixflow_fast.sampling.grids import time_grid
from mixflow_fast.sampling.guidance import Guidance, model_velocity
from mixflow_fast.sampling.remedies import parse_remedy
from mixflow_fast.sampling.sampler import Sampler
from mixflow_fast.sampling.samples import draw_labels, sample
from mixflow_fast.sampling.solvers import integrate
from tests.support.networks import Net, relative


def test_samples_are_a_function_of_seed_and_id() -> None:
    net = Net()
    arguments = dict(steps=3, cfg_scale=1.5, batch_size=4)
    full = sample(net, num=11, **arguments)
    assert full.x.shape == (11, 4, 6, 6) and full.x.dtype == torch.float32 and full.nfe == 3
    fewer = sample(net, num=5, **arguments)
    assert torch.equal(fewer.x, full.x[:5]) and torch.equal(fewer.labels, full.labels[:5])
    tail = sample(net, ids=torch.arange(4, 11), **arguments)
    assert torch.equal(tail.x, full.x[4:]) and torch.equal(tail.labels, full.labels[4:])
    other_batch = sample(net, num=11, **(arguments | {"batch_size": 3}))
    assert relative(other_batch.x, full.x) < 1e-5
    assert relative(sample(net, num=11, seed=1, **arguments).x, full.x) > 0.1
    given = sample(net, labels=full.labels, **arguments)
    assert torch.equal(given.x, full.x)
    # Every row that the network saw had a full batch, twice for guidance.
    assert set(net.rows) == {8, 6}


def test_dopri5_does_not_depend_on_how_many() -> None:
    """Its step control spans the batch, so the filling of the last batch matters."""
    pytest.importorskip("torchdiffeq")
    net = Net()
    few = sample(net, num=2, method="dopri5", batch_size=4)
    many = sample(net, num=6, method="dopri5", batch_size=4)
    assert torch.equal(few.x, many.x[:2]) and few.nfe > 6


def test_starting_noise() -> None:
    """A zero velocity returns the noise itself."""
    net = Net()
    net.forward = lambda x, t, y: torch.zeros_like(x)
    ids = torch.tensor([7, 1 << 40])
    out = sample(net, ids=ids, steps=1, seed=9, batch_size=2, shape=(4, 2, 3))
    assert torch.equal(out.x.flatten(1), normal(9, Stream.SAMPLE_NOISE, ids, 24))


def test_labels() -> None:
    ids = torch.arange(4000)
    labels = draw_labels(3, ids, 7)
    assert torch.equal(draw_labels(3, ids[100:], 7), labels[100:])
    counts = torch.bincount(labels, minlength=7).double()
    expected = 4000 / 7
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert len(counts) == 7 and chi2 < 22.46  # 99.9% of chi squared with 6 degrees of freedom
    reference = (uniform(3, Stream.SAMPLE_LABEL, ids)[:, 0].double() * 7).floor().long()
    assert (labels != reference).sum() <= 1  # the same stream, up to the last bits
    assert torch.equal(draw_labels(3, ids[:9], 4, balanced=True), ids[:9] % 4)
    net = Net()
    out = sample(net, num=7, steps=1, balanced=True, batch_size=4)
    assert out.labels.tolist() == [0, 1, 2, 3, 4, 0, 1]


def test_leaves_no_trace() -> None:
    net = Net()
    net.train()
    net.conv.eval()  # a frozen part
    before = torch.get_rng_state()
    out = sample(net, num=2, steps=2, batch_size=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training and net.dropout.training and not net.conv.training
    assert torch.equal(out.x, sample(net.eval(), num=2, steps=2, batch_size=2).x)  # no dropout
    assert not out.x.is_inference()
    (out.x * torch.ones(1, requires_grad=True)).sum().backward()
    net.train()
    net.conv.eval()
    net.forward = lambda x, t, y: 1 / 0
    with pytest.raises(ZeroDivisionError):
        sample(net, num=1, steps=1, batch_size=1)
    assert net.training and not net.conv.training


def test_without_classes() -> None:
    class Plain(nn.Module):
        clock = "data_at_1"

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return -x

    out = sample(Plain(), num=3, steps=1, shape=(1, 2, 2), batch_size=2)
    assert out.labels is None and torch.equal(out.x, torch.zeros(3, 1, 2, 2))
    empty = sample(Plain(), num=0, steps=1, shape=(1, 2, 2))
    assert empty.x.shape == (0, 1, 2, 2) and empty.nfe == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "heun2"}, "method must be one of euler, heun, .*, sde_heun"),
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"shift": 0.5}, "shift must be >= 1"),
        ({"batch_size": 0}, "batch_size"),
        ({"num": None}, "how many samples"),
        ({"num": -1}, "num must be >= 0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "must agree"),
        ({"labels": torch.tensor([0, 6])}, r"labels must lie in \[0, 5\]"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be a 1-D int64"),
        ({"ids": torch.tensor([-1, 0])}, "ids must be >= 0"),
        ({"shape": (4, 4)}, "shape must be"),
        ({"cfg_scale": 2.0, "cfg_channels": 5}, "at most the 4 channels"),
        ({"cfg_scale": 2.0, "cfg_channels": 0}, "cfg_channels must be >= 1"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance_interval"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(Net(), **({"num": 2, "steps": 1, "batch_size": 2} | change))


def test_bad_networks() -> None:
    y, x = torch.tensor([0]), torch.zeros(1, 4, 6, 6)
    with pytest.raises(ValueError, match="null class"):
        model_velocity(Net(null=False), y, 2.0)
    net = Net()
    net.clock = None
    with pytest.raises(ValueError, match="clock"):
        model_velocity(net, y)
    net = Net()
    net.prediction = "noise"
    with pytest.raises(ValueError, match="prediction"):
        model_velocity(net, y)
    with pytest.raises(ValueError, match="needs labels"):
        model_velocity(Net(), None, 2.0)
    with pytest.raises(ValueError, match="shape of x"):
        integrate(lambda x, t: x[:, :2], x, time_grid(1), "euler")
    for times in (torch.tensor([1.0, 0.0]), torch.tensor([0.0, math.nan]), torch.zeros(1)):
        with pytest.raises(ValueError, match="times"):
            integrate(lambda x, t: x, x, times, "euler")
    with pytest.raises(ValueError, match="shape="):
        del net.config
        sample(net, num=1)


def test_formulas_of_another_path_are_refused() -> None:
    """Where the network says what it was trained on; a plain ODE solver does not ask."""
    net = Net()
    net.path = "gvp"
    arguments = dict(num=1, batch_size=1)
    for sampler in (Sampler("sde_euler", 4), Sampler("dpmpp2m", 4)):
        with pytest.raises(ValueError, match="the network was trained on 'gvp'"):
            sample(net, sampler=sampler, **arguments)
    sample(net, sampler=Sampler("sde_euler", 4, path="gvp"), **arguments)
    guide = Net()
    guide.path = "linear"
    guidance = Guidance(1.5, kind="autoguidance")
    with pytest.raises(ValueError, match="the guide was trained on the path 'linear', the .*'gvp'"):
        sample(net, steps=1, guidance=guidance, guide=guide, **arguments)
    guide.path = "gvp"
    sample(net, steps=1, guidance=guidance, guide=guide, **arguments)
    for remedy in ("epsilon", "time_shift"):
        with pytest.raises(ValueError, match=f"the remedy {remedy} is written for the linear"):
            sample(net, steps=1, remedy=parse_remedy(remedy), **arguments)
    sample(net, steps=1, remedy=parse_remedy("ssc"), **arguments)
