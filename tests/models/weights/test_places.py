"""Paths that users give: folders of every kind, parts with an index, what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixflow_fast.checkpoints.export import export
from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.models import load_model
from mixflow_fast.models.weights.places import weights_file
from tests.support.weights import network, same


def in_parts(folder: Path, suffix: str) -> dict[str, torch.Tensor]:
    """A network in two files with an index, as Hugging Face's libraries write it."""
    state = network().state_dict()
    stem = "diffusion_pytorch_model" if suffix == "safetensors" else "pytorch_model"
    names = list(state)
    where = {}
    for number, own in enumerate((names[:9], names[9:]), start=1):
        file = f"{stem}-{number:05d}-of-00002.{suffix}"
        part = {name: state[name] for name in own}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(
            part, folder / file
        )
        where |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return state


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_parts_with_an_index_are_one_file(suffix: str, tmp_path: Path) -> None:
    state = in_parts(tmp_path, suffix)
    (index,) = tmp_path.glob("*.index.json")
    for path in (tmp_path, index):
        assert same(dict(load_model(path).state_dict()), state)
    found = inspect_file(tmp_path)
    assert found.fits and found.layout == "state dict in parts"
    parts = sorted(tmp_path.glob("*-of-*"))
    assert found.size_bytes == sum(file.stat().st_size for file in parts)
    with pytest.raises(ValueError, match=f"one of 2 parts .*: give the folder {tmp_path}"):
        load_model(parts[0])
    if suffix == "safetensors":
        with pytest.raises(ValueError, match="is the checkpoint that is exported"):
            export(tmp_path, "ema", parts[0], force=True)
    parts[1].unlink()
    with pytest.raises(ValueError, match=f"names {parts[1].name}, which .* does not hold"):
        load_model(tmp_path)
    for name in ("../elsewhere.safetensors", str(tmp_path / "there.safetensors")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match=f"names '{name}', which is not below {tmp_path}"):
            load_model(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="is no index of weights"):
        load_model(tmp_path)


def test_parts_without_an_index(tmp_path: Path) -> None:
    """Folder and file must not send the user from one to the other."""
    in_parts(tmp_path, "safetensors")
    next(tmp_path.glob("*.index.json")).unlink()
    for path in (tmp_path, *tmp_path.iterdir()):
        with pytest.raises(ValueError, match="parts.*: download their index .*index.json"):
            load_model(path)


def test_one_part_of_one_is_a_file(tmp_path: Path) -> None:
    state = network().state_dict()
    save_file(state, tmp_path / "model-00001-of-00001.safetensors")
    with pytest.raises(ValueError, match="give one of the files in it: model-00001-of-00001"):
        load_model(tmp_path)
    found = load_model(tmp_path / "model-00001-of-00001.safetensors")
    assert same(dict(found.state_dict()), state)


@pytest.mark.parametrize(
    "inside",
    ["weights.pt", "model.safetensors", "pytorch_model.bin", "transformer/model.safetensors"],
)
def test_a_folder_with_weights(inside: str, tmp_path: Path) -> None:
    state, file = network().state_dict(), tmp_path / inside
    file.parent.mkdir(exist_ok=True)
    (file.parent / "config.json").write_text("{}")
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    assert weights_file(tmp_path) == file
    assert same(dict(load_model(tmp_path).state_dict()), state)


SHARD = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
FOLDERS = {
    "state.json": "stopped before its end, or has train.save_weights=never: mixflow-fast "
    "consolidate {} --out FILE.pt",
    "checkpoints/step_00000003/state.json": "mixflow-fast consolidate {} --out FILE.pt",
    f"global_step7/{SHARD}": "python zero_to_fp32.py . OUT. and give OUT",
    SHARD: "python zero_to_fp32.py . OUT. and give OUT",
    "global_step7/mp_rank_00_model_states.pt": "of training is in {}/global_step7/mp_rank_00_model",
    ".metadata": "format_utils dcp_to_torch {} FILE.pt",
    "metrics.jsonl": "its run has saved no checkpoint yet",
    "manifest.json": "it is a set of data: mixflow-fast data info {} says what is in it",
    "0400000.pt": "give one of the files in it: 0400000.pt",
    "checkpoints/0400000.pt": "give one of the files in it: checkpoints/0400000.pt",
    "readme.md": "give a run folder, a checkpoint folder or a weights file",
}


@pytest.mark.parametrize("inside", FOLDERS)
def test_a_folder_without_weights_is_named(inside: str, tmp_path: Path) -> None:
    file = tmp_path / inside
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    words = FOLDERS[inside].format(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no weights.pt: .*{words}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_folder_with_an_adapter(name: str, tmp_path: Path) -> None:
    save_file({"base_model.blocks.0.attn.qkv.lora_A.weight": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is an adapter .LoRA., .* merge it"):
        load_model(tmp_path)


def test_the_folder_checkpoints_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000003" / "state.json").touch()
    with pytest.raises(ValueError, match=f"mixflow-fast consolidate {tmp_path} --out"):
        load_model(tmp_path / "checkpoints")


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "SiT-XL-2-256.pt").touch()
    for path, words in (
        ("~/SiT-XL-2-257.pt", f"does not exist: .* is {tmp_path}; did you mean 'SiT-XL-2-256.pt'"),
        ("~/ema.pt", f"checkpoint ~/ema.pt does not exist: .* is {tmp_path}$"),
        ("~/no/x.pt", f"~/no/x.pt does not exist: the last folder of it that does is {tmp_path}$"),
        ("~nobody-of-that-name/x.pt", "~nobody-of-that-name/x.pt does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(path)
    (tmp_path / "link.pt").symlink_to(tmp_path / "gone.pt")
    with pytest.raises(ValueError, match="link.pt is a link to .*gone.pt, which does not exist"):
        load_model(tmp_path / "link.pt")
