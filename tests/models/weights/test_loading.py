"""Weight files in the official layouts, read and written."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.models import (
    DiTDH,
    SiT,
    export_official_sit,
    load_into,
    load_model,
    load_weights,
    save_weights,
)
from tests.support.weights import HEAD, OFFICIAL, golden, same, shifted


def test_reads_an_official_training_checkpoint(tmp_path: Path) -> None:
    state, _, _ = golden()
    raw = {f"module._orig_mod.{name}": tensor for name, tensor in shifted(state).items()}
    official = {
        "model": raw,
        "ema": state,
        "opt": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "args": argparse.Namespace(model="SiT-XL/2", image_size=256, ckpt=None),
    }
    path = tmp_path / "0400000.pt"
    torch.save(official, path)
    assert same(load_weights(path), state)
    assert same(load_weights(path, key="model"), shifted(state))
    with pytest.raises(ValueError, match="no weights under 'online', got .*'ema', 'model'"):
        load_weights(path, key="online")
    del official["ema"]
    torch.save(official, path)
    with pytest.warns(UserWarning, match="no 'ema' weights: took 'model'"):
        assert same(load_weights(path), shifted(state))


def test_reads_bare_dicts_in_every_layout(tmp_path: Path) -> None:
    state, _, _ = golden()
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "a.safetensors")
    for name in ("zip.pt", "legacy.pt", "a.safetensors"):
        read = load_weights(tmp_path / name)
        assert same(read, state)
        (tmp_path / name).write_bytes(b"")  # what was read does not hang on the file
        assert same(read, state)


def test_renames_legacy_repa_blocks(tmp_path: Path) -> None:
    state, _, config = golden("repa_0")
    depth = config["encoder_depth"]
    legacy = {
        (f"decoder_blocks.{int(n.split('.')[1]) - depth}.{n.split('.', 2)[2]}"
         if n.startswith("blocks.") and int(n.split(".")[1]) >= depth else n): tensor
        for n, tensor in state.items()
    }  # fmt: skip
    assert sum(name.startswith("decoder_blocks.0.") for name in legacy) == 10
    path = tmp_path / "last.pt"
    torch.save({"ema": legacy}, path)
    for given in (None, depth):
        load_into(SiT(**config), load_weights(path, encoder_depth=given))
        assert same(load_weights(path, encoder_depth=given), state)
    with pytest.raises(ValueError, match="encoder_depth must be .* = 2, got 1"):
        load_weights(path, encoder_depth=1)


def test_head_conversion_keeps_the_official_output() -> None:
    state, g, config = golden()
    short = export_official_sit(state)
    assert short[HEAD].shape == (16, 96) and short["final_layer.linear.bias"].shape == (16,)
    kept = [r for r in range(32) if r % 8 < 4]
    assert torch.equal(short[HEAD], state[HEAD][kept])
    assert same(export_official_sit(short), short)
    for source in (state, short):
        for learn_sigma in (True, False):
            model = SiT(**config | {"learn_sigma": learn_sigma})
            load_into(model, source)
            error = (model(g["x"], g["t"], g["y"]) - g["out"]).norm() / g["out"].norm()
            assert error < 1e-5
    grown = SiT(**config)
    load_into(grown, short)
    dropped = [r for r in range(32) if r % 8 >= 4]
    assert not grown.state_dict()[HEAD][dropped].any()
    assert torch.equal(grown.state_dict()[HEAD][kept], short[HEAD])


def test_load_into_reports_everything_once_and_changes_nothing() -> None:
    state, _, config = golden()
    model = SiT(**config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bad = dict(state)
    for name in [n for n in state if n.startswith("blocks.2.")]:
        del bad[name]
    bad["projectors.0.0.bias"] = torch.zeros(8)
    bad["pos_embed"] = torch.zeros(1, 64, 96)
    with pytest.raises(ValueError) as caught:
        load_into(model, bad)
    message = str(caught.value)
    assert "10 missing: blocks.2.attn.qkv.weight" in message and "... (10 in all)" in message
    assert "1 unexpected: projectors.0.0.bias" in message
    assert "1 mis-shaped: pos_embed (1, 64, 96) instead of (1, 16, 96)" in message
    with pytest.raises(ValueError, match="mis-shaped"):
        load_into(model, bad, strict=False)
    assert same(model.state_dict(), before)


def test_not_strict_starts_repa_from_sit_weights() -> None:
    state, _, config = golden()
    model = SiT(**config, z_dims=[8], encoder_depth=1, projector_dim=16)
    missing, unexpected = load_into(model, state, strict=False)
    assert len(missing) == 6 and all(name.startswith("projectors.0.") for name in missing)
    assert unexpected == []
    assert torch.equal(model.pos_embed, state["pos_embed"])
    with pytest.raises(ValueError, match="6 missing: .*strict=False"):
        load_into(model, state)


def test_meta_model_gets_its_own_storage() -> None:
    state, g, config = golden()
    with torch.device("meta"):
        first, second = SiT(**config), SiT(**config)
    load_into(first, state)
    load_into(second, state)
    with torch.no_grad():
        for p in second.parameters():
            p.zero_()
    assert not first.pos_embed.requires_grad
    assert (first(g["x"], g["t"], g["y"]) - g["out"]).norm() / g["out"].norm() < 1e-5


def test_written_file_is_what_the_official_samplers_read(tmp_path: Path) -> None:
    state, _, config = golden()
    model = SiT(**config)
    load_into(model, state)
    path = tmp_path / "new" / "0000100.pt"
    wrapped = {f"module.{n}": t for n, t in model.to(torch.bfloat16).state_dict().items()}
    save_weights(path, wrapped, state, {"steps": 100, "clock": model.clock, "gamma": 0.8})
    content = torch.load(path, weights_only=True)  # no class allowed at all
    assert list(content) == ["model", "ema", "args", "steps"]
    assert content["args"] == {"clock": "data_at_1", "gamma": 0.8} and content["steps"] == 100
    assert all(tensor.dtype == torch.float32 for tensor in content["model"].values())
    SiT(**config).load_state_dict(content["model"], strict=True)
    assert same(load_weights(path), state)
    rounded = {name: tensor.bfloat16().float() for name, tensor in state.items()}
    assert same(load_weights(path, key="model"), rounded)


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    flat = torch.arange(1_000_000, dtype=torch.float32)
    state = {"a": flat[10:20], "b": flat[:12].view(3, 4).T}
    save_weights(tmp_path / "a.pt", state, state, {})
    assert (tmp_path / "a.pt").stat().st_size < 20_000
    assert same(load_weights(tmp_path / "a.pt"), state)


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"a": torch.ones(3)}
    path = tmp_path / "a.pt"
    save_weights(path, state, state, {})
    old = path.read_bytes()

    def fail(_content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_weights(path, shifted(state), state, {})
    assert path.read_bytes() == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize(
    ("model", "ema", "metadata", "message"),
    [
        ({"a": (2,)}, {"a": (2,), "b": (1,)}, {}, "same names and shapes, got a difference in b"),
        ({"a": (2,)}, {"a": (3,)}, {}, "same names and shapes, got a difference in a"),
        ({}, {}, {}, "same names and shapes, got no tensors"),
        ({"a": (2,)}, {"a": (2,)}, {"z": [1]}, "metadata must map .* got 'z': list"),
        ({"a": (2,)}, {"a": (2,)}, {"steps": 1.5}, "steps.* must be an int >= 0, got 1.5"),
    ],
)
def test_bad_saves(
    tmp_path: Path, model: dict, ema: dict, metadata: dict[str, Any], message: str
) -> None:
    states = [{n: torch.zeros(shape) for n, shape in s.items()} for s in (model, ema)]
    with pytest.raises(ValueError, match=message):
        save_weights(tmp_path / "a.pt", *states, metadata)
    assert not list(tmp_path.iterdir())


def test_meta_tensors_cannot_be_saved(tmp_path: Path) -> None:
    state = {"a": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match="model_state holds a on the meta device"):
        save_weights(tmp_path / "a.pt", state, state, {})


@pytest.mark.parametrize("layout", OFFICIAL)
@pytest.mark.parametrize("name", ["sit_0", "repa_0", "rae_ddt_0"])
@pytest.mark.filterwarnings("ignore:.*has no 'ema' weights")
def test_every_layout_gives_the_official_network(name: str, layout: str, tmp_path: Path) -> None:
    state, g, config = golden(name)
    torch.save(OFFICIAL[layout](state), tmp_path / "a.pt")
    heads = config["num_heads"]
    model = load_model(
        tmp_path / "a.pt",
        num_heads=tuple(heads) if isinstance(heads, list) else heads,
        encoder_depth=2 if name == "repa_0" else None,
    )
    assert type(model) is (DiTDH if name == "rae_ddt_0" else SiT)
    assert model.clock == ("data_at_1" if name == "sit_0" else "noise_at_1")
    assert model.prediction == "velocity" and not model.training
    assert same(model.state_dict(), state)
    (tmp_path / "a.pt").write_bytes(b"")  # nothing hangs on the file
    out = model.velocity(g["x"], g["t"], g["y"])
    assert (out - g["out"]).norm() / g["out"].norm() < 1e-5


def test_official_args_say_what_shapes_do_not(tmp_path: Path) -> None:
    state, _, _ = golden("repa_0")
    torch.save(OFFICIAL["REPA"](state), tmp_path / "repa.pt")
    assert load_model(tmp_path / "repa.pt", num_heads=4).encoder_depth == 2
    sit, _, _ = golden()
    content = OFFICIAL["SiT"](sit)
    content["args"].prediction = "noise"
    torch.save(content, tmp_path / "sit.pt")
    assert load_model(tmp_path / "sit.pt", num_heads=4).prediction == "noise"
