"""Z-Image in diffusers: `ZImageTransformer2DModel`.

    v = -network([x_i], 1 - s, [caption_i])         x_i (C, 1, h, w), caption_i (L_i, D)

Everything is the other way round: the network's time is 1 at the data, its output is data - noise,
and a batch is a list, whose captions have lengths of their own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mixflow_fast.models.text_to_image.adapter import Condition, DiffusersAdapter, LatentMap


class ZImageAdapter(DiffusersAdapter):
    """`ZImageTransformer2DModel`: Z-Image.

    `ZImagePipeline.encode_prompt` returns a list of (L_i, 2560); a condition holds it padded:

        prompt_embeds: (B, L, 2560)
        prompt_mask: (B, L) bool, true where a token is no padding

    Cutting captions out reads their lengths on the host, once a call. The pipeline's guidance scale
    g is v + g (v - v_u), so its g is our cfg_scale - 1.

    Args as `DiffusersAdapter`.
    """

    BLOCKS = ("ZImageTransformerBlock",)
    NEEDS = ("prompt_embeds", "prompt_mask")
    LATENTS = LatentMap(shift=0.1159, scale=0.3611)

    def __init__(
        self,
        network: nn.Module,
        latents: LatentMap | None = None,
        empty_prompt: Condition | None = None,
    ) -> None:
        super().__init__(network, latents, empty_prompt)
        self.channels = network.config["in_channels"]

    def velocity(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """d x / d t at noise levels t.

        Args:
            x: (B, C, h, w) latents, h and w even.
            t: (B,) float32 in [0, 1], 1 = noise.
            cond: as the class says.

        Returns:
            (B, C, h, w) in the dtype that the network computes in.

        Raises:
            ValueError: shapes, dtypes or keys that do not fit.
        """
        x, t, cond = self._inputs(x, t, cond, self.channels)
        text, mask = cond["prompt_embeds"], cond["prompt_mask"]
        if mask.shape != text.shape[:2] or mask.dtype != torch.bool:
            raise ValueError(
                f"prompt_mask must be (B, L) = {tuple(text.shape[:2])} bool, got "
                f"{tuple(mask.shape)} {mask.dtype}"
            )
        # Tokens before padding, so that slices do: each boolean index would wait for the device.
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        text = text.gather(1, order.unsqueeze(-1).expand_as(text))
        lengths = mask.sum(1).tolist()
        captions = [tokens[:length] for tokens, length in zip(text, lengths, strict=True)]
        # The pipeline's arithmetic, of which 1 - t may differ in the last bit.
        time = (1000 - 1000 * t) / 1000
        images = list(x.unsqueeze(2).unbind(0))
        out = self.network(images, time, captions, return_dict=False)[0]
        return -torch.stack(list(out)).squeeze(2)

    def _empty_prompt_for(self, cond: Condition) -> Condition:
        """The empty prompt, padded to the length of the prompts."""
        prompt = super()._empty_prompt_for(cond)
        return {key: _padded(prompt[key], cond[key].shape[1]) for key in self.NEEDS}


def _padded(value: Tensor, length: int) -> Tensor:
    """(1, L, ...) with zeros behind it, up to `length` tokens; longer ones are left as they are."""
    missing = max(0, length - value.shape[1])
    return torch.cat([value, value.new_zeros(1, missing, *value.shape[2:])], dim=1)
