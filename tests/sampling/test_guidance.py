"""Guidance and clocks against the official networks' own forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.models.sit import SiT
from mixflow_fast.sampling.guidance import model_velocity
from mixflow_fast.sampling.samples import sample
from tests.support.golden import load
from tests.support.networks import Mirrored, Net, relative


def test_opposite_clock_gives_the_same_samples() -> None:
    net = Net()
    arguments = dict(num=3, steps=4, method="heun", seed=1, batch_size=3)
    for guidance in ({}, {"cfg_scale": 2.5, "guidance_interval": (0.3, 0.8), "cfg_channels": 2}):
        a = sample(net, **arguments, **guidance)
        b = sample(Mirrored(net), **arguments, **guidance)
        # 1 - (1 - t) is t up to one rounding.
        assert relative(b.x, a.x) < 1e-6 and a.nfe == b.nfe == 8


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_guidance_algebra(channels: int | None) -> None:
    net = Net().eval()
    y = torch.tensor([2, 0])
    x = normal(0, Stream.NOISE, torch.arange(2), 4 * 36).view(2, 4, 6, 6)
    t = torch.tensor([0.4, 0.4])
    cond, uncond = net(x, t, y), net(x, t, torch.tensor([5, 5]))
    expected = 1.5 * cond - 0.5 * uncond  # u + s (c - u) with s = 1.5
    if channels == 3:
        expected[:, 3] = cond[:, 3]
        assert relative(expected[:, 3], uncond[:, 3]) > 0.1
    guided = model_velocity(net, y, 1.5, channels)(x, t)
    assert relative(guided, expected) < 1e-6
    assert relative(guided, cond) > 1e-2


@pytest.mark.parametrize("name", ["sit_0", "repa_0"])
def test_official_networks(name: str) -> None:
    """SiT's own guidance (first three channels); REPA's velocity, seen in the engine's clock."""
    tensors, config = load(name)
    config.pop("grad_of", None)
    model = SiT(**config).eval()
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})
    x, t, y = tensors["x"], tensors["t"], tensors["y"]
    with torch.no_grad():
        if name == "sit_0":
            expected = tensors["out_cfg_1.5"].chunk(2)[0]
            out = model_velocity(model, y, 1.5, 3)(x, t)
        else:
            expected = -tensors["out"]
            out = model_velocity(model, y)(x, 1 - t)
    assert relative(out, expected) < 1e-5


def test_guidance_interval_and_cost() -> None:
    net = Net().eval()
    y = torch.tensor([2, 0])
    x = normal(0, Stream.NOISE, torch.arange(2), 4 * 36).view(2, 4, 6, 6)

    def at(time: float | list[float], scale: float = 2.0, **more: object) -> Tensor:
        t = torch.tensor(time if isinstance(time, list) else [time, time])
        net.rows.clear()
        return model_velocity(net, y, scale, **more)(x, t)

    inside = {"guidance_interval": (0.25, 0.75)}
    for time, rows in ((0.1, [2]), (0.25, [4]), (0.5, [4]), (0.75, [4]), (0.8, [2])):
        out = at(time, **inside)
        assert net.rows == rows
        reference = at(time) if rows == [4] else at(time, 1.0)
        torch.testing.assert_close(out, reference, rtol=0, atol=1e-6)
    mixed = at([0.5, 0.9], **inside)
    torch.testing.assert_close(mixed[0], at(0.5)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed[1], at(0.9, 1.0)[1], rtol=0, atol=1e-6)
    at(0.5, 1.0)
    assert net.rows == [2]
