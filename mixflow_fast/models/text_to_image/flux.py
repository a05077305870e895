"""FLUX.1 in diffusers: `FluxTransformer2DModel`.

    v = unpack(network(pack(x), s, text, pooled[, guidance]))     pack: (B, 16, h, w) -> (B, N, 64)

The class multiplies s by 1000 itself, after it has rounded s to the dtype of its tokens; the
pipeline rounds 1000 s to it before that, and its arithmetic is repeated here to the bit. (The two
labels differ for a quarter of all s in bf16, by one rounding.) So tokens go in in the dtype that
the network computes in, under autocast too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixflow_fast.models.text_to_image.adapter import Condition, DiffusersAdapter, LatentMap


def pack(x: Tensor) -> Tensor:
    """Latents (B, C, h, w) as tokens (B, h/2 w/2, 4C): features in the order channel, row, column.

    Another order than `MixFlow.prepare(patch_size=2)` writes.
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`: (B, h/2 w/2, 4C) -> (B, C, h, w)."""
    batch, _, features = tokens.shape
    x = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


class FluxAdapter(DiffusersAdapter):
    """`FluxTransformer2DModel`: FLUX.1 dev, schnell and their derivatives.

    A condition holds what `FluxPipeline.encode_prompt` returns, and the strength of the distilled
    guidance where the network was distilled with one (`guidance_embeds`):

        prompt_embeds: (B, L, 4096)
        pooled_prompt_embeds: (B, 768)
        guidance: (B,) float32; the pipeline's default is 3.5

    Args as `DiffusersAdapter`.
    """

    BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    NEEDS = ("prompt_embeds", "pooled_prompt_embeds")
    LATENTS = LatentMap(shift=0.1159, scale=0.3611)

    def __init__(
        self,
        network: nn.Module,
        latents: LatentMap | None = None,
        empty_prompt: Condition | None = None,
    ) -> None:
        super().__init__(network, latents, empty_prompt)
        self.channels = network.config["in_channels"] // 4
        self._guided = bool(network.config["guidance_embeds"])

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """d x / d t at noise levels t.

        Args:
            x: (B, C, h, w) latents, h and w even.
            t: (B,) float32 in [0, 1], 1 = noise.
            cond: as the class says.

        Returns:
            (B, C, h, w) in the dtype that the network computes in.

        Raises:
            ValueError: shapes, dtypes or keys that do not fit; a guidance that is missing, or that
                the network has no use for.
        """
        if self._guided != ("guidance" in cond):
            raise ValueError(
                "this network was distilled with a guidance: cond must hold guidance, (B,) float32 "
                "(the pipeline's default is 3.5)"
                if self._guided
                else "cond holds guidance, but this network has no guidance_embeds: leave it out"
            )
        guidance = cond.get("guidance")
        x, t, cond = self._inputs(x, t, cond, self.channels)
        height, width = x.shape[2:]
        text = cond["prompt_embeds"]
        tokens = self.network(
            hidden_states=pack(x),
            timestep=(1000 * t).to(x.dtype) / 1000,
            # Float32, as the pipeline gives it: the class rounds it once.
            guidance=guidance,
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"],
            txt_ids=torch.zeros(text.shape[1], 3, device=x.device),
            img_ids=_image_ids(height // 2, width // 2, x.device),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows columns, 3) positions of the tokens: 0, row, column."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)[None, :]
    return ids.view(rows * columns, 3)
