"""What users hand over in place of a checkpoint: it is named, and the next step is told."""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mixflow_fast.checkpoints.inspect import inspect_file
from mixflow_fast.checkpoints.starting_weights import start_from
from mixflow_fast.models import load_model
from mixflow_fast.models.weights.foreign import network_that_is
from tests.support.golden import load
from tests.support.weights import network, run, same


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def tar(path: Path, mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        content = saved({})
        entry = tarfile.TarInfo("weights/ema.pt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("SiT/SiT-XL-2-256.pt", saved({}))


def arrays(path: Path) -> None:
    with open(path, "wb") as file:
        np.savez(file, x=np.zeros(3), y=np.zeros(3))


def optimizer_shard(path: Path) -> None:
    """As DeepSpeed writes it: a class that is not safe to load is in it."""
    torch.save({"optimizer_state_dict": nn.Linear(1, 1), "ds_version": "0.19"}, path)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 2700000000\n"
# A file's name, what writes it, and words of the refusal.
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer.pt": (lambda p: p.write_text(LFS), "Git LFS pointer, .* run `git lfs pull`"),
    "page.pt": (lambda p: p.write_text("\n<!DOCTYPE html>"), "a web page, .* repeat it"),
    "empty.pt": (lambda p: p.write_bytes(b""), "empty: download it again"),
    "config.json": (lambda p: p.write_text('{"a": 1}\n'), "a JSON file, not weights"),
    "recipe.yaml": (lambda p: p.write_text("model: {}\n"), "a text file, not weights"),
    "x.pt.gz": (lambda p: p.write_bytes(gzip.compress(saved({}))), "gzip: unpack it .gunzip"),
    "x.tar.gz": (lambda p: tar(p, "w:gz"), "gzip: unpack it .*tar xzf"),
    "x.tar": (tar, "a tar archive that holds weights/ema.pt: unpack it .tar xf."),
    "x.zip": (zipped, "a zip archive that holds SiT/SiT-XL-2-256.pt: unpack it .unzip."),
    "x.npz": (arrays, "numpy archive .*of x, y, .* not weights; latents are given as data.path"),
    "x.npy": (lambda p: np.save(p, np.zeros(3)), "numpy array .* data.path"),
    "x.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 64), "HDF5 .* Keras"),
    "x.gguf": (lambda p: p.write_bytes(b"GGUF" + b"\0" * 64), "GGUF .* safetensors file"),
    "jit.pt": (
        lambda p: torch.jit.save(torch.jit.script(nn.Linear(1, 1)), p),
        "TorchScript program, .* torch.save.module.state_dict",
    ),
    "module.pt": (lambda p: torch.save(nn.Linear(1, 1), p), "holds torch.nn.modules.*not safe"),
    "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": (
        optimizer_shard,
        "DeepSpeed saved under ZeRO, .*python zero_to_fp32.py . OUT. and give OUT",
    ),
    "zero_pp_rank_0_mp_rank_00_model_states.pt": (
        lambda p: torch.save({"module": {n: torch.ones(0) for n in network().state_dict()}}, p),
        "has names without values: .* zero_to_fp32.py",
    ),
    "opt.pt": (
        lambda p: torch.save(torch.optim.SGD([torch.ones(1)]).state_dict(), p),
        "is an optimizer's state, .* give the checkpoint of a SiT",
    ),
    "tensor.pt": (lambda p: torch.save(torch.ones(3), p), "must hold a dict, got Tensor"),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
@pytest.mark.parametrize("name", FILES)
def test_files_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, words = FILES[name]
    write(tmp_path / name)
    for read in (load_model, inspect_file, lambda path: start_from(network(), path)):
        with pytest.raises(ValueError, match=words) as caught:
            read(tmp_path / name)
        text = str(caught.value)
        assert name in text and "\n" not in text and "damaged" not in text
    code, out, err = run(capsys, "inspect", tmp_path / name)
    assert code == 2 and not out and re.search(words, err)


def golden_names(name: str, part: str) -> list[str]:
    return [n.removeprefix(part) for n in load(name)[0] if n.startswith(part)]


NETWORKS = {
    "adapter .LoRA.": ["base_model.model.blocks.0.attn.qkv.lora_A.weight"],
    "adapter .LoRA., .* merge it": ["lora_unet_down_blocks_0_attentions_0.lora_down.weight"],
    "^a UNet": [
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "down_blocks.0.a",
        "up_blocks.0.a",
    ],
    "^a UNet, which": ["input_blocks.0.0.weight", "time_embed.0.weight", "output_blocks.0.0.a"],
    "Stable Diffusion, with a UNet": [
        *(
            "model.diffusion_model.input_blocks.0.0.weight",
            "model.diffusion_model.output_blocks.0.a",
        ),
        *("first_stage_model.encoder.conv_in.weight", "first_stage_model.decoder.conv_in.weight"),
    ],
    "EDM's network, a UNet": ["model.map_layer0.weight", "model.enc.64x64_conv.w", "model.dec.a"],
    # As released: but for how times are embedded and augmentations told, the names of SongUNet.
    "EDM's network, a .*UNet": [
        *(f"model.map_{name}.weight" for name in ("layer0", "layer1", "augment")),
        *("model.enc.64x64_conv.weight", "model.dec.64x64_aux_conv.weight"),
    ],
    "^an autoencoder .VAE.": [
        "encoder.conv_in.weight",
        "decoder.conv_in.weight",
        "quant_conv.bias",
    ],
    "^half of an autoencoder": ["decoder.conv_in.weight", "decoder.conv_out.weight"],
    "RAE's decoder, half of an auto": ["decoder_embed.weight", "decoder_pred.weight"],
    "image encoder .*teacher.path=FOLDER": [
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.attention.attention.key.weight",
    ],
    "image encoder .ViT": ["cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"],
    "^FLUX": ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"],
    "^Stable Diffusion 3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "Diffusion 3, a text": ["transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"],
    "^LightningDiT": [*network().state_dict(), "blocks.0.mlp.w12.weight", "feat_rope.freqs_cos"],
    "EMA snapshot of a run .* mixflow-fast ema RUN": ["0/pos_embed", "1/pos_embed", "frozen/a"],
}


@pytest.mark.parametrize("words", NETWORKS)
def test_networks_are_named(words: str, tmp_path: Path) -> None:
    names = NETWORKS[words]
    assert re.search(words, network_that_is(names))
    path = tmp_path / "x.safetensors"
    save_file({name: torch.ones(1) for name in names}, path)
    for read in (load_model, lambda path: start_from(network(), path)):
        with pytest.raises(ValueError, match=f"x.safetensors is .*{words.removeprefix('^')}"):
            read(path)
    found = inspect_file(path)
    assert not found.fits and re.search(words.removeprefix("^"), " ".join(found.notes))


def test_a_snapshot_of_a_run_is_named(tmp_path: Path) -> None:
    """Its header describes a network, which it holds several averages of."""
    model, path = network(), tmp_path / "step_00000004.safetensors"
    header = {"model": json.dumps(model.config), "sigma_rel": "[0.1]", "steps": "4"}
    save_file({f"0/{name}": t for name, t in model.state_dict().items()}, path, header)
    for read in (load_model, lambda path: start_from(model, path)):
        with pytest.raises(ValueError, match="an EMA snapshot of a run .*mixflow-fast ema RUN"):
            read(path)


def test_networks_of_this_engine_are_not_taken_for_others() -> None:
    for name in ("sit_0", "repa_0", "rae_ddt_0"):
        assert network_that_is(golden_names(name, "state.")) is None
    assert network_that_is([]) is None
    assert network_that_is(["weight", "bias"]) is None


def test_an_unknown_network_is_said_to_be_one(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    words = "x.pt holds 2 tensors of no network that this engine knows .weight, bias.: give the"
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.ckpt", "x.bin", "x.pth.tar", "x", "x.safetensors"])
def test_content_counts_and_not_the_name(name: str, tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({"ema": state}, tmp_path / name)
    assert same(dict(load_model(tmp_path / name).state_dict()), state)
    save_file(state, tmp_path / f"{name}.pt")
    assert same(dict(load_model(tmp_path / f"{name}.pt").state_dict()), state)


def test_deepspeed_module_is_read(tmp_path: Path) -> None:
    """Of ZeRO 1 and 2, whose model_states hold the whole network."""
    state = {n: t.bfloat16() for n, t in network().state_dict().items()}
    content = {"module": state, "optimizer": None, "ds_config": json.loads("{}"), "global_steps": 5}
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(content, path)
    with pytest.warns(UserWarning, match="no 'ema' weights: took 'module'"):
        model = load_model(path)
    assert torch.equal(model.blocks[0].attn.qkv.weight, state["blocks.0.attn.qkv.weight"].float())
    assert inspect_file(path).steps == 5
