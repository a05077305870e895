"""`mixflow-fast export` of text-to-image runs: what official classes and pipelines then load."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from mixflow_fast.checkpoints import export_text_to_image
from mixflow_fast.models import save_weights
from mixflow_fast.models.text_to_image.lora import add_lora, is_adapter, lora_spec
from mixflow_fast.models.text_to_image.spec import base_digest
from mixflow_fast.models.weights.metadata import Metadata
from tests.support.text_to_image import FAMILIES, numbers, sd3, sd3_pipeline, text
from tests.support.weights import run

NO_TEXT = {f"{part}{n}": None for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")}
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A pipeline's folder in bf16, its text encoders absent by its own word."""
    folder = tmp_path / "tiny-sd35"
    sd3_pipeline(sd3()).to(torch.bfloat16).save_pretrained(folder)
    (folder / "LICENSE.md").write_text("theirs")
    (folder / "sd3.5_tiny.safetensors").write_bytes(b"an original file, which is not copied")
    return folder


def trained(network: nn.Module, folder: Path, source: Path | str) -> dict[str, Tensor]:
    """A run's folder with weights.pt as the trainer writes it; returns its EMA."""
    config = {name: v for name, v in network.config.items() if not name.startswith("_")}
    kwargs = {"class": type(network).__name__, "transformer": config}
    kwargs |= {"adapter": None, "latents": None}
    run_config = {
        "model": {"name": "TextToImage", "folder": str(source)},
        "objective": {"gamma": 0.8, "timesteps": "beta", "shift": 3.0, "prediction": "velocity"},
    }
    metadata = Metadata(kwargs=kwargs, clock="noise_at_1", steps=12, config=json.dumps(run_config))
    state = {f"transformer.{name}": t for name, t in network.state_dict().items()}
    ema = {name: t + 0.01 * torch.randn_like(t) for name, t in state.items()}
    save_weights(folder / "weights.pt", state, ema, metadata.to_record())
    return {name.removeprefix("transformer."): t for name, t in ema.items()}


def test_the_pipeline_loads_what_was_trained(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ema = trained(sd3(), tmp_path / "run", source)
    out = tmp_path / "out"
    code, said, err = run(capsys, "export", tmp_path / "run", "--to", "diffusers", "--out", out)
    assert code == 0 and not err
    assert "127 tensors" in said and "all 127 tensors equal, in bf16" in said
    assert f"scheduler, vae (48.40 kB) copied from {source}" in " ".join(said.split())
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        *("model_index.json", "LICENSE.md", "mixflow.json", "scheduler/scheduler_config.json"),
        *("vae/config.json", "vae/diffusion_pytorch_model.safetensors"),
        *("transformer/config.json", WEIGHTS),
    }
    record = json.loads((out / "mixflow.json").read_text())
    assert (record["gamma"], record["shift"], record["steps"]) == ("0.8", "3.0", 12)
    state = load_file(out / WEIGHTS)
    assert all(torch.equal(state[name], t.bfloat16()) for name, t in ema.items())
    # Bit for bit what the trained network itself makes in the official pipeline.
    own = SD3Transformer2DModel.from_config(
        SD3Transformer2DModel.load_config(source / "transformer")
    )
    own.load_state_dict({name: t.bfloat16() for name, t in ema.items()}, assign=True)
    call = {
        **text(1),
        "latents": numbers(1, 16, 8, 8),
        **{"num_inference_steps": 3, "guidance_scale": 1.0, "height": 16, "width": 16},
        "output_type": "latent",
    }
    call = {n: v.bfloat16() if isinstance(v, Tensor) else v for n, v in call.items()}
    loaded = StableDiffusion3Pipeline.from_pretrained(out, torch_dtype=torch.bfloat16, **NO_TEXT)
    mine = sd3_pipeline(own).to(torch.bfloat16)
    assert torch.equal(loaded(**call).images, mine(**call).images)
    assert not list(tmp_path.glob(".*"))


def test_dtypes_weights_and_a_single_file(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = sd3()
    ema = trained(network, tmp_path / "run", source)
    base = ("export", tmp_path / "run")
    out = tmp_path / "fp32"
    code, said, _ = run(capsys, *base, "--to", "diffusers", "--out", out, "--dtype", "fp32")
    assert code == 0 and "in fp32" in said
    assert all(torch.equal(v, ema[n]) for n, v in load_file(out / WEIGHTS).items())
    own = ("--weights", "model", "--to", "diffusers", "--out", tmp_path / "model")
    assert run(capsys, *base, *own, "--dtype", "fp32")[0] == 0
    online = load_file(tmp_path / "model" / WEIGHTS)
    assert all(torch.equal(online[n], v) for n, v in network.state_dict().items())
    file = tmp_path / "alone.safetensors"
    assert run(capsys, *base, "--to", "ema", "--out", file)[0] == 0
    assert all(torch.equal(v, ema[n]) for n, v in load_file(file).items())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["gamma"] == "0.8" and opened.metadata()["steps"] == "12"
    code, said, _ = run(capsys, "inspect", file)
    assert "SD3.5 medium's kind" in said and "gamma=0.8" in said and "fits SD3Tr" in said
    code, said, _ = run(capsys, "inspect", tmp_path / "run")
    assert code == 0 and "mixflow-fast weights under 'ema'" in said and "steps 12" in said


def test_links_and_replacing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(sd3(), tmp_path / "run", source)
    out = tmp_path / "out"
    command = ("export", tmp_path / "run", "--to", "diffusers", "--out", out, "--link")
    code, said, _ = run(capsys, *command)
    assert code == 0 and f"linked to {source}" in " ".join(said.split())
    assert (out / "vae").is_symlink() and not (out / "transformer").is_symlink()
    StableDiffusion3Pipeline.from_pretrained(out, **NO_TEXT)
    before = (source / "vae" / "config.json").read_bytes(), (source / "vae").stat().st_mode
    code, _, err = run(capsys, *command)
    assert code == 2 and "replace it with --force" in err
    assert run(capsys, *command, "--force")[0] == 0
    # What links led to stays as it was when the old folder goes.
    assert (
        (source / "vae" / "config.json").read_bytes(),
        (source / "vae").stat().st_mode,
    ) == before


def test_a_transformer_alone_and_parts_that_are_absent(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(source / "transformer", alone)
    trained(sd3(), tmp_path / "run", alone)
    out = tmp_path / "out"
    code, said, _ = run(capsys, "export", tmp_path / "run", "--to", "diffusers", "--out", out)
    assert code == 0 and "text parts passed as None" in " ".join(said.split())
    assert SD3Transformer2DModel.from_pretrained(out).config["num_layers"] == 3
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ("config.json", "mixflow.json", "diffusion_pytorch_model.safetensors")
    )
    other = ("--out", tmp_path / "other", "--model", source)
    code, said, _ = run(capsys, "export", tmp_path / "run", "--to", "diffusers", *other)
    none = "text_encoder=None, text_encoder_2=None, text_encoder_3=None, tokenizer=None"
    assert code == 0 and f"loads this folder with {none}" in " ".join(said.split())
    # As the note says, and only so.
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "other", **NO_TEXT)
    with pytest.raises(ValueError):
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "other")


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_other_families(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = FAMILIES[name].build()
    source = tmp_path / "source"
    network.save_pretrained(source / "transformer")
    ema = trained(network, tmp_path / "run", source)
    out = tmp_path / "out"
    code, _, err = run(capsys, "export", tmp_path / "run", "--to", "diffusers", "--out", out)
    assert code == 0, err
    back = type(network).from_pretrained(out / "transformer")
    assert all(torch.equal(v, ema[n]) for n, v in back.state_dict().items())


def test_a_class_of_a_user_s_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No name tells it, the run's record does."""
    torch.manual_seed(0)
    network = AuraFlowTransformer2DModel(
        **{"sample_size": 8, "in_channels": 16, "num_mmdit_layers": 1},
        **{"num_single_dit_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2},
        **{"joint_attention_dim": 32, "caption_projection_dim": 32, "out_channels": 16},
        pos_embed_max_size=16,
    )
    source = tmp_path / "source"
    network.save_pretrained(source / "transformer")
    ema = trained(network, tmp_path / "run", source)
    out = tmp_path / "out"
    code, said, err = run(capsys, "export", tmp_path / "run", "--to", "diffusers", "--out", out)
    assert code == 0, err
    assert "AuraFlowTransformer2DModel" in said
    code, said, err = run(capsys, "inspect", tmp_path / "run")
    assert code == 0, (said, err)
    assert "by its record AuraFlowTransformer2DModel" in said
    back = AuraFlowTransformer2DModel.from_pretrained(out / "transformer").state_dict()
    assert all(torch.equal(v, ema[n]) for n, v in back.items())


def test_refusals_leave_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(sd3(), tmp_path / "run", source)
    other = tmp_path / "large"
    sd3_pipeline(FAMILIES["sd3.5 large"].build()).save_pretrained(other)
    trained(sd3(), tmp_path / "lost", tmp_path / "moved")
    work = tmp_path / "run"
    for options, words in (
        (("--to", "official", "--out", "x.pt"), "export --to diffusers, which its pipeline"),
        (("--out", source), "other things in it"),
        (("--out", source / "new"), "choose a folder beside it"),
        (("--out", tmp_path), "other things in it"),
        (("--model", other, "--out", tmp_path / "o"), "do not fit SD3Transformer2DModel"),
        (("--head", "sigma", "--out", tmp_path / "o"), "--head has no meaning"),
        (("--clock", "data_at_1", "--out", tmp_path / "o"), "leave --clock out"),
        (("--to", "ema", "--link", "--out", tmp_path / "o.safetensors"), "belong to --to diff"),
    ):
        options = options if "--to" in options else ("--to", "diffusers", *options)
        code, _, err = run(capsys, "export", work, *options)
        assert code == 2 and words in " ".join(err.split()), (options, err)
    command = ("export", tmp_path / "lost", "--to", "diffusers", "--out", tmp_path / "o")
    code, _, err = run(capsys, *command)
    assert code == 2 and "--model FOLDER" in err
    index = json.loads((source / "model_index.json").read_text())
    (source / "model_index.json").write_text(json.dumps(index | {"../run": ["a", "b"]}))
    code, _, err = run(capsys, "export", work, "--to", "diffusers", "--out", tmp_path / "o")
    assert code == 2 and "names '../run'" in err
    (source / "model_index.json").write_text(json.dumps(index))
    # An earlier export there would be replaced with --force, but not where it is the source.
    assert run(capsys, "export", work, "--to", "diffusers", "--out", tmp_path / "first")[0] == 0
    again = ("export", work, "--to", "diffusers", "--model", tmp_path / "first")
    code, _, err = run(capsys, *again, "--out", tmp_path / "first", "--force")
    assert code == 2 and "is read now" in err
    huge = torch.load(work / "weights.pt")
    huge["ema"]["transformer.proj_out.bias"][0] = 1e6
    torch.save(huge, work / "weights.pt")
    half = ("--to", "diffusers", "--dtype", "fp16", "--out", tmp_path / "o")
    code, _, err = run(capsys, "export", work, *half)
    assert code == 2 and "proj_out.bias holds numbers that fp16 cannot hold" in err
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_what_reads_back_otherwise_is_not_written(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained(sd3(), tmp_path / "run", source)
    save = export_text_to_image._save

    def damaging(state: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
        save(state | {"proj_out.bias": state["proj_out.bias"] + 1}, path, header)

    monkeypatch.setattr(export_text_to_image, "_save", damaging)
    command = ("export", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "o")
    code, _, err = run(capsys, *command)
    assert code == 2 and "reads proj_out.bias otherwise than it was written" in err
    assert not (tmp_path / "o").exists() and not list(tmp_path.glob(".*"))


def test_adapters_are_added_to_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What peft computes beside the base, the exported network computes alone."""
    source = tmp_path / "tiny"
    sd3_pipeline(sd3()).save_pretrained(source)
    network = sd3()
    spec = replace(lora_spec(network, rank=4, alpha=8.0), base=base_digest(source))
    add_lora(network, spec, seed=1)
    for name, tensor in network.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(tensor, std=0.02)
    adapters = {f"transformer.{n}": p for n, p in network.named_parameters() if is_adapter(n)}
    config = {name: v for name, v in network.config.items() if not name.startswith("_")}
    kwargs = {"class": "SD3Transformer2DModel", "transformer": config, "lora": spec.to_config()}
    run_config = {"model": {"folder": str(source)}, "objective": {"gamma": 0.8}}
    record = Metadata(kwargs=kwargs, clock="noise_at_1", steps=3, config=json.dumps(run_config))
    folder = tmp_path / "run"
    save_weights(folder / "weights.pt", adapters, adapters, record.to_record())
    out = tmp_path / "out"
    command = ("export", folder, "--to", "diffusers")
    code, said, err = run(capsys, *command, "--out", out)
    assert code == 0, err
    words = " ".join(said.split())
    layers = len(adapters) // 2
    assert "LoRA of rank 4" in words and f"LoRA added to {layers} layers" in words
    assert json.loads((out / "mixflow.json").read_text())["gamma"] == "0.8"
    merged = SD3Transformer2DModel.from_pretrained(out / "transformer")
    told = text(2)
    inputs = {
        "hidden_states": numbers(2, 16, 8, 8),
        "timestep": torch.tensor([900.0, 100.0]),
        "encoder_hidden_states": told["prompt_embeds"],
        "pooled_projections": told["pooled_prompt_embeds"],
    }
    with torch.no_grad():
        expected, found = network(**inputs).sample, merged(**inputs).sample
        base = sd3()(**inputs).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - base).abs().max() > 100 * (found - expected).abs().max()
    code, said, _ = run(capsys, *command, "--out", tmp_path / "half", "--dtype", "bf16")
    assert code == 0 and "rounding the sums to bf16 is 0." in " ".join(said.split())
    alone = ("export", folder, "--to", "ema", "--out", tmp_path / "x.safetensors")
    code, _, err = run(capsys, *alone)
    assert code == 2 and "--to lora writes them" in err
    large = tmp_path / "large"
    sd3_pipeline(FAMILIES["sd3.5 large"].build()).save_pretrained(large)
    code, _, err = run(capsys, *command, "--model", large, "--out", tmp_path / "other")
    assert code == 2 and "holds another network (hash" in err
    code, said, _ = run(capsys, "inspect", folder)
    assert code == 0 and "a LoRA for an SD3.5 with attn2 of width 32" in said
