"""`mixflow-fast inspect` of text-to-image files: transformers, pipelines, adapters, damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file, save_file

from tests.support.text_to_image import FAMILIES, SD3, sd3, sd3_pipeline, without_storage
from tests.support.weights import run


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd35"
    sd3_pipeline(sd3()).save_pretrained(folder)
    return folder


def test_a_transformer_and_a_pipeline(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "inspect", pipeline)
    assert code == 0 and not err and max(map(len, out.splitlines())) <= 200
    for words in (
        "a network of SD3.5 medium's kind, width 32, 3 layers (SD3Transformer2DModel)",
        "dual_attention_layers 0-1",
        "134,656, and a table of positions of 4,608",
        "pipeline StableDiffusion3Pipeline",
        "vae                AutoencoderKL",
        "text_encoder_3     none",
        f"model.folder={pipeline}",
        "fits SD3Transformer2DModel: every name and shape; values were not read",
    ):
        assert words in out, (words, out)
    code, out, _ = run(capsys, "inspect", pipeline / "transformer", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["pipeline"] is None
    assert found["config"]["dual_attention_layers"] == [0, 1] and found["dtypes"] == ["float32"]
    assert found["notes"] == [f"to train it: model.folder={pipeline}"]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = FAMILIES[name].build()
    network.save_pretrained(tmp_path / "t", max_shard_size="60KB")
    assert len(list((tmp_path / "t").glob("*.safetensors"))) > 1
    code, out, _ = run(capsys, "inspect", tmp_path / "t", "--json")
    found = json.loads(out)
    assert code == 0 and found["against"] == type(network).__name__
    assert found["parameters"] == sum(p.numel() for p in network.parameters())
    assert "in " in found["layout"] and "parts" in found["layout"]


def test_what_is_wrong_is_shown(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "transformer"
    shutil.copytree(pipeline / "transformer", folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["transformer_blocks.1.ff.net.2.bias"]
    state["transformer_blocks.1.more"] = torch.zeros(2)
    state["proj_out.bias"] = torch.zeros(3)
    save_file(state, file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"qk_norm": None}))
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and "does not fit SD3Transformer2DModel" in out
    assert "- missing     transformer_blocks.1.ff.net.2.bias" in out
    assert "+ unexpected  transformer_blocks.1.more" in out
    assert "~ shape       proj_out.bias: [3], expected [64]" in out
    assert "config.json says qk_norm None, and the shapes say 'rms_norm'" in out
    data = file.read_bytes()
    file.write_bytes(data[:-10])
    code, out, _ = run(capsys, "inspect", folder)
    assert code == 1 and "has " in out and "the file is not whole" in out
    (folder / "config.json").unlink()
    code, out, _ = run(capsys, "inspect", folder)
    assert "no config.json beside it" in out


def test_sixteen_gigabytes_take_moments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of holes: whoever reads a value of it reads zeros, and for minutes."""
    large = SD3 | {
        **{"num_layers": 38, "num_attention_heads": 38, "attention_head_dim": 64},
        **{"caption_projection_dim": 2432, "joint_attention_dim": 4096},
        **{"pooled_projection_dim": 2048, "dual_attention_layers": (), "pos_embed_max_size": 192},
    }
    entries, end = {}, 0
    for name, tensor in without_storage(SD3Transformer2DModel, large).state_dict().items():
        place = [end, end + 2 * tensor.numel()]
        entries[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": place}
        end = place[1]
    text = json.dumps(entries).encode()
    file = tmp_path / "sd3.5_large.safetensors"
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
    code, out, _ = run(capsys, "inspect", file)
    assert code == 0 and "SD3.5 large (SD3Transformer2DModel)" in out and "16.29 GB" in out
    assert "8,056,627,520, and a table of positions of 89,653,248; 1227 tensors, bfloat16" in out
    assert "no config.json beside it" in out


def test_an_original_file_says_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {
        "joint_blocks.0.x_block.attn.qkv.weight": (96, 32),
        "x_embedder.proj.weight": (32, 16, 2, 2),
        "context_embedder.weight": (32, 32),
        "y_embedder.mlp.0.weight": (32, 64),
        "final_layer.linear.weight": (64, 32),
        "pos_embed": (1, 144, 32),
    }
    state = {f"model.diffusion_model.{n}": torch.zeros(shape) for n, shape in names.items()}
    save_file(state | {"text_encoders.a": torch.zeros(1)}, tmp_path / "sd3.safetensors")
    code, out, _ = run(capsys, "inspect", tmp_path / "sd3.safetensors")
    flat = " ".join(out.split())
    assert code == 1 and "names of the original code" in out
    assert "diffusers.SD3Transformer2DModel.from_single_file(" in flat
    assert "local_files_only=True" in flat and "model.folder=OUT" in flat


def test_a_lora_and_its_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = "transformer.transformer_blocks.3.attn2.to_q"
    state = {f"{block}.lora_A.weight": torch.zeros(4, 1536)}
    state[f"{block}.lora_B.weight"] = torch.zeros(1536, 4)
    header = {"gamma": "0.8", "shift": "3.0", "steps": "1000"}
    save_file(state, tmp_path / "mine.safetensors", header)
    code, out, _ = run(capsys, "inspect", tmp_path / "mine.safetensors")
    assert code == 0 and "a LoRA for SD3.5 medium" in out and "4, of 1 linear maps" in out
    assert "whole: both factors" in out
    assert "gamma=0.8, shift=3.0" in out and "steps 1,000" in out and "attn2.to_q" in out
    del state[f"{block}.lora_B.weight"]
    save_file(state, tmp_path / "half.safetensors")
    code, out, _ = run(capsys, "inspect", tmp_path / "half.safetensors")
    assert code == 1 and f"the other factor of {block}" in out
