"""`mixflow-fast export` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.checkpoints.starting_weights import start_from
from mixflow_fast.models import SiT, SongUNet, build, load_model, load_weights, save_weights
from mixflow_fast.models.embedders import timestep_sinusoid
from mixflow_fast.models.weights import diffusers_dit as dit
from mixflow_fast.models.weights.metadata import Metadata
from tests.support.weights import HEAD, HEADS, OFFICIAL, golden, network, run, same


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(("to", "out"), [("official", "out.pt"), ("ema", "out.safetensors")])
def test_round_trips_are_bit_identical(name: str, to: str, out: str, tmp_path: Path) -> None:
    state, g, _ = golden(name)
    layout = "REPA" if name == "repa_0" else "SiT"  # whose args say encoder_depth
    torch.save(OFFICIAL[layout](state), tmp_path / "in.pt")
    first = export(tmp_path / "in.pt", to, tmp_path / out, head="as-is", num_heads=HEADS[name])
    assert same(load_weights(tmp_path / out), state) and first.tensors == len(state)
    model = load_model(tmp_path / out)  # the file says how many heads
    assert same(model.state_dict(), state)
    error = (model.velocity(g["x"], g["t"], g["y"]) - g["out"]).norm() / g["out"].norm()
    assert error < 1e-5
    second = export(tmp_path / out, to, tmp_path / f"2_{out}", head="as-is")
    assert same(load_weights(second.path), state)
    assert load_model(second.path).config == model.config
    assert inspect_file(second.path).fits


def test_official_files_hold_what_samplers_look_for(official: Path, tmp_path: Path) -> None:
    before = load_weights(official)
    export(official, "official", tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)  # no class allowed at all
    assert list(content) == ["ema", "args", "steps"]
    assert all(type(value) is str for value in content["args"].values())
    assert json.loads(content["args"]["source_args"])["image_size"] == 128
    # SiT's sample scripts build learn_sigma=False for --ckpt, its train.py learn_sigma=True.
    for head, sigma in (("velocity", False), ("sigma", True)):
        export(official, "official", tmp_path / f"{head}.pt", head=head, bare=True)
        bare = torch.load(tmp_path / f"{head}.pt", weights_only=True)
        model = build("SiT-S/8", input_size=16, depth=1, num_classes=3, learn_sigma=sigma)
        model.load_state_dict(bare, strict=True)
    kept = [row for row in range(512) if row % 8 < 4]
    assert torch.equal(content["ema"][HEAD], before[HEAD][kept])
    export(tmp_path / "a.pt", "official", tmp_path / "b.pt", head="sigma")
    grown = load_weights(tmp_path / "b.pt")[HEAD]
    assert torch.equal(grown[kept], before[HEAD][kept]) and int((grown == 0).sum()) == 256 * 384


def test_export_of_a_run_folder(
    ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "post.safetensors"
    code, printed, _ = run(capsys, "export", ours, "--to", "ema", "--out", out)
    assert code == 0 and "clock noise_at_1" in printed and str(out) in printed
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["steps"] == "12"
    assert metadata["prediction"] == "noise" and metadata["source"] == "weights.pt"
    model = load_model(out)
    assert (model.clock, model.prediction) == ("noise_at_1", "noise")
    assert same(model.state_dict(), load_weights(ours / "weights.pt"))
    online = tmp_path / "online.pt"
    code, printed, _ = run(
        capsys, "export", ours, "--to", "official", "--weights", "model", "--out", online
    )
    assert (
        code == 0 and "online weights stand under 'ema'" in printed and "predicts noise" in printed
    )
    assert same(load_weights(online), load_weights(ours / "weights.pt", key="model"))
    assert inspect_file(online).steps == 12


def test_exported_files_are_sampled_from(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    arrays = []
    for to, out in (("official", "o.pt"), ("ema", "e.safetensors")):
        command = ["export", official, "--to", to, "--head", "as-is", "--out", tmp_path / out]
        assert run(capsys, *command)[0] == 0
    for file in (official, tmp_path / "o.pt", tmp_path / "e.safetensors"):
        npz = tmp_path / f"{file.name}.npz"
        assert run(capsys, "sample", file, "--num", 2, "--steps", 2, "--out", npz)[0] == 0
        arrays.append(np.load(npz)["x"])
    assert np.array_equal(arrays[0], arrays[1]) and np.array_equal(arrays[0], arrays[2])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--to", "official", "--out", "x.bin"], "out must end in .pt"),
        (["--to", "ema", "--out", "x.pt"], "out must end in .safetensors"),
        (["--to", "diffusers", "--out", "x.pt"], "out must be a folder"),
        (["--to", "ema", "--bare", "--out", "x.safetensors"], "bare"),
        (["--to", "official", "--out", "taken.pt"], "exists: choose another --out, or .*--force"),
        (["--to", "official", "--out", "official.pt", "--force"], "is the checkpoint"),
        (["--to", "official", "--out", "folder.pt", "--force"], "is a folder"),
        (["--to", "diffusers", "--out", "folder", "--force"], "with other things in it"),
    ],
)
def test_export_refuses(
    argv: list[str],
    message: str,
    official: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    Path("taken.pt").write_text("mine")
    for folder in ("folder.pt", "folder"):
        Path(folder).mkdir()
        Path(folder, "mine").write_text("mine")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    code, out, err = run(capsys, "export", "official.pt", *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and re.search(message, err)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_export_replaces_with_force_only(official: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pt"
    out.write_text("mine")
    export(official, "official", out, force=True)
    assert load_model(out).config["num_heads"] == 6
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["nan", "missing", "sigma of REPA"])
def test_export_writes_nothing_of_what_does_not_fit(damage: str, tmp_path: Path) -> None:
    state, _, _ = golden("repa_0")
    content = OFFICIAL["REPA"](state)
    message, options = "sigma", {"head": "sigma"}
    if damage == "nan":
        content["ema"]["pos_embed"] = state["pos_embed"] * float("nan")
        message, options = "pos_embed .under 'ema'. has 1536 values that are not finite", {}
    if damage == "missing":
        del content["ema"]["t_embedder.mlp.0.bias"]
        message, options = "1 missing: t_embedder.mlp.0.bias", {}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "a.pt", "official", tmp_path / "b.pt", num_heads=4, **options)
    assert not (tmp_path / "b.pt").exists()


def test_time_features_change_basis_exactly() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    k = torch.arange(128, dtype=torch.float64)
    angles = t[:, None] * 10000.0 ** (-k / 127)
    theirs = torch.cat([angles.cos(), angles.sin()], dim=1)
    ours = timestep_sinusoid(t)
    basis = dit.time_basis()
    assert (theirs @ basis.T - ours).abs().max() < 1e-12
    assert (theirs - ours).abs().max() > 1e-3  # as they are, they differ
    assert basis.abs().sum(dim=1).max() < 2


@pytest.mark.parametrize("name", ["sit_0", "repa_0"])
def test_diffusers_computes_the_same(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import DiTTransformer2DModel

    state, g, config = golden(name)
    torch.save(OFFICIAL["REPA" if name == "repa_0" else "SiT"](state), tmp_path / "a.pt")
    out = tmp_path / "folder"
    command = ["export", tmp_path / "a.pt", "--to", "diffusers", "--num-heads", "4", "--out", out]
    code, printed, _ = run(capsys, *command)
    assert code == 0 and "read back with diffusers" in printed
    model = DiTTransformer2DModel.from_pretrained(out, low_cpu_mem_usage=False).eval()
    assert model.config.out_channels == 4
    with torch.no_grad():
        theirs = model(g["x"], timestep=g["t"], class_labels=g["y"]).sample
    assert (theirs - g["out"]).norm() / g["out"].norm() < 1e-5  # the official class's output
    record = json.loads((out / "mixflow.json").read_text())
    assert record["clock"] == ("data_at_1" if name == "sit_0" else "noise_at_1")
    assert run(capsys, *command)[0] == 2 and run(capsys, *command, "--force")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt", "folder"]


def test_a_wrong_diffusers_model_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _, _ = golden()
    torch.save(state, tmp_path / "a.pt")
    monkeypatch.setattr(dit, "time_basis", lambda: torch.eye(256, dtype=torch.float64))
    with pytest.raises(ValueError, match="differs from this one by"):
        export(tmp_path / "a.pt", "diffusers", tmp_path / "out", num_heads=4)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_what_diffusers_cannot_hold(tmp_path: Path) -> None:
    ddt, _, _ = golden("rae_ddt_0")
    state, _, config = golden()
    moved: dict[str, Tensor] = state | {"pos_embed": state["pos_embed"] + 0.01}
    with torch.no_grad():
        normed = SiT(**config, qk_norm=True).state_dict()
        narrow = SiT(**config | {"mlp_ratio": 2.0}).state_dict()
    for content, message in (
        (ddt, "diffusers has no class for DiT-DH"),
        (normed, "no norms of q and k"),
        (narrow, "no mlp_ratio 2.0"),
        (moved, "pos_embed is not the fixed sine-cosine table"),
    ):
        torch.save(content, tmp_path / "a.pt")
        heads = (4, 4) if content is ddt else 4
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "a.pt", "diffusers", tmp_path / "out", num_heads=heads)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["SiT", "REPA", "noise"])
def test_a_diffusers_folder_is_read_back(kind: str, tmp_path: Path) -> None:
    """As the same function: by load_model, by inspect, and as the start of a run."""
    pytest.importorskip("diffusers")
    more = {"z_dims": [8], "projector_dim": 8, "encoder_depth": 1} if kind == "REPA" else {}
    prediction = "noise" if kind == "noise" else "velocity"
    model = network(learn_sigma=False, **more)
    config = json.dumps({"objective": {"prediction": prediction}})
    record = Metadata(kwargs=model.config, clock=model.clock, steps=7, config=config).to_record()
    save_weights(tmp_path / "a.pt", model.state_dict(), model.state_dict(), record)
    out = tmp_path / "dit"
    export(tmp_path / "a.pt", "diffusers", out)
    with pytest.warns(UserWarning, match="read back from diffusers' layout: the same function"):
        back = load_model(out)
    assert (back.clock, back.prediction) == (model.clock, prediction)
    x = torch.randn(5, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    y = torch.arange(5) % 4
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    with torch.no_grad():
        ours, theirs = model.velocity(x, t, y), back.velocity(x, t, y)
    assert (ours - theirs).norm() / ours.norm() < 2e-6
    found = inspect_file(out)
    assert found.fits and found.steps == 7 and "diffusers" in found.layout
    assert "read back" in " ".join(found.notes)
    started = network(learn_sigma=False, clock=model.clock)
    with pytest.warns(UserWarning, match="read back"):
        start_from(started, out)
    assert torch.equal(started.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_a_diffusers_folder_that_is_not_ours(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    torch.save({"ema": network(learn_sigma=False).state_dict()}, tmp_path / "a.pt")
    out = tmp_path / "dit"
    export(tmp_path / "a.pt", "diffusers", out)
    (file,) = out.glob("*.safetensors")
    state = load_file(file)
    name = "transformer_blocks.0.attn1.to_k.bias"
    save_file({n: t for n, t in state.items() if n != name}, file)
    with pytest.raises(ValueError, match=f"cannot be read back .{name} is missing.: give a.pt"):
        load_model(out)
    save_file(state, file)
    (out / dit.RECORD).unlink()
    with pytest.raises(ValueError, match="is a DiT in diffusers' layout .* with mixflow.json"):
        load_model(out)
    found = inspect_file(out)
    assert not found.fits and "a DiT in diffusers' layout" in " ".join(found.notes)


def test_time_features_change_basis_back_without_amplifying_rounding() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    k = torch.arange(128, dtype=torch.float64)
    features = []
    for last in (128, 127):
        angles = t[:, None] * 10000.0 ** (-k / last)
        features.append(torch.cat([angles.cos(), angles.sin()], dim=1))
    basis = dit.inverse_time_basis()
    assert (features[0] @ basis.T - features[1]).abs().max() < 1e-8
    assert basis.abs().sum(1).max() < 20


def test_a_songunet_is_exported_and_not_to_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SongUNet(8, attn_resolutions=(4,), model_channels=8, channel_mult=(1, 2), num_blocks=1)
    record = Metadata(kwargs=net.config, clock=net.clock).to_record()
    save_weights(tmp_path / "in.pt", net.state_dict(), net.state_dict(), record)
    for to, out in (("official", "out.pt"), ("ema", "out.safetensors")):
        written = export(tmp_path / "in.pt", to, tmp_path / out)
        assert "SongUNet of widths 8, 16" in written.model
        model = load_model(tmp_path / out)
        assert model.config == net.config and same(model.state_dict(), net.state_dict())
    with pytest.raises(ValueError, match="diffusers has no class for SongUNet"):
        export(tmp_path / "in.pt", "diffusers", tmp_path / "folder")
    with pytest.raises(ValueError, match="head sigma is for SiT"):
        export(tmp_path / "in.pt", "ema", tmp_path / "b.safetensors", head="sigma")
