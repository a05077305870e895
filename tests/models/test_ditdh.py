"""DiT-DH against tensors, names and counts of the official class."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from mixflow_fast.models import MODELS, DiTDH, build
from mixflow_fast.models.blocks import rotate
from mixflow_fast.models.embedders import rope_tables
from tests.support.golden import FOLDER, load
from tests.support.kernels import relative_rms

PARITY = 1e-5
TOY: dict[str, Any] = {
    "input_size": 4,
    "in_channels": 6,
    "hidden_size": [32, 48],
    "depth": [2, 1],
    "num_heads": [2, 4],
    "num_classes": 5,
}


def golden(**overrides: Any) -> tuple[DiTDH, dict[str, Tensor]]:
    tensors, config = load("rae_ddt_0")
    model = DiTDH(**config | overrides)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})
    return model, tensors


def test_output_and_all_gradients() -> None:
    model, g = golden()
    x = g["x"].clone().requires_grad_()
    out = model(x, g["t"], g["y"])
    assert relative_rms(out, g["out"]) < PARITY
    (out * g["cotangent"]).sum().backward()
    gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == {key for key in g if key.startswith("grad.")}
    errors = {key: relative_rms(gradient, g[key]) for key, gradient in gradients.items()}
    errors["grad_x"] = relative_rms(x.grad, g["grad_x"])
    assert {key: error for key, error in errors.items() if error >= PARITY} == {}


def test_guidance_in_an_interval_against_the_official_batch() -> None:
    model, g = golden()
    x, t = torch.cat([g["x"]] * 2), torch.cat([g["t"]] * 2)
    y = torch.cat([g["y"], torch.full_like(g["y"], model.null_class)])
    truth = g["out_cfg_1.5_interval_0.1_0.9"]
    out = model.forward_with_cfg(x, t, y, 1.5, None, (0.1, 0.9))
    assert relative_rms(out, truth) < PARITY
    inside = (g["t"] >= 0.1) & (g["t"] <= 0.9)
    assert inside.any()
    nowhere = model.forward_with_cfg(x, t, y, 1.5, None, (0.95, 0.96))
    assert relative_rms(nowhere[:3], model(g["x"], g["t"], g["y"])) < PARITY


@pytest.mark.parametrize("size", [256, 512])
def test_names_shapes_and_order_of_all_382_tensors(size: int) -> None:
    expected = json.loads((FOLDER / "state_dict_shapes.json").read_text())[f"rae:DiTDH-XL:{size}"]
    with torch.device("meta"):
        model = build("DiTDH-XL", input_size=size // 16)
    ours = [(name, list(tensor.shape)) for name, tensor in model.state_dict().items()]
    assert len(ours) == 382
    assert ours == list(expected.items())


@pytest.mark.parametrize(
    ("name", "side", "every", "trainable"),
    [
        ("DiTDH-S", 16, 196_455_764, 196_357_204),
        ("DiTDH-B", 16, 294_295_892, 294_099_028),
        ("DiTDH-L", 16, 621_744_436, 621_482_036),
        ("DiTDH-XL", 16, 838_675_796, 838_380_628),
        ("DiTDH-XL", 32, 839_560_532, 838_380_628),
        ("DiTDH-S", 32, 196_750_676, 196_357_204),
    ],
)
def test_counts(name: str, side: int, every: int, trainable: int) -> None:
    with torch.device("meta"):
        model = build(name, input_size=side)
    assert sum(p.numel() for p in model.parameters()) == every
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_embeddings_are_frozen_unless_asked() -> None:
    frozen = {n for n, p in DiTDH(**TOY).named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "t_embedder.W"}
    model, g = golden(train_embeddings=True)
    assert all(p.requires_grad for p in model.parameters())
    model(g["x"], g["t"], g["y"]).sum().backward()
    assert model.pos_embed.grad.any() and model.t_embedder.W.grad.any()


def test_head_of_5461_is_padded_without_a_trace() -> None:
    """The published head at its own width: 5461 -> 5504 columns inside, the same function."""
    torch.manual_seed(0)
    config = TOY | {"hidden_size": [32, 2048], "num_heads": [2, 16], "input_size": 2}
    model = DiTDH(**config)
    mlp = model.blocks[-1].mlp
    assert mlp.w12.out_features == 2 * 5461
    x, out, gradients, names = torch.randn(2, 3, 2048), {}, {}, list(model.state_dict())
    cotangent = torch.randn(2, 3, 2048)
    for mode in ("eager", "compile"):
        model.set_execution(mode=mode)
        width = mlp.weights()[0].shape[0]
        assert width == {"eager": 2 * 5461, "compile": 2 * 5504}[mode]
        out[mode] = mlp(x)
        gradients[mode] = torch.autograd.grad(out[mode], mlp.parameters(), cotangent)
        assert list(model.state_dict()) == names
    assert relative_rms(out["compile"], out["eager"]) < 1e-6
    for ours, plain in zip(*gradients.values(), strict=True):
        assert relative_rms(ours, plain) < 1e-6


def test_half_precision_keeps_frequencies_and_angles() -> None:
    model = DiTDH(**TOY)
    w, cos = model.t_embedder.W.clone(), model.enc_feat_rope.freqs_cos.clone()
    model.bfloat16()
    assert torch.equal(model.t_embedder.W, w) and torch.equal(model.enc_feat_rope.freqs_cos, cos)
    assert model.t_embedder.mlp[0].weight.dtype == torch.bfloat16
    x, t, y = torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.8]), torch.tensor([0, 5])
    assert model(x, t, y).dtype == torch.bfloat16
    assert model.double().t_embedder.W.dtype == torch.float64


def test_rope_is_a_rotation_by_row_and_column() -> None:
    """cos and sin tables against complex multiplication in float64."""
    side, head_dim = 3, 8
    x = torch.randn(1, 1, side * side, head_dim, dtype=torch.float64)
    ours = rotate(x, *rope_tables(head_dim, side))
    frequencies = 10000.0 ** (-torch.arange(2, dtype=torch.float64) / 2)
    token = torch.arange(side * side)
    angles = [(axis[:, None] * frequencies) for axis in (token // side, token % side)]
    turn = torch.polar(torch.ones(9, 4, dtype=torch.float64), torch.cat(angles, dim=1))
    truth = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    assert relative_rms(ours, truth) < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {"use_qknorm": True},
        {"use_qknorm": True, "use_rmsnorm": False},
        {"use_swiglu": False},
        {"use_rope": False},
        {"wo_shift": True},
        {"use_pos_embed": False},
        {"hidden_size": 32, "depth": 1, "num_heads": 2},
    ],
    ids=str,
)
def test_the_official_switches(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    model = DiTDH(**TOY | options)
    names = set(model.state_dict())
    assert ("blocks.0.attn.q_norm.weight" in names) == options.get("use_qknorm", False)
    assert ("enc_feat_rope.freqs_cos" in names) == options.get("use_rope", True)
    assert ("pos_embed" in names) == options.get("use_pos_embed", True)
    assert ("blocks.0.mlp.fc1.weight" in names) != options.get("use_swiglu", True)
    assert ("s_projector.weight" in names) != (options.get("hidden_size") == 32)
    parts = model.blocks[0].adaLN_modulation[1].out_features // 32
    assert parts == (4 if options.get("wo_shift") else 6)
    again = DiTDH(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        for p in [*model.parameters()]:
            p.add_(0.05 * torch.randn_like(p))  # adaLN-Zero would hide the blocks
    x, t, y = torch.randn(2, 6, 4, 4), torch.tensor([0.2, 0.8]), torch.tensor([0, 5])
    eager = model(x, t, y)
    assert eager.std() > 0
    fused = model.set_execution(mode="fused", compiled=False)(x, t, y)
    assert relative_rms(fused, eager.detach()) < PARITY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": [32, 48, 64]}, r"hidden_size .* pair"),
        ({"num_heads": [3, 4]}, "multiple of num_heads=3"),
        ({"num_heads": [16, 4]}, "multiple of 4 for use_rope"),
        ({"depth": [2, 0]}, "depth of the head"),
        ({"patch_size": 3}, "multiple of patch_size"),
        ({"clock": "noise"}, "clock must be one of"),
        ({"mlp_ratio": 0}, "mlp_ratio"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTDH(**TOY | options)


def test_registry_has_it() -> None:
    assert {name for name in MODELS if name.startswith("DiTDH")} == {
        f"DiTDH-{size}" for size in ("S", "B", "L", "XL")
    }
    with pytest.raises(ValueError, match="did you mean 'DiTDH-XL'"):
        build("DiTDH-XXL")
