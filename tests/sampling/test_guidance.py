"""Guidance and clocks against the official networks' own forward pass."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.models.sit import SiT
from mixflow_fast.sampling.guidance import Guidance, guided_velocity, model_velocity
from mixflow_fast.sampling.sampler import Sampler
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


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = normal(0, Stream.NOISE, torch.arange(2), 4 * 36).view(2, 4, 6, 6)
    return x, torch.tensor([0.4, 0.4]), torch.tensor([2, 0])


def test_scale_1_is_no_guidance() -> None:
    """The same bits, and nothing but the conditional rows of the main network."""
    x, t, y = _inputs()
    net, guide = Net().eval(), Net(channels=4).eval()
    plain = net(x, t, y)
    for guidance, other in ((Guidance(1.0), None), (Guidance(1.0, kind="autoguidance"), guide)):
        net.rows.clear()
        assert torch.equal(guided_velocity(net, y, guidance, other)(x, t), plain)
        assert net.rows == [2] and guide.rows == []


def test_autoguidance() -> None:
    x, t, y = _inputs()
    net, guide = Net(null=False).eval(), Mirrored(Net(channels=4)).eval()
    guide.net.conv.weight.data *= 0.5
    bad = guide.net(x, t, y)
    main = net(x, t, y)
    net.rows.clear(), guide.net.rows.clear()
    guidance = Guidance(1.42, kind="autoguidance")
    out = guided_velocity(net, y, guidance, guide)(x, t)
    # A guide may run in the other clock, and a network without a null class can be guided.
    assert relative(out, bad + 1.42 * (main - bad)) < 1e-5 and relative(out, main) > 1e-2
    assert net.rows == guide.net.rows == [2]
    # A guide that is the network itself changes nothing.
    same = guided_velocity(net, y, guidance, net)(x, t)
    assert relative(same, main) < 1e-6
    # `cfg_channels` is a habit of classifier-free guidance; channels that are asked for count.
    net.cfg_channels = 3
    assert relative(guided_velocity(net, y, guidance, guide)(x, t), out) < 1e-6
    three = guided_velocity(net, y, Guidance(1.42, 3, kind="autoguidance"), guide)(x, t)
    assert torch.equal(three[:, 3], main[:, 3]) and relative(three[:, :3], out[:, :3]) < 1e-6
    narrow = Guidance(1.42, interval=(0.5, 1.0), kind="autoguidance")
    guide.net.rows.clear()
    assert torch.equal(guided_velocity(net, y, narrow, guide)(x, t), main)
    assert guide.net.rows == []


def test_autoguidance_of_samples() -> None:
    """The guide is put in evaluation mode, and gets its flags back."""
    net, guide = Net(), Net()
    guide.embed.weight.data *= 0.5
    guidance = Guidance(1.5, kind="autoguidance")
    arguments = dict(num=2, steps=2, batch_size=2, guidance=guidance, guide=guide)
    out = sample(net, **arguments)
    assert guide.training and torch.equal(sample(net, **arguments).x, out.x)  # no dropout
    assert relative(out.x, sample(net, num=2, steps=2, batch_size=2).x) > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Guidance(1.5, kind="auto"), "kind must be"),
        (lambda: Guidance(float("nan")), "finite"),
        (lambda: Guidance(1.5, "some"), "cfg_channels must be"),
        (lambda: Guidance(1.5, interval=(0.5, 1.5)), "guidance_interval"),
        (lambda: guided_velocity(Net(), None, Guidance(), Net()), "a guide network belongs"),
        (lambda: guided_velocity(Net(), None, Guidance(kind="autoguidance")), "without a guide"),
        (lambda: sample(Net(), num=1, guidance=Guidance(), cfg_scale=2.0), "not both"),
        (lambda: sample(Net(), num=1, sampler=Sampler(), steps=7), "not both"),
    ],
)
def test_bad_guidance(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_records_and_words() -> None:
    fields = [{}, {"scale": 2.0}, {"channels": 3}, {"channels": None}, {"interval": (0.1, 1.0)}]
    fields += [{"kind": "autoguidance"}, {"by_step": True}]
    made = [Guidance(**({"scale": 1.5} | change)) for change in fields]
    assert len({json.dumps(guidance.to_record()) for guidance in made}) == len(made)
    assert Guidance().describe() == "no guidance"
    text = Guidance(1.8, None, (0.3, 1.0), by_step=True).describe()
    assert "1.8 on all channels, for 0.3 <= t <= 1" in text and "where the step began" in text
