"""Source predictors against tensors, names and counts of the official one."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mixflow_fast.models.source_predictor import SourceTable, SourceUNet
from tests.support.golden import load
from tests.support.kernels import relative_rms

PARITY = 1e-5
TOY: dict[str, Any] = {"channels": 2, "widths": (8, 16), "layers": 1, "groups": 4}


def golden(name: str, **options: Any) -> tuple[SourceUNet, dict[str, Tensor], dict[str, Any]]:
    tensors, config = load(name)
    predictor = config["predictor"]
    net = SourceUNet(
        predictor["in_channels"],
        widths=predictor["block_out_channels"],
        layers=predictor["layers_per_block"],
        **options,
    )
    prefix = "state.network."
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    net.load_state_dict(state, strict=True)
    return net, tensors, config


def gradients_off(net: SourceUNet, truth: dict[str, Tensor], prefix: str) -> dict[str, float]:
    """Largest difference by name, relative to the largest gradient of the file: some vanish."""
    top = max(float(v.abs().max()) for key, v in truth.items() if key.startswith(prefix))
    named = {prefix + name: p.grad for name, p in net.named_parameters()}
    return {k: float((g - truth[k]).abs().max()) / top for k, g in named.items() if k in truth}


def test_outputs_and_gradients_of_the_official_network() -> None:
    net, g, config = golden("mixed_unet_0")
    x1 = g["x1"].requires_grad_()
    out = net(x1)
    mean, log_var = out.chunk(2, dim=1)
    assert relative_rms(mean, g["mean"]) < PARITY
    assert relative_rms(log_var, g["log_var"]) < PARITY
    (out * g["cotangent"]).sum().backward()
    assert relative_rms(x1.grad, g["grad_x1"]) < PARITY
    errors = gradients_off(net, g, "grad.network.")
    assert len(errors) > 40
    assert {name: error for name, error in errors.items() if error >= PARITY} == {}
    # Of the gradients that are too large for the file, their norms.
    norms = {name.removeprefix("network."): n for name, n in config["grad_norms"].items()}
    assert norms.keys() == {name for name, _ in net.named_parameters()}
    top = max(norms.values())
    for name, p in net.named_parameters():
        assert abs(float(p.grad.norm()) - norms[name]) < PARITY * top, name


def test_float64() -> None:
    net, g, _ = golden("mixed_unet_0")
    mean, log_var = net.double()(g["x1"].double()).chunk(2, dim=1)
    assert relative_rms(mean, g["mean.f64"]) < 1e-13
    assert relative_rms(log_var, g["log_var.f64"]) < 1e-13


def test_classes_of_the_official_network() -> None:
    """With the names of its parameters in their order; gradients of the loss of x0 at w = 1."""
    net, g, config = golden("mixed_train_class", num_classes=5, size=8)
    assert [f"network.{name}" for name, _ in net.named_parameters()] == config["param_names"]
    mean, log_var = net(g["label"]).chunk(2, dim=1)
    assert relative_rms(mean, g["mean"]) < PARITY
    assert relative_rms(log_var, g["log_var"]) < PARITY
    torch.autograd.backward([mean, log_var], [g["FC.grad_mean"], g["FC.grad_log_var"]])
    errors = gradients_off(net, g, "FC.grad.network.")
    assert len(errors) > 40
    assert {name: error for name, error in errors.items() if error >= PARITY} == {}


def test_released_size_and_config() -> None:
    with torch.device("meta"):
        net = SourceUNet()
        again = SourceUNet(**json.loads(json.dumps(net.config)))
        of_class = SourceUNet(num_classes=10, size=32)
    count = sum(p.numel() for p in net.parameters())
    assert count == 1_899_910
    assert sum(p.numel() for p in of_class.parameters()) == count + 30_720
    shapes = {name: p.shape for name, p in net.named_parameters()}
    assert shapes == {name: p.shape for name, p in again.named_parameters()}
    # Building it does not change what it was built from.
    assert net.config == again.config and net.config["channels"] == 3


@pytest.mark.parametrize("sides", [(16, 16), (7, 12), (5, 5)])
def test_any_resolution(sides: tuple[int, int]) -> None:
    out = SourceUNet(**TOY)(torch.randn(2, 2, *sides))
    assert out.shape == (2, 4, *sides)


def test_data_and_noise_together() -> None:
    out = SourceUNet(**TOY, in_channels=4)(torch.randn(2, 4, 8, 8))
    assert out.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_channels_last(dtype: torch.dtype) -> None:
    net = SourceUNet(**TOY)
    x = torch.randn(2, 2, 8, 8)
    truth = net(x)
    out = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert relative_rms(out, truth) < PARITY
    out = net.to(dtype)(x.to(dtype))
    assert out.dtype == dtype
    assert relative_rms(out.float(), truth) < (0.05 if dtype == torch.bfloat16 else PARITY)


def test_zero_init_begins_at_the_standard_normal() -> None:
    net = SourceUNet(**TOY, zero_init=True)
    out = net(torch.randn(2, 2, 8, 8))
    assert not out.any()
    out.sum().backward()
    assert net.conv_out.weight.grad.any()


@pytest.mark.parametrize("low", [None, 2, 3])
def test_table_is_the_standard_normal_at_first_and_can_learn(low: int | None) -> None:
    table = SourceTable(3, 2, 8, low)
    y = torch.tensor([2, 0])
    out = table(y)
    assert out.shape == (2, 4, 8, 8) and not out.any()
    out.sum().backward()
    gradient = table.table.weight.grad
    assert gradient[[0, 2]].ne(0).all() and not gradient[1].any()
    again = SourceTable(**json.loads(json.dumps(table.config)))
    again.load_state_dict(table.state_dict())


def test_low_resolution_is_bilinear() -> None:
    table = SourceTable(3, 2, 8, 3)
    torch.nn.init.normal_(table.table.weight)
    rows = table.table.weight.view(3, 4, 3, 3)
    truth = torch.nn.functional.interpolate(rows, size=8, mode="bilinear")
    torch.testing.assert_close(table(torch.arange(3)), truth)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"widths\[0\] must be a multiple of groups=32, got 16"):
        SourceUNet(widths=(16, 32))
    with pytest.raises(ValueError, match="num_classes and size belong together"):
        SourceUNet(num_classes=10)
    with pytest.raises(ValueError, match=r"attention_levels must be in 0..1, got 2"):
        SourceUNet(**TOY, attention_levels=(2,))
    with pytest.raises(ValueError, match="kappa must be a floating .* in_channels = 2"):
        SourceUNet(**TOY)(torch.randn(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"kappa must be in 0..4 .*got 0..5"):
        SourceUNet(**TOY, num_classes=5, size=8)(torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"kappa must be \(B,\) int64 labels"):
        SourceTable(3, 2, 8)(torch.randn(2, 2, 8, 8))
    with pytest.raises(ValueError, match="low_resolution must be at most size=8"):
        SourceTable(3, 2, 8, 9)
