"""SD3.5 medium and large as they were released, on the meta device."""

from __future__ import annotations

import torch

from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.text_to_image.spec import TransformerSpec

MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
LARGE = MEDIUM | {
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}


def cond(tokens: int, width: int, pooled: int) -> dict[str, torch.Tensor]:
    return {
        "prompt_embeds": torch.empty(1, tokens, width, device="meta"),
        "pooled_prompt_embeds": torch.empty(1, pooled, device="meta"),
    }


def on_meta(config: dict[str, object]) -> TextToImage:
    return TransformerSpec(class_name="SD3Transformer2DModel", config=config).on_meta()
