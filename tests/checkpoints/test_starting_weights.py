"""`train.init`: what does not fit is told as what it is, with settings that make it fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.starting_weights import start_from
from mixflow_fast.config.loading import load_config
from mixflow_fast.models import DiTDH, SiT, Transformer, build, save_weights
from mixflow_fast.training.build import build_model
from tests.support.weights import golden, network, same

BASE = ["data.path=none", "train.init=none", "out=none"]
NO_ENCODER = ["encoder.kind=none"]


def on_meta(recipe: str, settings: list[str]) -> Transformer:
    """The network of a recipe without storage; its names and shapes are what is compared."""
    return build_model(load_config(recipe, [*BASE, *settings]).model, "meta")


def write(path: Path, name: str, **kwargs: object) -> Path:
    """A published network in a file, one value repeated: the shapes are what matters."""
    with torch.device("meta"):
        state = build(name, **kwargs).state_dict()
    zero = torch.zeros(1)
    torch.save({"ema": {n: zero.expand(t.shape) for n, t in state.items()}}, path)
    return path


SMALL = ["model.name=SiT-S/2", "model.depth=1"]
# Recipe, its settings, what the checkpoint is, words of the refusal.
MISFITS = {
    "size": (
        *("sit-xl2-256", [], ("SiT-S/2", {})),
        "is SiT-S/2, 256 px (384 wide, 12 blocks); the recipe makes SiT-XL/2, 256 px (1152 wide, "
        "28 blocks): set model.name=SiT-S/2",
    ),
    "patch": (
        *("sit-xl2-256", ["model.name=SiT-S/2"], ("SiT-S/4", {})),
        "is SiT-S/4, 256 px (patch 4); the recipe makes SiT-S/2, 256 px (patch 2): set "
        "model.name=SiT-S/4",
    ),
    "sizes of nobody": (
        *("sit-xl2-256", ["model.name=SiT-S/2"], ("SiT-S/2", {"depth": 1})),
        "(1 blocks); the recipe makes SiT-S/2, 256 px (12 blocks): set model.depth=1",
    ),
    "depth of a width of nobody": (
        *("sit-xl2-256", ["model.name=SiT-S/2", "model.hidden_size=96", "model.num_heads=4"]),
        ("SiT-S/2", {"depth": 2, "hidden_size": 96, "num_heads": 4}),
        "(12 blocks): set model.depth=2",
    ),
    "resolution": (
        *("sit-xl2-256", SMALL, ("SiT-S/2", {"depth": 1, "input_size": 64})),
        "(input_size 64); the recipe makes SiT of width 384, depth 1, 256 px (input_size 32): set "
        "model.input_size=64",
    ),
    "channels and classes": (
        *("sit-xl2-256", SMALL, ("SiT-S/2", {"depth": 1, "in_channels": 16, "num_classes": 10})),
        "set model.in_channels=16 model.num_classes=10",
    ),
    "projectors": (
        *("sit-xl2-256", ["model.name=SiT-S/2"], ("SiT-S/2", {"z_dims": [768]})),
        "is REPA SiT-S/2, 256 px (projectors to 768); the recipe makes SiT-S/2, 256 px: set "
        "model.z_dims=[768] model.projector_dim=2048, or take a recipe of its kind, such as "
        "repa-xl2-256",
    ),
    "no projectors": (
        *("repa-xl2-256", ["model.depth=1", "model.encoder_depth=1", "data.features=f.npy"]),
        ("SiT-XL/2", {"depth": 1}),
        "set model.z_dims=null model.encoder_depth=null model.projector_dim=null "
        "objective.alignment_weight=0 data.features=null teacher.path=null, or take a recipe of "
        "its kind, such as sit-xl2-256",
    ),
    "SiT for DiT-DH": (
        *("rae-xl-256", NO_ENCODER, ("SiT-S/2", {})),
        "set model.name=SiT-S/2 model.in_channels=4 model.input_size=32, or take a recipe of its "
        "kind, such as sit-xl2-256",
    ),
    "DiT-DH for SiT": (
        *("sit-xl2-256", [], ("DiTDH-S", {})),
        "(384+2048 wide, 12+2 blocks, patch 1, 768 channels, input_size 16); the recipe makes "
        "SiT-XL/2, 256 px (1152 wide, 28 blocks, patch 2, 4 channels, input_size 32): set "
        "model.name=DiTDH-S model.learn_sigma=null model.in_channels=768 model.input_size=16, or "
        "take a recipe of its kind, such as rae-xl-256",
    ),
    "size of DiT-DH": (
        *("rae-xl-256", NO_ENCODER, ("DiTDH-S", {})),
        "set model.name=DiTDH-S",
    ),
    "norms of q and k": (
        *("sit-xl2-256", SMALL, ("SiT-S/2", {"depth": 1, "qk_norm": True})),
        "set model.qk_norm=true",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_told_with_settings_that_mend_it(name: str, tmp_path: Path) -> None:
    recipe, settings, (checkpoint, kwargs), words = MISFITS[name]
    path = write(tmp_path / "x.pt", checkpoint, **kwargs)
    with pytest.raises(ValueError, match=re.escape(f"train.init={path} is ")) as caught:
        start_from(on_meta(recipe, settings), path)
    text = str(caught.value)
    assert words in text and "missing" not in text
    told = re.search(r": set ([^,]*(?:\[[\d,]*\][^,]*)*)", text)[1].split()
    keys = [setting.partition("=")[0] for setting in told]
    kept = [setting for setting in settings if setting.partition("=")[0] not in keys]
    mended = on_meta(recipe, [*kept, *told])
    with torch.device("meta"):
        expected = build(checkpoint, **kwargs).state_dict()
    shapes = {n: t.shape for n, t in mended.state_dict().items()}
    head = "final_layer.linear."  # sigma channels are dropped or added when weights are loaded
    assert {n: s for n, s in shapes.items() if head not in n} == {
        n: t.shape for n, t in expected.items() if head not in n
    }


def test_heads_that_the_shapes_do_not_tell(tmp_path: Path) -> None:
    state, _, config = golden()
    torch.save(state, tmp_path / "x.pt")
    model = SiT(**config)
    start_from(model, tmp_path / "x.pt")
    assert same(dict(model.state_dict()), state)
    with pytest.raises(ValueError, match="model.hidden_size=96 .*model.num_heads=N .the shapes do"):
        start_from(SiT(**config | {"hidden_size": 192}), tmp_path / "x.pt")


def test_what_no_setting_makes(tmp_path: Path) -> None:
    state, _, config = golden("rae_ddt_0")
    torch.save(state, tmp_path / "x.pt")
    model = DiTDH(**config | {"use_rope": False})
    with pytest.raises(ValueError, match="it has use_rope=True, which no setting makes: choose"):
        start_from(model, tmp_path / "x.pt")


def test_a_table_without_null_class(tmp_path: Path) -> None:
    """As many rows as one with it and a class less; an official file does not say which."""
    state = network(class_dropout_prob=0).state_dict()
    torch.save(state, tmp_path / "x.pt")
    model = network(class_dropout_prob=0)
    start_from(model, tmp_path / "x.pt")
    recorded = {"clock": model.clock, "model": json.dumps(model.config)}
    save_weights(tmp_path / "ours.pt", state, state, recorded)
    with pytest.raises(ValueError, match=r"set model.class_dropout_prob=0$"):
        start_from(network(), tmp_path / "ours.pt")


def test_missing_tensors_are_listed_with_the_file(tmp_path: Path) -> None:
    state = network().state_dict()
    state.pop("t_embedder.mlp.2.bias")
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="train.init=.*x.pt: .*1 missing: t_embedder.mlp.2.bias"):
        start_from(network(), tmp_path / "x.pt")


def test_another_kind_of_network_is_named(tmp_path: Path) -> None:
    torch.save(
        {"encoder.conv_in.weight": torch.ones(1), "decoder.x": torch.ones(1)}, tmp_path / "v"
    )
    with pytest.raises(ValueError, match="v is an autoencoder .VAE., .* give the checkpoint of"):
        start_from(network(), tmp_path / "v")


SONGUNET = ["model.name=SongUNet-CIFAR10", "model.in_channels=3", "model.learn_sigma=null"]
SONGUNET += ["model.depth=1", "model.hidden_size=32", "train.label_dropout=0"]
SMALL_SONGUNET = {"model_channels": 32, "num_blocks": 1}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (SMALL_SONGUNET, ""),
        (SMALL_SONGUNET | {"dropout": 0.0}, ""),
        ({}, "is SongUNet-CIFAR10, 32 px; the recipe makes SongUNet of widths 64, 64, 64, 32 px: "
             "set model.hidden_size=128 model.depth=4"),
        (SMALL_SONGUNET | {"channel_mult": [1, 2], "attn_resolutions": [32]},
         "set model.channel_mult=[1,2] model.attn_resolutions=[32]"),
        (SMALL_SONGUNET | {"activate_w_mode": True}, "it has activate_w_mode=True, which no"),
    ],
)  # fmt: skip
def test_songunets(kwargs: dict, words: str, tmp_path: Path) -> None:
    net = on_meta("sit-xl2-256", SONGUNET).to_empty(device="cpu")
    path = write(tmp_path / "x.pt", "SongUNet-CIFAR10", **kwargs)
    if not words:
        start_from(net, path)
        assert all(bool((tensor == tensor.flatten()[0]).all()) for tensor in net.parameters())
        return
    with pytest.raises(ValueError, match=re.escape(words)):
        start_from(net, path)


def test_a_songunet_is_no_transformer(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", "SiT-S/2")
    with pytest.raises(ValueError, match="is SiT-S/2, 256 px; .* take a recipe of a SiT-S"):
        start_from(on_meta("sit-xl2-256", SONGUNET).to_empty(device="cpu"), path)
    path = write(tmp_path / "y.pt", "SongUNet-CIFAR10", **SMALL_SONGUNET)
    with pytest.raises(ValueError, match="is SongUNet of widths .* recipe of a SongUNet"):
        start_from(on_meta("sit-xl2-256", ["model.name=SiT-S/2"]), path)
