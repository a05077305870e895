"""Tiny text-to-image networks of diffusers with random weights, and their official pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from mixflow_fast.models.text_to_image import Condition, DiffusersAdapter, record_steps
from mixflow_fast.models.text_to_image.flux import FluxAdapter, pack, unpack
from mixflow_fast.models.text_to_image.pipeline_check import RecordedStep
from mixflow_fast.models.text_to_image.sd3 import SD3Adapter
from mixflow_fast.models.text_to_image.z_image import ZImageAdapter
from tests.support import tiny_text

# Two blocks with dual attention and a last one for the image alone: every branch of SD3.5 medium.
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 12,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
SD3_LARGE = SD3 | {"dual_attention_layers": ()}
FLUX = {
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (4, 4, 8),
}
Z_IMAGE = {
    "in_channels": 16,
    "dim": 32,
    "n_layers": 1,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 32,
    "axes_dims": [4, 4, 8],
    "axes_lens": [64, 32, 32],
}
VAE = {
    "latent_channels": 16,
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
}
HEIGHT, WIDTH, TOKENS = 8, 6, 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(**VAE).requires_grad_(False)


def text(batch: int = 2, seed: int = 0) -> Condition:
    """A condition of SD3 and Flux."""
    return {
        "prompt_embeds": numbers(batch, TOKENS, 32, seed=seed),
        "pooled_prompt_embeds": numbers(batch, 64, seed=seed + 1),
    }


def captions(batch: int = 2, seed: int = 0) -> Condition:
    """Z-Image's: captions of 12, 5, 12, 5 ... tokens; what is behind them must not be seen."""
    mask = torch.ones(batch, TOKENS, dtype=torch.bool)
    mask[1::2, 5:] = False
    return {"prompt_embeds": numbers(batch, TOKENS, 32, seed=seed), "prompt_mask": mask}


@dataclass(frozen=True)
class Family:
    """A class of networks, its adapter, and how its official pipeline is run.

    Attributes:
        build: the network with random weights.
        adapter: its adapter's class.
        cond: (batch) -> condition.
        record: (network, noise, condition, steps) -> what the pipeline's scheduler was given.
    """

    build: Callable[[], nn.Module]
    adapter: type[DiffusersAdapter]
    cond: Callable[[int], Condition]
    record: Callable[[nn.Module, Tensor, Condition, int], list[RecordedStep]]


def _build(network: type[nn.Module], config: dict) -> nn.Module:
    torch.manual_seed(0)
    return network(**config)


def without_storage(network: type[nn.Module], config: dict) -> nn.Module:
    """A network on the meta device, of any size."""
    with torch.device("meta"):
        return network(**config)


def sd3_pipeline(network: nn.Module) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _size(noise: Tensor) -> dict[str, int]:
    """Pixels of the tiny autoencoder's images."""
    return {"height": 2 * noise.shape[2], "width": 2 * noise.shape[3]}


def _record_sd3(
    network: nn.Module, noise: Tensor, cond: Condition, steps: int
) -> list[RecordedStep]:
    call = {**cond, "latents": noise, "guidance_scale": 1.0, "num_inference_steps": steps}
    return record_steps(sd3_pipeline(network), **call, **_size(noise), output_type="latent")


def _record_flux(
    network: nn.Module, noise: Tensor, cond: Condition, steps: int
) -> list[RecordedStep]:
    pipeline = FluxPipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    cond = dict(cond)
    guidance = cond.pop("guidance", torch.tensor([3.5]))[0].item()
    call = {**cond, "latents": pack(noise), "guidance_scale": guidance}
    call |= {"num_inference_steps": steps, "output_type": "latent", **_size(noise)}
    back = partial(unpack, height=noise.shape[2], width=noise.shape[3])
    return record_steps(pipeline, back, **call)


def _record_z_image(
    network: nn.Module, noise: Tensor, cond: Condition, steps: int
) -> list[RecordedStep]:
    pipeline = ZImagePipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    tokens = [t[m] for t, m in zip(cond["prompt_embeds"], cond["prompt_mask"], strict=True)]
    call = {"prompt_embeds": tokens, "latents": noise, "guidance_scale": 0.0}
    call |= {"num_inference_steps": steps, "output_type": "latent", **_size(noise)}
    return record_steps(pipeline, **call)


def guided_text(batch: int) -> Condition:
    return text(batch) | {"guidance": torch.full((batch,), 3.5)}


FAMILIES = {
    "sd3.5 medium": Family(
        partial(_build, SD3Transformer2DModel, SD3), SD3Adapter, text, _record_sd3
    ),
    "sd3.5 large": Family(
        partial(_build, SD3Transformer2DModel, SD3_LARGE), SD3Adapter, text, _record_sd3
    ),
    "flux": Family(partial(_build, FluxTransformer2DModel, FLUX), FluxAdapter, text, _record_flux),
    "flux with guidance": Family(
        partial(_build, FluxTransformer2DModel, FLUX | {"guidance_embeds": True}),
        FluxAdapter,
        guided_text,
        _record_flux,
    ),
    "z-image": Family(
        partial(_build, ZImageTransformer2DModel, Z_IMAGE),
        ZImageAdapter,
        captions,
        _record_z_image,
    ),
}


def sd3() -> SD3Transformer2DModel:
    return FAMILIES["sd3.5 medium"].build()


# The whole pipeline's autoencoder: 8 x 8 pixels are one place of a latent, as in the released ones.
EIGHT_TIMES = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
OF_FLUX = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def write_pipeline(
    folder: Path,
    family: Literal["sd3", "flux", "z_image"] = "sd3",
    *,
    t5: bool = True,
    seed: int = 0,
) -> Path:
    """A whole official pipeline with random weights, as `from_pretrained` of its class loads it.

    Prompts of the encoders fit the transformer: SD3's text is (77 + L) x 32 and 64 pooled.

    Args:
        t5: False: without text_encoder_3 and its tokenizer, as people drop it from SD3; diffusers
            then wants text_encoder_3=None and tokenizer_3=None said to `from_pretrained`.
        seed: of all weights.

    Returns:
        `folder`.
    """
    pipeline = {"sd3": _whole_sd3, "flux": _whole_flux, "z_image": _whole_z_image}[family](seed)
    if not t5:
        pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def _seeded(seed: int, build: Callable[..., nn.Module], **config: object) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(**config).eval().requires_grad_(False)


def _whole_sd3(seed: int) -> DiffusionPipeline:
    clip_g_tokenizer = tiny_text.clip_tokenizer(pad="!")
    return StableDiffusion3Pipeline(
        transformer=_seeded(seed, SD3Transformer2DModel, **SD3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_seeded(seed + 1, AutoencoderKL, **VAE | EIGHT_TIMES),
        text_encoder=tiny_text.clip(seed + 2, width=8, projection=24),
        tokenizer=tiny_text.clip_tokenizer(),
        text_encoder_2=tiny_text.clip(
            seed + 3, width=16, projection=40, end=clip_g_tokenizer.eos_token_id
        ),
        tokenizer_2=clip_g_tokenizer,
        text_encoder_3=tiny_text.t5(seed + 4),
        tokenizer_3=tiny_text.t5_tokenizer(),
    )


def _whole_flux(seed: int) -> DiffusionPipeline:
    return FluxPipeline(
        transformer=_seeded(seed, FluxTransformer2DModel, **FLUX),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_seeded(seed + 1, AutoencoderKL, **VAE | EIGHT_TIMES | OF_FLUX),
        text_encoder=tiny_text.clip(seed + 2, width=64, projection=None),
        tokenizer=tiny_text.clip_tokenizer(),
        text_encoder_2=tiny_text.t5(seed + 4),
        tokenizer_2=tiny_text.t5_tokenizer(),
    )


def _whole_z_image(seed: int) -> DiffusionPipeline:
    return ZImagePipeline(
        transformer=_seeded(seed, ZImageTransformer2DModel, **Z_IMAGE),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_seeded(seed + 1, AutoencoderKL, **VAE | EIGHT_TIMES | OF_FLUX),
        text_encoder=tiny_text.qwen(seed + 2),
        tokenizer=tiny_text.qwen_tokenizer(),
    )
