"""Adapters in networks of diffusers: which layers, initial values, files, merging."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mixflow_fast.models.text_to_image.lora import (
    TARGETS,
    LoraSpec,
    add_lora,
    fold_alpha,
    load_lora,
    lora_spec,
    lora_state,
    merge_lora,
    read_lora,
    set_initial,
)
from tests.support.released_sd3 import MEDIUM
from tests.support.text_to_image import FAMILIES, HEIGHT, WIDTH, numbers, sd3, sd3_pipeline, text


def randomised(network: nn.Module, seed: int = 3) -> None:
    """B of adapters, which begins at zero, to numbers of training's size."""
    for number, (name, parameter) in enumerate(network.named_parameters()):
        if ".lora_B." in name:
            parameter.data.copy_(0.1 * numbers(*parameter.shape, seed=seed + number))


def velocity(network: nn.Module, name: str = "sd3.5 medium") -> Tensor:
    family = FAMILIES[name]
    with torch.no_grad():
        x, t = numbers(2, 16, HEIGHT, WIDTH, seed=9), torch.tensor([0.3, 0.8])
        return family.adapter(network).velocity(x, t, family.cond(2))


def test_parameters_of_the_released_medium() -> None:
    """9,388,032 in 191 modules by diffusers' list of 8, 11,943,936 with the second attention."""
    with torch.device("meta"):
        network = diffusers.SD3Transformer2DModel(**MEDIUM)
    assert sum(p.numel() for p in network.parameters()) == 2_243_171_520
    eight = [t for t in TARGETS["SD3Transformer2DModel"] if not t.startswith("attn2")]
    assert len(eight) == 8
    for targets, expected, modules in ((tuple(eight), 9_388_032, 191), (None, 11_943_936, 243)):
        with torch.device("meta"):
            network = diffusers.SD3Transformer2DModel(**MEDIUM)
        add_lora(network, lora_spec(network, 16, targets=targets))
        trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in trained.values()) == expected
        assert len(trained) == 2 * modules and all(p.is_meta for p in trained.values())
        assert trained.keys() == {n for n in network.state_dict() if ".lora_" in n}


@pytest.mark.parametrize(
    ("name", "layers"), [("sd3.5 medium", 3 * 8 + 2 * 4 - 1), ("sd3.5 large", 23), ("flux", 15)]
)
def test_usual_targets(name: str, layers: int) -> None:
    """Of the tiny networks: the last SD3 block has no output for the text."""
    network = FAMILIES[name].build()
    add_lora(network, lora_spec(network, 4))
    assert len(lora_state(network)) == 2 * layers


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_changes_at_the_start_and_the_seed_says_the_rest(name: str) -> None:
    network, other = FAMILIES[name].build(), FAMILIES[name].build()
    plain = velocity(network, name)
    before = torch.random.get_rng_state()
    add_lora(network, lora_spec(network, 4), seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(velocity(network, name), plain)
    torch.manual_seed(123)
    add_lora(other, lora_spec(other, 4), seed=5)
    ours, theirs = lora_state(network), lora_state(other)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    set_initial(other, 6)
    assert not any(torch.equal(ours[n], lora_state(other)[n]) for n in ours if "lora_A" in n)
    for tensor_name, tensor in ours.items():
        if "lora_B" in tensor_name:
            assert not tensor.any()
        else:  # peft's kaiming_uniform_(a=sqrt(5))
            bound = math.sqrt(6 / ((1 + 5) * tensor.shape[1]))
            assert 0.8 * bound < tensor.abs().max() <= bound


def test_only_adapters_have_gradients() -> None:
    network = sd3()
    add_lora(network, lora_spec(network, 4))
    randomised(network)
    family = FAMILIES["sd3.5 medium"]
    x, t = numbers(2, 16, HEIGHT, WIDTH), torch.tensor([0.3, 0.8])
    family.adapter(network).velocity(x, t, text()).square().mean().backward()
    with_gradient = {n for n, p in network.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in network.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (("attn.to_qq",), r"'attn.to_qq' matches no linear layer .* did you mean 'attn.to_q'\?"),
        (("attn.to_q", "to_kk"), r"'to_kk' matches no linear layer .* did you mean 'to_k'\?"),
        (("attn",), "'attn' is no linear layer of SD3Transformer2DModel"),
        ((), r"must name at least one layer, got \[\]"),
    ],
)
def test_a_target_that_matches_nothing(targets: tuple[str, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        lora_spec(sd3(), 4, targets=targets)


def test_a_class_without_targets_of_its_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    with pytest.raises(ValueError, match="no targets of its own for Own: set lora.targets"):
        lora_spec(Own(), 4)


def test_two_sets_of_adapters_are_refused() -> None:
    network = sd3()
    spec = lora_spec(network, 4)
    add_lora(network, spec)
    with pytest.raises(ValueError, match="LoRA adapters already"):
        add_lora(network, spec)


def written(network: nn.Module, spec: LoraSpec, file: Path) -> Path:
    state = fold_alpha(lora_state(network), spec)
    save_file({f"transformer.{n}": t.contiguous() for n, t in state.items()}, file)
    return file


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_pipeline_loads_the_file(alpha: float, tmp_path: Path) -> None:
    """Without metadata in it; velocity and latents to the bit, fused to rounding."""
    trained = sd3()
    spec = lora_spec(trained, 4, alpha)
    add_lora(trained, spec)
    randomised(trained)
    file = written(trained, spec, tmp_path / "lora.safetensors")
    pipeline, ours = sd3_pipeline(sd3()), sd3_pipeline(trained)
    plain = velocity(pipeline.transformer)
    pipeline.load_lora_weights(str(file))
    expected = velocity(trained)
    assert (expected - plain).abs().max() > 0.05
    assert torch.equal(velocity(pipeline.transformer), expected)
    call = {**text(), "latents": numbers(2, 16, HEIGHT, WIDTH), "guidance_scale": 1.0}
    call |= {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 12}
    with torch.no_grad():
        assert torch.equal(pipeline(**call).images, ours(**call).images)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    fused = velocity(pipeline.transformer)
    torch.testing.assert_close(fused, expected, rtol=0, atol=5e-6 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_pipelines_of_other_families_load_theirs(name: str, tmp_path: Path) -> None:
    trained = FAMILIES[name].build()
    spec = lora_spec(trained, 4, 8.0)
    add_lora(trained, spec)
    randomised(trained)
    file = written(trained, spec, tmp_path / "lora.safetensors")
    made = diffusers.FluxPipeline if name == "flux" else diffusers.ZImagePipeline
    names = {"scheduler", "vae", "text_encoder", "tokenizer"}
    names |= {"text_encoder_2", "tokenizer_2"} if name == "flux" else set()
    pipeline = made(transformer=FAMILIES[name].build(), **dict.fromkeys(names))
    plain = velocity(pipeline.transformer, name)
    pipeline.load_lora_weights(str(file))
    expected = velocity(trained, name)
    assert (expected - plain).abs().max() > 1e-3
    assert torch.equal(velocity(pipeline.transformer, name), expected)


def test_merging_is_what_diffusers_fuses(tmp_path: Path) -> None:
    trained = sd3()
    spec = lora_spec(trained, 4, 6.0)
    add_lora(trained, spec)
    randomised(trained)
    expected, state = velocity(trained), lora_state(trained)
    weight = sd3().transformer_blocks[1].attn2.to_q.weight
    down, up = (state[f"transformer_blocks.1.attn2.to_q.lora_{p}.weight"] for p in "AB")
    by_hand = (weight.double() + 1.5 * up.double() @ down.double()).float()
    merge_lora(trained)
    assert trained.state_dict().keys() == sd3().state_dict().keys()
    torch.testing.assert_close(trained.transformer_blocks[1].attn2.to_q.weight, by_hand)
    found = velocity(trained)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-6 * expected.abs().max().item())
    trained.save_pretrained(tmp_path)
    again = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(velocity(again), found)


def test_a_file_goes_into_a_network(tmp_path: Path) -> None:
    trained = sd3()
    spec = lora_spec(trained, 4, 16.0, ("attn.to_q", "ff.net.2"))
    add_lora(trained, spec)
    randomised(trained)
    file = written(trained, spec, tmp_path / "lora.safetensors")
    network = sd3()
    found = load_lora(network, file)
    assert (found.rank, found.alpha) == (4, 4.0) and len(found.targets) == 6
    assert torch.equal(velocity(network), velocity(trained))


def test_a_file_that_diffusers_writes_is_read(tmp_path: Path) -> None:
    trained = sd3()
    add_lora(trained, lora_spec(trained, 4))
    randomised(trained)
    pipeline = sd3_pipeline(sd3())
    pipeline.save_lora_weights(tmp_path, transformer_lora_layers=lora_state(trained))
    network = sd3()
    load_lora(network, tmp_path / "pytorch_lora_weights.safetensors")
    assert torch.equal(velocity(network), velocity(trained))


def _damaged(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    first = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
    if how == "half":
        return {name: tensor for name, tensor in state.items() if name != first}
    if how == "ranks":
        return state | {first: state[first][:2].contiguous()}
    if how == "not finite":
        return state | {first: state[first] * math.nan}
    if how == "kohya":
        return {name.replace(".", "_"): tensor for name, tensor in state.items()}
    return {name.replace("blocks.0", "blocks.7"): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ("half", r"whole adapters of one rank, got half of transformer_blocks.0.attn.to_q"),
        ("ranks", r"whole adapters of one rank, got ranks \[2, 4\]"),
        ("not finite", "holds numbers that are not finite"),
        ("kohya", "as diffusers writes them, got transformer_transformer_blocks"),
        ("layers", r"of another network .* transformer_blocks.7.attn.\w+ is \(32, 32\), the"),
    ],
)
def test_files_that_do_not_fit(how: str, match: str, tmp_path: Path) -> None:
    trained = sd3()
    spec = lora_spec(trained, 4)
    add_lora(trained, spec)
    file = tmp_path / "lora.safetensors"
    whole = {f"transformer.{n}": t.clone() for n, t in lora_state(trained).items()}
    save_file(_damaged(whole, how), file)
    with pytest.raises(ValueError, match=match):
        load_lora(sd3(), file)
    with pytest.raises(ValueError, match="cannot be read"):
        file.write_bytes(b"x" * 20)
        read_lora(file)
