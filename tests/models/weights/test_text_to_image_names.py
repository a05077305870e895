"""Released networks by names and shapes, without storage; diffusers' own counts and converters."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from torch import Tensor, nn

from mixflow_fast.models.weights.text_to_image_names import (
    Shapes,
    lora_weights,
    text_to_image_network,
)
from tests.support.released_sd3 import LARGE, MEDIUM
from tests.support.text_to_image import FAMILIES, SD3, without_storage
from tests.support.weights import network

SD3_MEDIUM = MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": (), "qk_norm": None}
RELEASED = {
    "SD3 medium": (SD3Transformer2DModel, SD3_MEDIUM, 2_028_328_000),
    "SD3.5 medium": (SD3Transformer2DModel, MEDIUM, 2_243_171_520),
    "SD3.5 large": (SD3Transformer2DModel, LARGE, 8_056_627_520),
    "FLUX.1 dev": (FluxTransformer2DModel, {"guidance_embeds": True}, 11_901_408_320),
    "FLUX.1 schnell": (FluxTransformer2DModel, {}, 11_891_178_560),
    "Z-Image": (ZImageTransformer2DModel, {}, 6_154_908_736),
}


def shapes_of(state: dict[str, Tensor], prefix: str = "") -> Shapes:
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_released_networks_are_named(name: str, prefix: str) -> None:
    cls, config, parameters = RELEASED[name]
    model = without_storage(cls, config)
    found = text_to_image_network(shapes_of(model.state_dict(), prefix))
    assert (found.name, found.class_name, found.prefix) == (name, cls.__name__, prefix)
    assert found.parameters == parameters == sum(p.numel() for p in model.parameters())
    assert found.table == sum(buffer.numel() for buffer in model.buffers())
    assert found.naming == "diffusers" and not found.others
    for field, value in found.config.items():
        assert model.config[field] == value, field
    # What shapes do not tell is the class's default, or no matter of names and shapes.
    again = without_storage(cls, found.config)
    assert shapes_of(again.state_dict()) == shapes_of(model.state_dict())


def original_sd3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in the names of the original code; rows of scale and shift not swapped."""
    outer = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    inner = {
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
    }
    joined = {
        "attn.to_q": ("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        "attn2.to_q": ("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
        "attn.add_q_proj": (
            "context_block.attn.qkv",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ),
    }
    return _renamed(state, "transformer_blocks", "joint_blocks", outer, inner, joined)


def original_flux(state: dict[str, Tensor]) -> dict[str, Tensor]:
    outer = {
        "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
        "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
        "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
        "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
        "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
        "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
        "context_embedder": "txt_in",
        "x_embedder": "img_in",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
    }
    inner = {
        "norm1.linear": "img_mod.lin",
        "norm1_context.linear": "txt_mod.lin",
        "attn.to_out.0": "img_attn.proj",
        "attn.to_add_out": "txt_attn.proj",
        "ff.net.0.proj": "img_mlp.0",
        "ff.net.2": "img_mlp.2",
        "ff_context.net.0.proj": "txt_mlp.0",
        "ff_context.net.2": "txt_mlp.2",
        "attn.norm_q": "img_attn.norm.query_norm",
        "attn.norm_k": "img_attn.norm.key_norm",
        "attn.norm_added_q": "txt_attn.norm.query_norm",
        "attn.norm_added_k": "txt_attn.norm.key_norm",
    }
    joined = {
        "attn.to_q": ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        "attn.add_q_proj": (
            "txt_attn.qkv",
            ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
        ),
    }
    single = {
        "norm.linear": "modulation.lin",
        "proj_out": "linear2",
        "attn.norm_q": "norm.query_norm",
        "attn.norm_k": "norm.key_norm",
    }
    four = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    blocks = {n: t for n, t in state.items() if not n.startswith("single_")}
    singles = {n: t for n, t in state.items() if n.startswith("single_")}
    out = _renamed(blocks, "transformer_blocks", "double_blocks", outer, inner, joined)
    out |= _renamed(
        singles,
        "single_transformer_blocks",
        "single_blocks",
        {},
        single,
        {"attn.to_q": ("linear1", four)},
    )
    # Its norms call their weights so.
    return {name.replace("_norm.weight", "_norm.scale"): t for name, t in out.items()}


def _renamed(
    state: dict[str, Tensor],
    block: str,
    original_block: str,
    outer: dict[str, str],
    inner: dict[str, str],
    joined: dict[str, tuple[str, tuple[str, ...]]],
) -> dict[str, Tensor]:
    out = {}
    for name, tensor in state.items():
        stem, _, part = name.rpartition(".")
        if not name.startswith(f"{block}."):
            out[outer[name] if name in outer else f"{outer[stem]}.{part}"] = tensor
            continue
        _, number, stem = stem.split(".", 2)
        if stem in joined:
            new, parts = joined[stem]
            rows = [state[f"{block}.{number}.{p}.{part}"] for p in parts]
            out[f"{original_block}.{number}.{new}.{part}"] = torch.cat(rows)
        elif stem in inner:
            out[f"{original_block}.{number}.{inner[stem]}.{part}"] = tensor
    return out


@pytest.mark.parametrize("name", ["SD3 medium", "SD3.5 medium", "SD3.5 large", "FLUX.1 dev"])
def test_original_single_files_are_named(name: str) -> None:
    cls, config, parameters = RELEASED[name]
    state = without_storage(cls, config).state_dict()
    flux = cls is FluxTransformer2DModel
    original = (original_flux if flux else original_sd3)(state)
    encoders = {"text_encoders.clip_l.a": (3,), "first_stage_model.decoder.b": (4,)}
    found = text_to_image_network(shapes_of(original, "model.diffusion_model.") | encoders)
    assert (found.name, found.naming, found.class_name) == (name, "original", cls.__name__)
    assert found.parameters == parameters and found.others == tuple(encoders)
    assert found.prefix == "model.diffusion_model."
    by_diffusers = text_to_image_network(shapes_of(state))
    assert found.config == by_diffusers.config
    # The names above are the real ones: diffusers' own converter takes every one of them.
    convert = (
        convert_flux_transformer_checkpoint_to_diffusers
        if flux
        else convert_sd3_transformer_checkpoint_to_diffusers
    )
    assert shapes_of(convert(dict(original))) == shapes_of(state)


def test_other_networks_are_not_taken_for_them() -> None:
    controlnet = SD3 | {"num_layers": 1}
    controlnet.pop("qk_norm"), controlnet.pop("dual_attention_layers")
    others = (
        network(),
        without_storage(SD3ControlNetModel, controlnet),
        without_storage(AuraFlowTransformer2DModel, {"num_mmdit_layers": 1}),
    )
    for other in others:
        assert text_to_image_network(shapes_of(other.state_dict())) is None
        assert lora_weights(shapes_of(other.state_dict())) is None


def test_tiny_networks_are_of_their_kind() -> None:
    named = {
        name: text_to_image_network(shapes_of(family.build().state_dict())).name
        for name, family in FAMILIES.items()
    }
    assert named["sd3.5 medium"] == "a network of SD3.5 medium's kind, width 32, 3 layers"
    assert named["sd3.5 large"].startswith("a network of SD3.5 large's kind")
    assert named["flux"].startswith("a network of FLUX.1 schnell's kind")
    assert named["z-image"].startswith("a network of Z-Image's kind")


EIGHT = ("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out")
EIGHT += ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v")
SECOND = ("attn2.to_k", "attn2.to_out.0", "attn2.to_q", "attn2.to_v")


def lora_of(name: str, targets: tuple[str, ...], rank: int, prefix: str, ends: str) -> Shapes:
    """Factors for every linear map of the network that ends as a target does."""
    cls, config, _ = RELEASED[name]
    down, up = {"peft": ("lora_A", "lora_B"), "old": ("lora.down", "lora.up")}[ends]
    shapes = {}
    for path, module in without_storage(cls, config).named_modules():
        if isinstance(module, nn.Linear) and path.endswith(tuple(f".{t}" for t in targets)):
            shapes[f"{prefix}{path}.{down}.weight"] = (rank, module.in_features)
            shapes[f"{prefix}{path}.{up}.weight"] = (module.out_features, rank)
    return shapes


@pytest.mark.parametrize(
    ("name", "targets", "fits"),
    [
        ("SD3.5 medium", EIGHT + SECOND, "SD3.5 medium"),
        ("SD3.5 medium", EIGHT, "SD3 medium or SD3.5 medium, whose attn2"),
        ("SD3.5 large", EIGHT, "SD3.5 large"),
        ("FLUX.1 dev", ("attn.to_q", "attn.to_v"), "FLUX.1"),
        ("Z-Image", ("attention.to_q", "attention.to_k"), "Z-Image"),
    ],
)
def test_adapters_are_named(name: str, targets: tuple[str, ...], fits: str) -> None:
    shapes = lora_of(name, targets, 16, "transformer.", "peft")
    found = lora_weights(shapes)
    assert found.fits.startswith(fits) and found.ranks == (16,) and not found.alone
    assert found.prefix == "transformer." and found.modules == len(shapes) // 2
    if name.startswith("SD3"):
        assert found.targets == targets
    if targets == EIGHT + SECOND:
        assert found.parameters == 11_943_936  # counted with peft for the specification
    elif (name, targets) == ("SD3.5 medium", EIGHT):
        assert found.parameters == 9_388_032 and found.modules == 191


def test_adapters_that_are_not_whole() -> None:
    shapes = dict(lora_of("SD3.5 large", EIGHT, 4, "base_model.model.", "old"))
    first = next(iter(shapes))
    shapes["base_model.model.x.alpha"] = ()
    del shapes[first]
    found = lora_weights(shapes)
    assert found.alone == (first.removesuffix(".lora.down.weight"),)
    assert found.scaled == 1 and found.prefix == "base_model.model."
    scripts = lora_weights(
        {
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": (8, 1536),
            "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": (4608, 8),
        }
    )
    assert scripts.fits == "SD3 or SD3.5 in sd-scripts' names" and scripts.ranks == (8,)
