"""`mixflow-fast inspect` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.models import DiTDH
from tests.support.weights import LAYOUTS, OFFICIAL, golden, run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_names_every_layout(layout: str, tmp_path: Path) -> None:
    name = {"SiT": "sit_0", "REPA": "repa_0"}.get(layout, "rae_ddt_0")
    state, _, config = golden(name)
    torch.save(OFFICIAL[layout](state), tmp_path / "a.pt")
    found = inspect_file(tmp_path / "a.pt")
    assert found.fits and found.layout.startswith(f"{LAYOUTS[layout]} training checkpoint")
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
