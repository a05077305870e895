"""SongUNet against tensors, names and counts of the official network; its dropout; its ways."""

import copy
import inspect
import json

import pytest
import torch
from torch import Tensor

from mixflow_fast.models import SongUNet
from mixflow_fast.models.songunet import positional_embedding
from tests.support.golden import load
from tests.support.kernels import relative_rms

PARITY = 1e-5
TOY: dict[str, object] = {
    "img_resolution": 8,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
    "dropout": 0.25,
}


def golden(name: str, **overrides: object) -> tuple[SongUNet, dict[str, Tensor]]:
    tensors, config = load(name)
    arguments = inspect.signature(SongUNet).parameters
    net = SongUNet(**{k: v for k, v in config.items() if k in arguments} | overrides)
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
    if not net.config["activate_w_mode"]:
        state = {k: v for k, v in state.items() if not k.startswith("map_w.")}
    net.load_state_dict(state, strict=True)
    return net.eval(), tensors


def toy(**overrides: object) -> SongUNet:
    """Small, with weights everywhere: at first the last convolution is zero."""
    torch.manual_seed(0)
    net = SongUNet(**TOY | overrides)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


def inputs(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 8, generator=generator), torch.linspace(0.1, 0.9, batch)


@pytest.mark.parametrize("name", ["songunet_0", "songunet_w_0"])
def test_outputs_and_all_gradients(name: str) -> None:
    net, g = golden(name)
    x = g["x"].requires_grad_()
    w = g["w"].requires_grad_() if "w" in g else None
    out = net(x, g["t"], w=w)
    assert relative_rms(out, g["out"]) < PARITY
    (out * g["cotangent"]).sum().backward()
    named = {f"grad.{n}": p.grad for n, p in net.named_parameters()}
    truth = {key: value for key, value in g.items() if key.startswith("grad.")}
    assert named.keys() == truth.keys()
    # Relative to the largest: some vanish but for rounding (key biases of attention).
    top = max(float(value.abs().max()) for value in truth.values())
    errors = {key: float((named[key] - truth[key]).abs().max()) / top for key in named}
    assert {key: error for key, error in errors.items() if error >= PARITY} == {}
    if w is not None:
        assert relative_rms(x.grad, g["grad_x"]) < PARITY
        assert relative_rms(w.grad, g["grad_w"]) < PARITY


def test_mixing_weight_in_every_form() -> None:
    net, g = golden("songunet_w_0")
    t, batch = torch.full_like(g["t"], 0.25), len(g["x"])
    with torch.no_grad():
        assert relative_rms(net(g["x"], t, w=0.75), g["out_t_scalar_w_float"]) < PARITY
        one = net(g["x"], t, w=torch.tensor(0.75))
        assert relative_rms(one, g["out_t_scalar_w_scalar"]) < PARITY
        plain, _ = golden("songunet_w_0", activate_w_mode=False)
        assert relative_rms(plain(g["x"], g["t"]), g["out_without_w"]) < PARITY
        # Integers count as their floats. The official code makes integers of the frequencies.
        whole = net(g["x"], g["t"], w=g["k"])
        assert torch.equal(whole, net(g["x"], g["t"], w=g["k"].float()))
        assert relative_rms(whole, g["out_w_int"]) > 0.01
        assert torch.equal(net(g["x"], t, w=1), net(g["x"], t, w=torch.ones(batch)))


def test_float64() -> None:
    """To what their float32 frequencies and softmax leave of it."""
    net, g = golden("songunet_w_0")
    net = net.double()
    with torch.no_grad():
        out = net(g["x"].double(), g["t"].double(), w=g["w"].double())
    assert out.dtype == torch.float64
    assert relative_rms(out, g["out_f64w"]) < 2e-7


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 55_732_739),
        ({"img_resolution": 64, "channel_mult": (1, 2, 2, 2)}, 61_804_419),
        ({"activate_w_mode": True}, 55_732_739 + 16_512),
    ],
)
def test_published_sizes(options: dict[str, object], count: int) -> None:
    with torch.device("meta"):
        net = SongUNet(**options)
        again = SongUNet(**json.loads(json.dumps(net.config)))
    assert sum(p.numel() for p in net.parameters()) == count
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in again.state_dict().items()}


def test_starts_at_zero_and_learns() -> None:
    torch.manual_seed(0)
    net = SongUNet(**TOY | {"dropout": 0.0})
    x, t = inputs()
    out = net(x, t)
    assert out.shape == x.shape and not out.any()
    out.sum().backward()
    assert net.dec["8x8_aux_conv"].weight.grad.any()


def test_embedding() -> None:
    values = torch.tensor([0.0, 0.3], dtype=torch.float64)
    out = positional_embedding(values, 4)
    truth = torch.tensor(
        [[1, 1, 0, 0]]
        + [
            [
                f(0.3 * s)
                for f in (torch.cos, torch.sin)
                for s in (torch.ones(()), torch.tensor(1e-4))
            ]
        ]
    ).double()
    torch.testing.assert_close(out, truth, rtol=1e-6, atol=1e-7)


def test_labels_are_not_looked_at() -> None:
    net = toy().eval()
    x, t = inputs()
    with torch.no_grad():
        assert torch.equal(net(x, t, torch.tensor([0, 9, 999, 10**6])), net(x, t))
        assert torch.equal(net.velocity(x, t, torch.zeros(4, dtype=torch.int64)), net(x, t))


def test_dropout_does_not_depend_on_the_batch() -> None:
    """A micro-batch of any split has the bits of the same examples in another."""
    net = toy(model_channels=32)
    x, t = inputs()
    positions = torch.tensor([3, 10, 2**40, 7])
    whole = []
    for split in ([4], [1, 1, 2], [2, 2]):
        parts = []
        for rows in torch.arange(4).split(split):
            net.set_draws(5, positions[rows])
            parts.append(net(x[rows], t[rows]))
        whole.append(torch.cat(parts))
    # Matrix products round by the batch; masks that differ would be far away.
    for other in whole[1:]:
        torch.testing.assert_close(other, whole[0], rtol=1e-4, atol=1e-5)
    net.set_draws(5, positions)
    assert torch.equal(net(x, t), whole[0])
    net.set_draws(6, positions)
    assert relative_rms(net(x, t), whole[0]) > 0.01
    net.set_draws(5, positions + 1)
    assert relative_rms(net(x, t), whole[0]) > 0.01


def test_dropout_masks_are_the_same_bits_in_any_batch() -> None:
    net = toy()
    x, t = inputs()
    seen: list[list[Tensor]] = []
    for block in net.unet_blocks:
        own: list[Tensor] = []
        block.conv1.register_forward_pre_hook(lambda _, given, own=own: own.append(given[0] == 0))
        seen.append(own)
    positions = torch.arange(4) + 2**33
    for rows in (slice(0, 4), slice(0, 1), slice(1, 4)):
        net.set_draws(5, positions[rows])
        net(x[rows], t[rows])
    assert len(seen) == 10
    for whole, first, rest in seen:
        assert torch.equal(torch.cat([first, rest]), whole)
        assert 0.1 < whole.float().mean() < 0.4
    of_one_shape = [whole for whole, _, _ in seen if whole.shape == seen[0][0].shape]
    assert len(of_one_shape) > 1
    assert not torch.equal(of_one_shape[0], of_one_shape[1])


def test_dropout_is_of_training_alone_and_needs_draws() -> None:
    net = toy()
    x, t = inputs()
    with pytest.raises(ValueError, match=r"needs set_draws\(seed, positions\)"):
        net(x, t)
    state = torch.random.get_rng_state()
    with torch.no_grad():
        truth = toy(dropout=0.0)(x, t)
        torch.random.set_rng_state(state)
        assert torch.equal(net.eval()(x, t), truth)
        net.set_draws(5, torch.arange(4))
        assert torch.equal(net(x, t), truth)
        net.train()
        assert relative_rms(net(x, t), truth) > 0.01
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's own is not touched
    with pytest.raises(ValueError, match="set_draws was given 4 positions, the batch has 2"):
        net(x[:2], t[:2])
    assert copy.deepcopy(net)._draws is None


@pytest.mark.parametrize("options", [{"checkpointing": "full"}, {"mode": "compile"}])
def test_ways_of_running_compute_the_same(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = toy()
    x, t = inputs()
    if "mode" in options:  # what is compiled, and not what a compiler makes of it
        compile_ = torch.compile
        monkeypatch.setattr(
            torch,
            "compile",
            lambda fn, options=None, **kwargs: compile_(fn, backend="aot_eager", **kwargs),
        )
    found = []
    for way in ({}, options):
        net.set_execution(**way).zero_grad()
        net.set_draws(5, torch.arange(4))
        out = net(x, t)
        out.square().sum().backward()
        found.append((out, net.enc["8x8_conv"].weight.grad.clone()))
    for plain, other in zip(found[0], found[1], strict=True):
        assert relative_rms(other, plain) < PARITY
    assert copy.deepcopy(net).execution == net.execution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_channels_last(dtype: torch.dtype) -> None:
    net = toy().eval()
    x, t = inputs()
    with torch.no_grad():
        truth = net(x, t)
        net = net.to(memory_format=torch.channels_last)
        out = net(x.to(memory_format=torch.channels_last), t)
        assert relative_rms(out, truth) < PARITY
        out = net.to(dtype)(x, t)  # times stay float32
    assert out.dtype == dtype
    assert relative_rms(out.float(), truth) < (0.05 if dtype == torch.bfloat16 else PARITY)


def test_refusals() -> None:
    for options, message in (
        ({"label_dim": 10}, "label_dim must be 0, got 10"),
        ({"resample_filter": (1, 3, 3, 1)}, r"resample_filter must be \[1, 1\]"),
        ({"out_channels": 6}, "out_channels must be in_channels = 3"),
        ({"img_resolution": 9}, "img_resolution must be a multiple of 2 for 2 levels, got 9"),
        ({"model_channels": 6}, "model_channels must be a multiple of 4"),
        ({"channel_mult": (1, 0)}, r"channel_mult\[1\] must be a positive int, got 0"),
        ({"attn_resolutions": (4, 16)}, r"must be sides of levels \(8, 4\), got 16"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            SongUNet(**TOY | options)
    net = toy().eval()
    x, t = inputs()
    for way in ({"mode": "fused"}, {"mode": "graph"}, {"attention": "cudnn"},
                {"checkpointing": "selective"}):  # fmt: skip
        with pytest.raises(ValueError, match="is not for SongUNet"):
            net.set_execution(**way)
    with pytest.raises(ValueError, match="w has no meaning"):
        net(x, t, w=0.5)
    with pytest.raises(ValueError, match="w must be given"):
        toy(activate_w_mode=True).eval()(x, t)
    with pytest.raises(ValueError, match=r"t must be \(B,\) = \(4,\) float32"):
        net(x, t.bfloat16())
    with pytest.raises(ValueError, match="x must be a floating"):
        net(x[:, :, :4], t)
    with pytest.raises(ValueError, match=r"positions must be \(B,\) int64"):
        net.set_draws(0, torch.zeros(4))
