"""Latents of a text-to-image network: diffusers' noise levels, and its pipeline's latents."""

from __future__ import annotations

import pytest
import torch

from mixflow_fast.models.text_to_image import SD3Adapter
from mixflow_fast.sampling import sample_latents, sigma_grid
from tests.support.text_to_image import FAMILIES, numbers, sd3, sd3_pipeline, text


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("steps", [1, 4])
def test_latents_are_the_pipeline_s(steps: int, guidance: float) -> None:
    """Bit for bit, with guidance v_u + w (v_c - v_u) and without."""
    network, noise = sd3(), numbers(2, 16, 8, 6, seed=3)
    cond, nothing = text(2), text(1, seed=50)
    negative = {k: v.repeat(2, *[1] * (v.dim() - 1)) for k, v in nothing.items()}
    theirs = sd3_pipeline(network)(
        **cond,
        **{f"negative_{key}": value for key, value in negative.items()},
        latents=noise,
        guidance_scale=guidance,
        num_inference_steps=steps,
        height=16,
        width=12,
        output_type="latent",
    ).images
    adapter = SD3Adapter(network, empty_prompt=nothing)
    ours = sample_latents(adapter, noise, cond, sigma_grid(steps, 3.0), guidance)
    assert torch.equal(ours, theirs) and not torch.equal(ours, noise)
    if guidance != 1.0:
        given = sample_latents(adapter, noise, cond, sigma_grid(steps, 3.0), guidance, negative)
        assert torch.equal(given, ours)
        half = sample_latents(adapter, noise, cond, sigma_grid(steps, 3.0), guidance / 2)
        assert not torch.equal(half, theirs)


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_other_families_end_where_their_pipelines_do(name: str) -> None:
    """Euler's steps along the levels that the pipeline took: the latents before its last step."""
    family, noise = FAMILIES[name], numbers(2, 16, 8, 6, seed=3)
    network, cond = family.build(), family.cond(2)
    steps = family.record(network, noise, cond, 3)
    sigmas = torch.stack([step.sigma for step in steps])
    ours = sample_latents(family.adapter(network), noise, cond, sigmas)
    torch.testing.assert_close(ours, steps[-1].x, rtol=1e-6, atol=1e-6)


def test_what_is_refused() -> None:
    adapter, noise, cond = SD3Adapter(sd3()), numbers(2, 16, 4, 4), text(2)
    with pytest.raises(ValueError, match="decreasing noise levels"):
        sample_latents(adapter, noise, cond, sigma_grid(3).flip(0))
    with pytest.raises(ValueError, match="decreasing noise levels"):
        sample_latents(adapter, noise, cond, torch.ones(1))
    with pytest.raises(ValueError, match="must be finite"):
        sample_latents(adapter, noise, cond, sigma_grid(3), float("nan"))
    with pytest.raises(ValueError, match="no meaning with cfg_scale=1"):
        sample_latents(adapter, noise, cond, sigma_grid(3), negative=cond)
    with pytest.raises(ValueError, match="must hold what cond holds"):
        sample_latents(adapter, noise, cond, sigma_grid(3), 4.0, {})
    with pytest.raises(ValueError, match="needs the embeddings of the empty one"):
        sample_latents(adapter, noise, cond, sigma_grid(3), 4.0)
