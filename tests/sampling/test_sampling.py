"""Solvers against the official integrators' output and closed forms; samples as pure functions."""

import io
import math

import pytest
import torch
from golden_files import load
from torch import Tensor, nn

from mixflow_fast.kernels.philox import Stream, normal, uniform
from mixflow_fast.models.sit import SiT
from mixflow_fast.reports.images import grid_png_bytes, save_grid, to_uint8
from mixflow_fast.sampling.guidance import model_velocity
from mixflow_fast.sampling.samples import draw_labels, sample
from mixflow_fast.sampling.solvers import integrate, time_grid


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


class Net(nn.Module):
    """A small network with labels in the engine's clock; batch rows do not interact."""

    def __init__(self, classes: int = 5, channels: int = 4, null: bool = True) -> None:
        super().__init__()
        self.clock = "data_at_1"
        self.null_class = classes if null else None
        self.config = {"in_channels": channels, "input_size": 6, "num_classes": classes}
        weight = normal(3, Stream.INIT, torch.arange(channels), channels * 9)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv.weight.data = weight.view(channels, channels, 3, 3) * 0.2
        self.conv.bias.data.zero_()
        self.embed = nn.Embedding(classes + 1, channels)
        self.embed.weight.data = normal(4, Stream.INIT, torch.arange(classes + 1), channels)
        self.dropout = nn.Dropout(0.5)
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.rows.append(x.shape[0])
        condition = self.embed(y)[:, :, None, None]
        return self.dropout(torch.tanh(self.conv(x)) + condition * t[:, None, None, None])


class Mirrored(nn.Module):
    """The same network as a REPA user has it: t = 1 is noise, velocity x0 - x1, output a pair."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net, self.clock = net, "noise_at_1"
        self.null_class, self.config = net.null_class, net.config

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        return -self.net(x, 1 - t, y), [x]


@pytest.mark.parametrize(
    ("name", "method", "tolerance"),
    [
        ("ode_euler_10", "euler", 1e-6),
        ("ode_heun2_10", "heun", 1e-6),
        ("ode_dopri5_5", "dopri5", 1e-5),
    ],
)
def test_official_integrators(name: str, method: str, tolerance: float) -> None:
    if method == "dopri5":
        pytest.importorskip("torchdiffeq")
    tensors, config = load(name)
    steps = config["num_steps"] - 1  # theirs counts grid points
    out, nfe = integrate(
        lambda x, t: torch.tanh(0.7 * x) + 0.3 * t[:, None, None, None],
        tensors["z"],
        time_grid(steps),
        method,
    )
    assert out.dtype == torch.float32
    assert relative(out, tensors["out"]) < tolerance
    if method != "dopri5":
        assert nfe == {"euler": 9, "heun": 18}[method]
    else:
        assert nfe > 6


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_order_of_convergence(method: str, order: int, shift: float) -> None:
    """dx/dt = x cos(5 t) has x(1) = x(0) exp(sin(5) / 5); the error falls as h^order."""
    x0 = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    truth = x0 * math.exp(math.sin(5.0) / 5.0)
    errors = []
    for steps in (64, 128):
        out, nfe = integrate(
            lambda x, t: x * torch.cos(5.0 * t.double())[:, None],
            x0,
            time_grid(steps, shift),
            method,
        )
        assert out.dtype == torch.float64 and nfe == steps * order
        errors.append(relative(out, truth))
    assert errors[1] > 1e-7  # above the rounding of the float32 times
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_dopri5_closed_form() -> None:
    pytest.importorskip("torchdiffeq")
    calls = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t.shape)
        assert t.dtype == torch.float32
        return x * torch.cos(3.0 * t.double())[:, None]

    x0 = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    out, nfe = integrate(velocity, x0, time_grid(1), "dopri5")
    assert nfe == len(calls) and set(calls) == {(2,)}
    # Six evaluations a step, each step within rtol = 1e-3, growing by at most exp(1/3) afterwards.
    bound = nfe / 6 * 1e-3 * math.exp(1 / 3)
    assert relative(out, x0 * math.exp(math.sin(3.0) / 3.0)) < bound < 0.01


def test_time_grid() -> None:
    torch.testing.assert_close(time_grid(4), torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    grid = time_grid(4, shift=6.92820323)
    assert grid[0] == 0 and grid[-1] == 1 and (grid.diff() > 0).all()
    # RAE's table: k = 6.928 maps 0.5 to 0.87387 in the clock where 1 is noise.
    assert float(grid[2]) == pytest.approx(1 - 0.87387, abs=1e-5)


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


def test_samples_are_a_function_of_seed_and_id() -> None:
    net = Net()
    arguments = dict(steps=3, cfg_scale=1.5, batch_size=4)
    full = sample(net, num=11, **arguments)
    assert full.x.shape == (11, 4, 6, 6) and full.x.dtype == torch.float32 and full.nfe == 3
    again = sample(net, num=5, **arguments)
    assert torch.equal(again.x, full.x[:5]) and torch.equal(again.labels, full.labels[:5])
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
        ({"method": "rk4"}, "method must be one of euler, heun, dopri5"),
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


def test_pixels() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 9.0, 126.6 / 127.5 - 1, 126.4 / 127.5 - 1, -0.2])
    # 127.5 (x + 1) rounded to the nearest, and x = 0, half way, upwards.
    assert to_uint8(x.view(1, 1, 2, 4)).flatten().tolist() == [0, 0, 128, 255, 255, 127, 126, 102]
    rgb = torch.arange(3.0).view(3, 1, 1).expand(3, 2, 5) - 1
    assert to_uint8(rgb).shape == (2, 5, 3) and to_uint8(rgb)[1, 4].tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="finite"):
        to_uint8(torch.full((1, 1, 1), math.nan))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels: int) -> None:
    from PIL import Image

    images = torch.linspace(-1, 0.9, 5 * channels * 2 * 3).view(5, channels, 2, 3)
    path = tmp_path / "new" / "grid.png"
    save_grid(path, images, columns=2, scale=4, padding=3)
    assert path.read_bytes() == grid_png_bytes(images, 2, 4, 3)
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    grid = Image.open(io.BytesIO(path.read_bytes()))
    assert grid.mode == {1: "L", 3: "RGB"}[channels]
    assert grid.size == (2 * 12 + 3, 3 * 8 + 2 * 3)
    covered = set()
    for index in range(5):
        top, left = (index // 2) * (8 + 3), (index % 2) * (12 + 3)
        for row in range(8):
            for column in range(12):
                pixel = grid.getpixel((left + column, top + row))
                expected = to_uint8(images[index])[row // 4, column // 4].tolist()
                assert pixel == (expected[0] if channels == 1 else tuple(expected))
                covered.add((left + column, top + row))
    white = 255 if channels == 1 else (255, 255, 255)
    for x in range(grid.width):
        for y in range(grid.height):
            assert (x, y) in covered or grid.getpixel((x, y)) == white


def test_grid_errors() -> None:
    with pytest.raises(ValueError, match="decode latents"):
        grid_png_bytes(torch.zeros(1, 4, 2, 2), 1)
    for bad in ({"columns": 0}, {"columns": 1, "scale": 0}, {"columns": 1, "padding": -1}):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            grid_png_bytes(torch.zeros(1, 1, 2, 2), **bad)
