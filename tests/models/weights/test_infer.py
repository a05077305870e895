"""Networks read off the shapes of their state dicts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.models import (
    DITDH_SIZES,
    DiTDH,
    SiT,
    SongUNet,
    build,
    infer_kwargs,
    infer_sit_kwargs,
    load_model,
)
from tests.support.golden import FOLDER, load
from tests.support.kernels import relative_rms
from tests.support.weights import HEAD, golden


@pytest.mark.parametrize("name", ["sit_0", "repa_0"])
def test_kwargs_from_shapes(name: str) -> None:
    state, _, config = golden(name)
    found = infer_sit_kwargs(state, num_heads=4, encoder_depth=2)
    for ours in ("path_type", "decoder_hidden_size", "use_cfg", "fused_attn"):
        config.pop(ours, None)
    assert config.items() <= found.items()
    assert found["learn_sigma"] == (name == "sit_0")
    model = SiT(**found)
    model.load_state_dict(state, strict=True)
    assert model.clock == ("data_at_1" if name == "sit_0" else "noise_at_1")
    with pytest.raises(ValueError, match="num_heads cannot be read .* width 96"):
        infer_sit_kwargs(state)


def test_kwargs_of_published_widths_and_qk_norm() -> None:
    with torch.device("meta"):
        xl = SiT(input_size=64, depth=2, patch_size=4, mlp_ratio=2.0, num_classes=7)
        normed = SiT(hidden_size=96, depth=1, num_heads=3, qk_norm=True)
    found = infer_sit_kwargs(xl.state_dict())
    assert found.items() <= xl.config.items()
    assert (found["num_heads"], found["patch_size"], found["input_size"]) == (16, 4, 64)
    found = infer_sit_kwargs(normed.state_dict())
    assert (found["num_heads"], found["qk_norm"]) == (3, True)


def test_kwargs_of_something_else() -> None:
    state, _, _ = golden()
    with pytest.raises(ValueError, match="SiT, got one with no pos_embed"):
        infer_sit_kwargs({n: t for n, t in state.items() if n != "pos_embed"}, num_heads=4)
    with pytest.raises(ValueError, match="s_embedder of a DiT-DH"):
        infer_sit_kwargs(state | {"s_embedder.proj.weight": torch.zeros(1)}, num_heads=4)
    with pytest.raises(ValueError, match="must have 16 or, with sigma channels, 32 rows .* got 20"):
        infer_sit_kwargs(state | {HEAD: torch.zeros(20, 96)}, num_heads=4)
    with pytest.raises(ValueError, match="square number of tokens, got 15"):
        infer_sit_kwargs(state | {"pos_embed": torch.zeros(1, 15, 96)}, num_heads=4)


@pytest.mark.parametrize(
    ("listed", "name", "more"),
    [
        ("sit:SiT-XL/2:256", "SiT-XL/2", {}),
        ("sit:SiT-XL/2:512", "SiT-XL/2", {"input_size": 64}),
        ("repa:SiT-XL/2:256", "SiT-XL/2", {"z_dims": [768]}),
        ("rae:DiTDH-XL:256", "DiTDH-XL", {}),
        ("rae:DiTDH-XL:512", "DiTDH-XL", {"input_size": 32}),
    ],
)
def test_published_networks_are_read_off_their_shapes(listed: str, name: str, more: dict) -> None:
    shapes = json.loads((FOLDER / "state_dict_shapes.json").read_text())[listed]
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        class_name, kwargs = infer_kwargs(state)
        model = {"SiT": SiT, "DiTDH": DiTDH}[class_name](**kwargs)
        published = build(name, **more)
    assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == {
        n: tuple(shape) for n, shape in shapes.items()
    }
    assert model.config == published.config


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rope": False, "hidden_size": [384, 768], "num_heads": [6, 12]},
        {"use_rope": False, "use_qknorm": True},
        {"use_pos_embed": False, "patch_size": 2},
        {"use_swiglu": False, "use_rmsnorm": False, "mlp_ratio": 2.0},
        {"wo_shift": True, "depth": [3, 1], "mlp_ratio": 3.0},
    ],
)
def test_ditdh_options_are_read_off_the_shapes(changes: dict[str, Any]) -> None:
    _, _, config = golden("rae_ddt_0")
    with torch.device("meta"):
        model = DiTDH(**config | changes)
        class_name, kwargs = infer_kwargs(model.state_dict())
        assert class_name == "DiTDH" and DiTDH(**kwargs).config == model.config


def test_ditdh_with_one_width() -> None:
    _, _, config = golden("rae_ddt_0")
    with torch.device("meta"):
        state = DiTDH(**config | {"hidden_size": [64, 64], "depth": [3, 1]}).state_dict()
    with pytest.warns(UserWarning, match="took the published 2 head blocks"):
        assert infer_kwargs(state)[1]["depth"] == [2, 2]
    assert infer_kwargs(state, encoder_depth=3)[1]["depth"] == [3, 1]
    with pytest.raises(ValueError, match="4 encoder blocks of 4"):
        infer_kwargs(state, encoder_depth=4)
    assert set(DITDH_SIZES) == {"S", "B", "L", "XL"}


def test_ditdh_that_cannot_be_read() -> None:
    state, _, config = golden("rae_ddt_0")
    bare = {n: t for n, t in state.items() if n != "pos_embed" and "rope" not in n}
    with pytest.raises(ValueError, match="input_size cannot be read"):
        infer_kwargs(bare)
    with pytest.raises(ValueError, match="num_heads cannot be read .* width 64"):
        infer_kwargs(bare | {"pos_embed": state["pos_embed"]})
    with pytest.raises(ValueError, match="DiT-DH, got one with no y_embedder"):
        infer_kwargs({n: t for n, t in state.items() if "y_emb" not in n})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_resolution": 64, "channel_mult": [1, 2, 2, 2]},
        {"in_channels": 4, "out_channels": 4, "attn_resolutions": [], "num_blocks": 1},
        {"model_channels": 32, "channel_mult_emb": 2, "channel_mult_noise": 2},
        {"model_channels": 32, "attn_resolutions": [32, 16], "activate_w_mode": True},
    ],
)
def test_songunet_is_read_off_its_names_and_shapes(options: dict[str, Any]) -> None:
    """All but dropout, which evaluation mode does not need."""
    with torch.device("meta"):
        model = SongUNet(**options)
        class_name, kwargs = infer_kwargs(model.state_dict())
        assert class_name == "SongUNet" and SongUNet(**kwargs).config == model.config


@pytest.mark.parametrize("name", ["songunet_0", "songunet_w_0"])
def test_official_songunet_is_loaded(name: str, tmp_path: Path) -> None:
    """Under the prefix of a Lightning module, with the predictor beside it."""
    g, config = load(name)
    state = {k[6:]: v for k, v in g.items() if k.startswith("state.")}
    held = {f"denoiser.{k}": v for k, v in state.items()} | {"noise_predictor.a": torch.ones(1)}
    torch.save({"state_dict": held}, tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match="without their prefix 'denoiser.'"):
        model = load_model(tmp_path / "last.ckpt")
    assert isinstance(model, SongUNet) and model.clock == "data_at_1"
    out = model(g["x"], g["t"], w=g.get("w"))
    assert relative_rms(out, g["out"]) < 1e-5
    found = inspect_file(tmp_path / "last.ckpt")
    assert found.fits and found.kind == "SongUNet" and "SongUNet of widths 16, 32" in found.model
