"""Stable Diffusion 3 and 3.5 in diffusers: `SD3Transformer2DModel` (arXiv 2403.03206).

    v = network(x, 1000 s, text, pooled)        x (B, 16, h, w)

The label 1000 s stays float32 to the sinusoid. There is no attention mask: the network sees the
padding of the text, so that embeddings belong to the length that they were made at.
"""

from __future__ import annotations

from torch import Tensor, nn

from mixflow_fast.models.text_to_image.adapter import Condition, DiffusersAdapter, LatentMap


class SD3Adapter(DiffusersAdapter):
    """`SD3Transformer2DModel`: SD3 medium, SD3.5 medium and large.

    A condition holds what `StableDiffusion3Pipeline.encode_prompt` returns:

        prompt_embeds: (B, L, 4096)
        pooled_prompt_embeds: (B, 2048)

    Args as `DiffusersAdapter`.
    """

    BLOCKS = ("JointTransformerBlock",)
    NEEDS = ("prompt_embeds", "pooled_prompt_embeds")
    LATENTS = LatentMap(shift=0.0609, scale=1.5305)

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
        return self.network(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]
