"""A small AutoencoderKL with random weights, as diffusers saves it."""

from __future__ import annotations

import pytest
import torch

# What stabilityai/sd-vae-ft-mse's config.json says.
REAL = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 256,
}
SMALL = REAL | {
    "block_out_channels": [32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 16,
}


def small_autoencoder(seed=0):
    """diffusers' own class; one place of a latent is 2 x 2 pixels."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.AutoencoderKL(**SMALL).eval()


def write_autoencoder(folder, seed=0):
    """A folder of one."""
    small_autoencoder(seed).save_pretrained(folder)
    return folder
