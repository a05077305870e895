"""SiT and REPA's SiT against tensors, names and counts of the official classes."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mixflow_fast.models import MODELS, SiT, build, repa_alignment_loss
from mixflow_fast.models.embedders import timestep_sinusoid
from tests.support.golden import FOLDER, load
from tests.support.kernels import relative_rms

PARITY = 1e-5
TOY: dict[str, Any] = {
    "input_size": 8,
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "num_classes": 10,
}


def golden(name: str, **overrides: Any) -> tuple[SiT, dict[str, Tensor]]:
    tensors, config = load(name)
    config.pop("grad_of", None)
    model = SiT(**config | overrides)
    model.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("state.")})
    return model, tensors


def inputs(model: SiT, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    side = model.input_size
    x = torch.linspace(-1, 1, batch * 4 * side * side).reshape(batch, 4, side, side)
    return x, torch.linspace(0.1, 0.9, batch), torch.arange(batch)


@pytest.mark.parametrize("mode", ["train", "eval"])  # no label dropout inside, so both the same
@pytest.mark.parametrize("name", ["sit_0", "repa_0"])
def test_outputs_and_all_gradients(name: str, mode: str) -> None:
    model, g = golden(name)
    model.train(mode == "train")
    model.pos_embed.requires_grad_("grad.pos_embed" in g)
    x = g["x"].clone().requires_grad_()
    out = model(x, g["t"], g["y"])
    loss = torch.zeros(())
    if name == "repa_0":
        out, zs = out
        assert len(zs) == 1
        assert relative_rms(zs[0], g["z0"]) < PARITY
        loss = sum(z.mean() for z in zs)
    assert relative_rms(out, g["out"]) < PARITY
    (loss + (out * g["cotangent"]).sum()).backward()
    gradients = {f"grad.{n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == {key for key in g if key.startswith("grad.")}
    errors = {key: relative_rms(gradient, g[key]) for key, gradient in gradients.items()}
    if "grad_x" in g:
        errors["grad_x"] = relative_rms(x.grad, g["grad_x"])
    assert {key: error for key, error in errors.items() if error >= PARITY} == {}


def test_discarded_sigma_rows_get_no_gradient() -> None:
    model, g = golden("sit_0")
    (model(g["x"], g["t"], g["y"]) * g["cotangent"]).sum().backward()
    truth = g["grad.final_layer.linear.weight"]
    quiet = truth.abs().sum(dim=1) == 0
    assert quiet.sum() == 16
    assert not model.final_layer.linear.weight.grad[quiet].any()


def test_guidance_against_the_official_batch() -> None:
    model, g = golden("sit_0")
    x, t = torch.cat([g["x"], g["x"]]), torch.cat([g["t"], g["t"]])
    y = torch.cat([g["y"], torch.full_like(g["y"], model.null_class)])
    truth = g["out_cfg_1.5"]
    out = model.forward_with_cfg(x, t, y, 1.5)
    assert relative_rms(out, truth) < PARITY
    cond, uncond = model(x, t, y).chunk(2)
    everything = model.forward_with_cfg(x, t, y, 1.5, channels=None)
    assert relative_rms(everything[:, :3], truth[:, :3]) < PARITY
    last = (uncond.double() + 1.5 * (cond.double() - uncond.double()))[:, 3:]
    assert relative_rms(everything[:3, 3:], last) < PARITY
    assert relative_rms(everything[3:, 3:], last) < PARITY
    x[3:] = 7.0  # only the first half is fed
    assert torch.equal(model.forward_with_cfg(x, t, y, 1.5), out)


def test_guidance_and_velocity_of_repa_leave_the_projectors_out() -> None:
    model, g = golden("repa_0")
    model.projectors = torch.nn.ModuleList([torch.nn.Identity()])
    assert relative_rms(model.velocity(g["x"], g["t"], g["y"]), g["out"]) < PARITY
    x, t, y = (torch.cat([g[key], g[key]]) for key in ("x", "t", "y"))
    out = model.forward_with_cfg(x, t, y, 2.0, channels=None)  # equal labels: no change
    assert relative_rms(out[:3], g["out"]) < PARITY


def test_repa_losses_against_the_official_loop() -> None:
    model, g = golden("repa_0")
    loss, _ = load("repa_loss_0")
    t = loss["t_repa"].reshape(-1, 1, 1, 1)
    x_t = (1 - t) * loss["x1"] + t * loss["noise"]
    velocity, zs = model(x_t, loss["t_repa"], g["y"])
    denoising = (velocity - (loss["noise"] - loss["x1"])).square().mean(dim=(1, 2, 3))
    assert relative_rms(denoising, loss["denoising_loss"].reshape(3)) < PARITY
    alignment = repa_alignment_loss(zs, [loss["target_z0"]])
    assert alignment.shape == () and alignment.dtype == torch.float32
    assert relative_rms(alignment.reshape(1), loss["proj_loss"]) < PARITY
    half = repa_alignment_loss([zs[0].bfloat16()], [loss["target_z0"].bfloat16()])
    assert half.dtype == torch.float32


def test_alignment_loss_averages_over_encoders() -> None:
    e = torch.eye(4).reshape(1, 4, 4)
    z, opposite, orthogonal = e * 3, -e, e.roll(1, dims=2)
    assert repa_alignment_loss([z], [e]).item() == pytest.approx(-1)
    assert repa_alignment_loss([z, z], [opposite, orthogonal]).item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="one tensor per encoder, got 2 and 1"):
        repa_alignment_loss([z, z], [e])
    with pytest.raises(ValueError, match=r"targets\[0\] must be .* = \(1, 4, 4\)"):
        repa_alignment_loss([z], [e[:, :3]])


XL = {
    "sit:SiT-XL/2:256": {},
    "sit:SiT-XL/2:512": {"input_size": 64},
    "repa:SiT-XL/2:256": {"z_dims": [768]},
}


@pytest.mark.parametrize("key", XL)
def test_names_shapes_and_order_of_the_official_state_dict(key: str) -> None:
    official = json.loads((FOLDER / "state_dict_shapes.json").read_text())[key]
    with torch.device("meta"):
        model = build("SiT-XL/2", **XL[key])
    state = model.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    assert [(name, list(tensor.shape)) for name, tensor in state.items()] == list(official.items())
    # AdamW's states are numbered in this order; pos_embed is number 0 and frozen.
    assert [name for name, _ in model.named_parameters()] == list(official)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


@pytest.mark.parametrize(
    ("name", "kwargs", "total", "trainable"),
    [
        ("SiT-S/2", {}, 32_963_360, 32_865_056),
        ("SiT-B/2", {}, 130_512_416, 130_315_808),
        ("SiT-L/2", {}, 458_102_816, 457_840_672),
        ("SiT-XL/2", {}, 675_129_632, 674_834_720),
        ("SiT-XL/2", {"input_size": 64, "learn_sigma": False}, 675_995_920, 674_816_272),
        ("SiT-XL/2", {"z_dims": [768]}, 683_242_512, 682_947_600),
        ("SiT-L/2", {"z_dims": [768]}, 465_955_600, None),
        ("SiT-B/2", {"z_dims": [768]}, 137_845_008, None),
    ],
)
def test_published_parameter_counts(
    name: str, kwargs: dict[str, Any], total: int, trainable: int | None
) -> None:
    with torch.device("meta"):
        model = build(name, **kwargs)
    assert sum(p.numel() for p in model.parameters()) == total
    if trainable is not None:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable


def test_initialisation() -> None:
    _, g = golden("sit_0")
    torch.manual_seed(0)
    model = SiT(input_size=8, hidden_size=96, depth=1, num_heads=4, num_classes=999)
    # Equal here; one float32 rounding is left to other maths libraries.
    torch.testing.assert_close(model.pos_embed, g["state.pos_embed"], rtol=0, atol=1.2e-7)
    assert not model(*inputs(model)).any()  # adaLN-Zero
    assert not model.blocks[0].adaLN_modulation[1].weight.any()
    for weight, fans in (
        (model.blocks[0].attn.qkv.weight, 96 + 288),
        (model.blocks[0].mlp.fc1.weight, 96 + 384),
        (model.x_embedder.proj.weight, 16 + 96),
    ):
        bound = math.sqrt(6 / fans)
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[2].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert not any(bias.any() for bias in biases)


def test_meta_model_can_be_materialised_and_initialised() -> None:
    with torch.device("meta"):
        model = SiT(**TOY, qk_norm=True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.initialize_weights()
    assert all(p.isfinite().all() for p in model.parameters())
    assert torch.equal(model.pos_embed, SiT(**TOY).pos_embed)


def test_time_is_embedded_in_float32_in_a_bfloat16_model() -> None:
    t = torch.linspace(0.01, 0.999, 64)
    f = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angles = t.double()[:, None] * f
    truth = torch.cat([angles.cos(), angles.sin()], dim=1)
    assert (timestep_sinusoid(t) - truth).abs().max() < 2e-7

    model = SiT(**TOY).bfloat16()
    seen: list[Tensor] = []
    model.t_embedder.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    out = model(torch.zeros(64, 4, 8, 8), t, torch.zeros(64, dtype=torch.int64))
    assert out.dtype == seen[0].dtype == torch.bfloat16
    # A bfloat16 sinusoid or time changes about a third of the numbers.
    assert (seen[0] != truth.bfloat16()).float().mean() < 0.01


def test_bfloat16_model_stays_near_the_official_output() -> None:
    model, g = golden("sit_0")
    out = model.bfloat16()(g["x"], g["t"], g["y"])
    assert out.dtype == torch.bfloat16
    assert relative_rms(out, g["out"]) < 2e-2


def test_qk_norm_keys_and_scale_invariance() -> None:
    torch.manual_seed(0)
    for qk_norm in (True, False):
        model = SiT(**TOY, qk_norm=qk_norm)
        names = {n for n in model.state_dict() if "_norm" in n}
        both = {f"blocks.{i}.attn.{q}_norm.{w}" for i in range(2) for q in "qk" for w in
                ("weight", "bias")}  # fmt: skip
        assert names == (both if qk_norm else set())
        attention = model.blocks[0].attn
        x = torch.linspace(-3, 3, 2 * 16 * 32).sin().reshape(2, 16, 32) * 5
        before = attention(x)
        with torch.no_grad():
            attention.qkv.weight[:64] *= 4  # q and k
        unchanged = torch.allclose(attention(x), before, rtol=1e-3, atol=1e-4)
        assert unchanged == qk_norm


def test_clock_null_class_and_config() -> None:
    sit, repa = SiT(**TOY), SiT(**TOY, z_dims=[12, 6], encoder_depth=1, projector_dim=16)
    assert (sit.clock, repa.clock) == ("data_at_1", "noise_at_1")
    assert SiT(**TOY, clock="noise_at_1").clock == "noise_at_1"
    assert (sit.null_class, sit.y_embedder.embedding_table.num_embeddings) == (10, 11)
    certain = SiT(**TOY, class_dropout_prob=0.0)
    assert (certain.null_class, certain.y_embedder.embedding_table.num_embeddings) == (None, 10)
    velocity, zs = repa(*inputs(repa))
    assert velocity.shape == (2, 4, 8, 8)
    assert [tuple(z.shape) for z in zs] == [(2, 16, 12), (2, 16, 6)]
    assert not repa.learn_sigma and repa.config["learn_sigma"] is False
    for model in (sit, repa, certain):
        again = SiT(**json.loads(json.dumps(model.config)))
        assert again.config == model.config
        again.load_state_dict(model.state_dict(), strict=True)


def test_compiles_without_graph_breaks() -> None:
    model, g = golden("sit_0")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_rms(compiled(g["x"], g["t"], g["y"]), g["out"]) < PARITY


def test_registry() -> None:
    names = {name for name in MODELS if name.startswith("SiT")}
    assert names == {f"SiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)}
    with torch.device("meta"):
        model = build("SiT-S/8", num_classes=7)
    assert (model.patch_size, len(model.blocks), model.null_class) == (8, 12, 7)
    with pytest.raises(ValueError, match="got 'SiT-XL2'; did you mean 'SiT-XL/2'"):
        build("SiT-XL2")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"input_size": 9}, "input_size must be a multiple of patch_size=2, got 9"),
        ({"num_heads": 5}, "hidden_size must be a multiple of num_heads=5, got 32"),
        ({"hidden_size": 30, "num_heads": 5}, "hidden_size must be a multiple of 4"),
        ({"depth": 0}, "depth must be a positive int, got 0"),
        ({"hidden_size": 32.0}, "hidden_size must be a positive int, got 32.0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"class_dropout_prob": 1.0}, r"class_dropout_prob must be in \[0, 1\), got 1.0"),
        ({"decoder_hidden_size": 768}, "decoder_hidden_size must equal hidden_size=32, got 768"),
        ({"clock": "forward"}, "clock must be one of .* got 'forward'"),
        ({"z_dims": [8]}, r"encoder_depth must be in 1..depth = 1..2, got 8"),
        ({"z_dims": []}, "z_dims must be a non-empty list"),
        ({"z_dims": [8], "encoder_depth": 0}, "encoder_depth must be a positive int, got 0"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SiT(**TOY | kwargs)


def test_bad_inputs() -> None:
    model = SiT(**TOY)
    x, t, y = inputs(model)
    with pytest.raises(ValueError, match=r"x must be .* \(B, 4, 8, 8\), got .*\(2, 4, 16, 16\)"):
        model(torch.zeros(2, 4, 16, 16), t, y)
    with pytest.raises(ValueError, match=r"x must be a floating .* torch.uint8"):
        model(x.byte(), t, y)
    with pytest.raises(ValueError, match=r"t must be \(B,\) = \(2,\) float32, got \(1,\)"):
        model(x, t[:1], y)
    with pytest.raises(ValueError, match="t must be .* torch.bfloat16"):
        model(x, t.bfloat16(), y)
    with pytest.raises(ValueError, match=r"y must be .* torch.int32"):
        model(x, t, y.int())
    with pytest.raises(ValueError, match=r"y must be in 0..10 \(.*null class 10\), got 0..11"):
        model(x, t, torch.tensor([0, 11]))
    with pytest.raises(ValueError, match=r"y must be in 0..9 \(10 classes, no null class\)"):
        SiT(**TOY, class_dropout_prob=0.0)(x, t, torch.tensor([0, 10]))
    with pytest.raises(ValueError, match="x must hold an even batch"):
        model.forward_with_cfg(x[:1], t[:1], y[:1], 1.5)
    with pytest.raises(ValueError, match=r"channels must be in 1..4 or None for all, got 5"):
        model.forward_with_cfg(x, t, y, 1.5, channels=5)
    assert model(x[:0], t[:0], y[:0]).shape == (0, 4, 8, 8)
