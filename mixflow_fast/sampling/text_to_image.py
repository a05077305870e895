"""Latents from a text-to-image network: Euler's steps along diffusers' noise levels.

    v = v_u + w (v_c - v_u),   x' = x + (s' - s) v

In the clock of adapters (1 is noise) and not in the engine's, because 1 - (1 - s) would not be s:
so the latents are the pipeline's to the bit, where it computes in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mixflow_fast.kernels.philox import Stream, normal
from mixflow_fast.models.text_to_image import Adapter, Condition


def noise_of_ids(seed: int, ids: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Noise that samples begin with: (B, C, h, w) float32, a function of (seed, id) alone.

    The same as `sample`'s for these ids.

    Args:
        seed: of the samples.
        ids: (B,) int64 >= 0, on the device where the noise is wanted.
        shape: (C, h, w).
    """
    return normal(seed, Stream.SAMPLE_NOISE, ids, math.prod(shape)).view(-1, *shape)


@torch.no_grad()
def sample_latents(
    adapter: Adapter,
    noise: Tensor,
    cond: Condition,
    sigmas: Tensor,
    cfg_scale: float = 1.0,
    negative: Condition | None = None,
) -> Tensor:
    """Latents x1 from noise, as `StableDiffusion3Pipeline` makes them.

    Args:
        adapter: of the network. The network's mode is the caller's affair.
        noise: (B, C, h, w) standard normal; the state is kept in float32.
        cond: the prompts.
        sigmas: (N + 1,) decreasing noise levels, of `sigma_grid`.
        cfg_scale: w; 1 takes the prompts alone, one row a sample, and others both in one call.
        negative: condition beside which guidance leads away; None: `adapter.empty(cond)`.

    Returns:
        (B, C, h, w) float32 x1; `adapter.decode` makes them the autoencoder's.

    Raises:
        ValueError: sigmas that do not fall, a scale that is not finite, a negative condition
            that has no meaning; what the adapter raises.
    """
    if sigmas.dim() != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()):
        raise ValueError(
            "sigmas must be (N + 1,) decreasing noise levels (1 = noise), as sigma_grid gives, got "
            f"{sigmas.tolist() if sigmas.dim() == 1 else tuple(sigmas.shape)}"
        )
    if not math.isfinite(cfg_scale):
        raise ValueError(f"cfg_scale must be finite, got {cfg_scale}")
    guided = cfg_scale != 1.0
    if negative is not None and not guided:
        raise ValueError(
            "negative has no meaning with cfg_scale=1: give another scale, or no negative"
        )
    both = cond
    if guided:
        other = adapter.empty(cond) if negative is None else negative
        if other.keys() != cond.keys():
            raise ValueError(
                f"negative must hold what cond holds, {', '.join(cond)}, got {', '.join(other)}"
            )
        both = {key: torch.cat([other[key], cond[key]]) for key in cond}
    x, sigmas = noise.to(torch.float32), sigmas.to(noise.device, torch.float32)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        state = torch.cat([x, x]) if guided else x
        velocity = adapter.velocity(state, sigma.expand(len(state)), both)
        if guided:
            led_from, led_to = velocity.chunk(2)
            velocity = led_from + cfg_scale * (led_to - led_from)
        x = x + (following - sigma) * velocity.to(torch.float32)
    return x
