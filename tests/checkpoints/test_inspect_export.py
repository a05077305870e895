"""`mixflow-fast inspect` and `export` as a user meets them."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.cli.main import main
from mixflow_fast.models import DiTDH, SiT, build, load_model, load_weights, save_weights
from mixflow_fast.models.embedders import timestep_sinusoid
from mixflow_fast.models.weights import diffusers_dit as dit
from tests.models.weights.test_loading import HEAD, OFFICIAL, golden, same

HEADS = {"sit_0": 4, "repa_0": 4, "rae_ddt_0": (4, 4)}
SAID = {"SiT": "SiT", "REPA": "REPA", "RAE": "RAE", "RAE first release": "RAE"}


def run(capsys: pytest.CaptureFixture[str], *argv: Any) -> tuple[int, str, str]:
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def network(**kwargs: Any) -> SiT:
    """A SiT-S/8 of one block whose every weight matters."""
    torch.manual_seed(0)
    model = build("SiT-S/8", input_size=16, depth=1, num_classes=3, **kwargs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """A checkpoint as SiT's train.py writes it."""
    state = network().state_dict()
    args = argparse.Namespace(model="SiT-S/8", image_size=128, prediction="velocity", ckpt=None)
    torch.save(
        {"model": state, "ema": state, "opt": {"state": {0: {}}}, "args": args},
        tmp_path / "official.pt",
    )
    return tmp_path / "official.pt"


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A run folder with what the trainer writes into weights.pt, of a SiT in REPA's clock."""
    model = network(learn_sigma=False, clock="noise_at_1")
    ema = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    ema["pos_embed"] = model.pos_embed.detach()
    run_config = json.dumps({"objective": {"prediction": "noise"}})
    metadata = {"steps": 12, "clock": "noise_at_1", "model": json.dumps(model.config)}
    folder = tmp_path / "run"
    save_weights(folder / "weights.pt", model.state_dict(), ema, metadata | {"config": run_config})
    return folder


@pytest.mark.parametrize("layout", SAID)
def test_inspect_names_every_layout(layout: str, tmp_path: Path) -> None:
    name = {"SiT": "sit_0", "REPA": "repa_0"}.get(layout, "rae_ddt_0")
    state, _, config = golden(name)
    torch.save(OFFICIAL[layout](state), tmp_path / "a.pt")
    found = inspect_file(tmp_path / "a.pt")
    assert found.fits and found.layout.startswith(f"{SAID[layout]} training checkpoint")
    assert found.kind == {"sit_0": "SiT", "repa_0": "REPA SiT"}.get(name, "DiT-DH")
    assert found.clock == ("data_at_1" if name == "sit_0" else "noise_at_1")
    assert found.clock_from == "implied by the class" and found.prediction == "velocity"
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    assert found.weights == "ema" and found.dtypes == ["float32"]
    assert found.kwargs["depth"] == config["depth"] and found.tokens == state["pos_embed"].shape[1]
    steps = {"SiT": None, "REPA": 400000, "RAE": 5, "RAE first release": 7}
    assert found.steps == steps[layout]
    assert any("not read by mixflow-fast" in note for note in found.notes)


def test_inspect_prints_for_people_and_programs(
    official: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, "inspect", official)
    assert code == 0 and err == ""
    assert max(map(len, out.splitlines())) <= 100
    for words in (
        "SiT training checkpoint",
        "velocity and sigma channels (learn_sigma)",
        "data_at_1, implied by the class",
        "prediction=velocity",
        "<- read",
        "fits SiT of width 384, depth 1, 128 px",
    ):
        assert words in out, words
    code, out, _ = run(capsys, "inspect", official, "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["kwargs"]["learn_sigma"]
    assert found["args"] == {
        **{"model": "SiT-S/8", "image_size": 128, "prediction": "velocity", "ckpt": None}
    }
    assert [row["name"] for row in found["contents"]] == ["model", "ema", "opt", "args"]


def test_inspect_shows_what_does_not_fit(
    official: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", official, "--against", "SiT-S/8")
    assert code == 1 and "does not fit SiT-S/8" in out
    assert "- missing     blocks.1 to 11: 10 tensors (" in out
    code, out, _ = run(capsys, "inspect", official, "--against", "SiT-B/8")
    assert code == 1 and "~ shape       pos_embed: [1, 4, 384], expected [1, 4, 768]" in out
    code, out, _ = run(capsys, "inspect", official, "--against", "DiTDH-S")
    assert code == 1 and "- missing     s_embedder.proj.weight" in out
    code, _, err = run(capsys, "inspect", official, "--against", "SiT-M/8")
    assert code == 2 and "did you mean" in err
    content = torch.load(official, weights_only=False)
    content["ema"]["blocks.0.extra"] = torch.zeros(1)
    content["model"]["pos_embed"][0, 0, 0] = float("nan")
    del content["ema"]["t_embedder.mlp.2.bias"]
    torch.save(content, official)
    code, out, _ = run(capsys, "inspect", official)
    assert code == 1
    assert "- missing     t_embedder.mlp.2.bias" in out and "+ unexpected  blocks.0: extra" in out
    assert "! not finite    model: pos_embed" in out


def test_inspect_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    code, out, _ = run(capsys, "inspect", tmp_path / "linear.pt")
    assert code == 1 and "unknown" in out and "does not fit any known network" in out
    (tmp_path / "page.pt").write_text("<html>")
    for argv, message in (
        ([tmp_path / "page.pt"], "web page"),
        ([tmp_path / "absent.pt"], "does not exist"),
        ([tmp_path], "holds no weights.pt"),
    ):
        code, out, err = run(capsys, "inspect", *argv)
        assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_inspect_tells_raes_two_optimizers_apart(tmp_path: Path) -> None:
    state, _, config = golden("rae_ddt_0")
    names = [name for name, _ in DiTDH(**config).named_parameters()]
    frozen = ("pos_embed", "t_embedder.W")
    for trained, more in ((names, True), ([n for n in names if n not in frozen], False)):
        content = OFFICIAL["RAE"](state)
        content["optimizer"] = {"state": {i: {} for i in range(len(trained))}}
        torch.save(content, tmp_path / "a.pt")
        notes = " ".join(inspect_file(tmp_path / "a.pt").notes)
        assert ("2 parameters more than are trainable" in notes) == more


def test_inspect_of_a_run_folder(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", ours)
    assert code == 0 and "mixflow-fast weights" in out and "steps 12" in out
    assert "noise_at_1, recorded in the file" in out and "prediction  noise" in out


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
    code, said, _ = run(capsys, "export", ours, "--to", "ema", "--out", out)
    assert code == 0 and "clock noise_at_1" in said and str(out) in said
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["steps"] == "12"
    assert metadata["prediction"] == "noise" and metadata["source"] == "weights.pt"
    model = load_model(out)
    assert (model.clock, model.prediction) == ("noise_at_1", "noise")
    assert same(model.state_dict(), load_weights(ours / "weights.pt"))
    online = tmp_path / "online.pt"
    code, said, _ = run(
        capsys, "export", ours, "--to", "official", "--weights", "model", "--out", online
    )
    assert code == 0 and "online weights stand under 'ema'" in said and "predicts noise" in said
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
        npz = tmp_path / "samples.npz"
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
        message, options = "not finite in pos_embed", {}
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
    code, said, _ = run(capsys, *command)
    assert code == 0 and "read back with diffusers" in said
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
