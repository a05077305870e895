"""`export --to lora`: the file in the official pipeline is the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixflow_fast.checkpoints import export_lora
from mixflow_fast.checkpoints.export import export
from mixflow_fast.cli import main
from mixflow_fast.config.loading import from_dict
from mixflow_fast.models import load_model, save_weights
from mixflow_fast.models.text_to_image import load_adapter
from mixflow_fast.models.text_to_image.lora import is_adapter, set_initial
from mixflow_fast.models.text_to_image.spec import TransformerSpec
from mixflow_fast.models.weights.metadata import Metadata
from tests.support.captioned import model_folder
from tests.support.text_to_image import HEIGHT, WIDTH, numbers, sd3, sd3_pipeline, text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


def run_of(folder: Path, out: Path, alpha: float = 16.0) -> Path:
    """A run folder with the weights.pt of a LoRA run; model and EMA are different."""
    spec = TransformerSpec.read(folder).with_lora(folder, 4, alpha)
    network = spec.on_meta()
    states: list[dict[str, Tensor]] = []
    for seed in (0, 50):
        state = {}
        for number, (name, tensor) in enumerate(network.saved_state().items()):
            state[name] = 0.2 * numbers(*tensor.shape, seed=seed + number)
        states.append(state)
    config = from_dict({"model": {"name": "TextToImage", "folder": str(folder)},
                        "objective": {"gamma": 0.8, "shift": 3.0}})  # fmt: skip
    metadata = Metadata(
        kwargs=spec.to_config(),
        clock="noise_at_1",
        steps=12,
        images_seen=48,
        config=json.dumps(config.to_dict()),
    )
    save_weights(out / "weights.pt", *states, metadata.to_record())
    return out


def velocity(network: nn.Module) -> Tensor:
    cond = text()
    with torch.no_grad():
        return network(
            numbers(2, 16, HEIGHT, WIDTH, seed=9),
            cond["prompt_embeds"],
            cond["pooled_prompt_embeds"],
            torch.tensor([300.0, 800.0]),
        ).sample


@pytest.mark.parametrize("which", ["ema", "model"])
@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_pipeline_is_the_trained_model(
    which: str, alpha: float, folder: Path, tmp_path: Path
) -> None:
    run, file = run_of(folder, tmp_path / "run", alpha), tmp_path / "my.safetensors"
    command = ["export", str(run), "--to", "lora", "--out", str(file), "--weights", which]
    assert main(command) == 0
    trained = load_model(run, which).transformer
    pipeline = sd3_pipeline(sd3())
    plain = velocity(pipeline.transformer)
    pipeline.load_lora_weights(str(file))
    expected = velocity(trained)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(velocity(pipeline.transformer), expected)
    call = {**text(), "latents": numbers(2, 16, HEIGHT, WIDTH), "guidance_scale": 1.0}
    call |= {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 12}
    with torch.no_grad():
        assert torch.equal(pipeline(**call).images, sd3_pipeline(trained)(**call).images)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    close = {"rtol": 0, "atol": 5e-6 * expected.abs().max().item()}
    torch.testing.assert_close(velocity(pipeline.transformer), expected, **close)
    # So it is in a network of ours, and in a file without its header.
    assert torch.equal(velocity(load_adapter(folder, lora=file).network), expected)
    bare = tmp_path / "bare.safetensors"
    save_file(load_file(file), bare)
    pipeline = sd3_pipeline(sd3())
    pipeline.load_lora_weights(str(bare))
    assert torch.equal(velocity(pipeline.transformer), expected)


def test_an_alpha_that_is_no_power_of_two_times_rank(folder: Path, tmp_path: Path) -> None:
    run, file = run_of(folder, tmp_path / "run", 7.0), tmp_path / "my.safetensors"
    export(run, "lora", file)
    pipeline = sd3_pipeline(sd3())
    pipeline.load_lora_weights(str(file))
    expected = velocity(load_model(run).transformer)
    close = {"rtol": 0, "atol": 5e-6 * expected.abs().max().item()}
    torch.testing.assert_close(velocity(pipeline.transformer), expected, **close)


def test_names_and_header(folder: Path, tmp_path: Path) -> None:
    run, file = run_of(folder, tmp_path / "run"), tmp_path / "my.safetensors"
    done = export(run, "lora", file)
    assert done.tensors == 62 and any("alpha / rank = 4 is in lora_B" in n for n in done.notes)
    with safe_open(file, "pt") as opened:
        names, header = set(opened.keys()), opened.metadata()
    assert "transformer.transformer_blocks.1.attn2.to_out.0.lora_B.weight" in names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    expected = {"gamma": "0.8", "timesteps": "beta21", "shift": "3.0", "steps": "12", "rank": "4"}
    expected |= {"trained_alpha": "16", "weights": "ema", "class": "SD3Transformer2DModel"}
    assert expected.items() <= header.items()
    assert header["base"] == TransformerSpec.read(folder).with_lora(folder, 4).lora.base
    assert "lora_adapter_metadata" not in header


def test_half_precision(folder: Path, tmp_path: Path) -> None:
    run, file = run_of(folder, tmp_path / "run"), tmp_path / "my.safetensors"
    export(run, "lora", file, dtype="bf16")
    assert all(tensor.dtype == torch.bfloat16 for tensor in load_file(file).values())
    found = velocity(load_adapter(folder, lora=file).network)
    expected = velocity(load_model(run).transformer)
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_adapters_that_were_not_trained_are_written(folder: Path, tmp_path: Path) -> None:
    spec = TransformerSpec.read(folder).with_lora(folder, 4)
    network = spec.without_weights().to_empty(device="cpu")
    set_initial(network, 0)
    state = {name: tensor for name, tensor in network.state_dict().items() if is_adapter(name)}
    record = Metadata(kwargs=spec.to_config(), clock="noise_at_1").to_record()
    save_weights(tmp_path / "weights.pt", state, state, record)
    export(tmp_path / "weights.pt", "lora", tmp_path / "my.safetensors")
    adapter = load_adapter(folder, lora=tmp_path / "my.safetensors")
    assert torch.equal(velocity(adapter.network), velocity(sd3()))


def test_a_file_that_reads_back_otherwise_does_not_appear(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here alpha is left out, as a program would that writes it beside the tensors."""
    run, file = run_of(folder, tmp_path / "run"), tmp_path / "my.safetensors"
    monkeypatch.setattr(export_lora, "fold_alpha", lambda state, spec: dict(state))
    with pytest.raises(ValueError, match="computes something else than the adapters"):
        export(run, "lora", file)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_what_has_no_adapters_is_refused(folder: Path, tmp_path: Path) -> None:
    spec = TransformerSpec.read(folder)
    state = {f"transformer.{name}": tensor for name, tensor in sd3().state_dict().items()}
    record = Metadata(kwargs=spec.to_config(), clock="noise_at_1").to_record()
    save_weights(tmp_path / "weights.pt", state, state, record)
    with pytest.raises(ValueError, match="holds the whole network, .* export --to diffusers"):
        export(tmp_path / "weights.pt", "lora", tmp_path / "my.safetensors")


def test_the_merged_folder_is_the_trained_model(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, tmp_path / "run")
    export(run, "diffusers", tmp_path / "merged", dtype="fp32")
    expected = velocity(load_model(run).transformer)
    found = velocity(load_adapter(tmp_path / "merged").network)
    close = {"rtol": 0, "atol": 5e-6 * expected.abs().max().item()}
    torch.testing.assert_close(found, expected, **close)
    other = model_folder(tmp_path / "other", large=False)
    file = other / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["proj_out.bias"][0] += 1
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match="another network .* the folder that they were trained on"):
        export(run, "diffusers", tmp_path / "wrong", model=other)
