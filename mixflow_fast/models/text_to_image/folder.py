"""What stands beside the transformer in a pipeline's folder, for whoever samples with it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mixflow_fast.files import user_path
from mixflow_fast.flow.timesteps import SigmaGrid, resolution_shift
from mixflow_fast.models.text_to_image.loading import read_config, transformer_folder

# Arguments of `resolution_shift` by a scheduler's own names.
_DYNAMIC = {
    "base_tokens": "base_image_seq_len",
    "max_tokens": "max_image_seq_len",
    "base_shift": "base_shift",
    "max_shift": "max_shift",
}


@dataclass(frozen=True)
class PipelineGrid:
    """Noise levels that a pipeline samples with by default.

    Attributes:
        grid: as of `mixflow_fast.sampling.sigma_grid`.
        shift: of the grid; None where the folder has no scheduler.
    """

    grid: SigmaGrid
    shift: float | None


def pipeline_grid(folder: str | os.PathLike[str], tokens: int) -> PipelineGrid:
    """What the official pipeline of a folder samples with.

    SD3's has its scheduler make the levels; those of the others are linspace(1, 1/N, N), with a
    shift that grows with the picture for Flux.

    Args:
        folder: the pipeline's, or the transformer's.
        tokens: (h / 2) (w / 2) of h x w latents.

    Raises:
        ValueError: configurations that cannot be read.
    """
    path = user_path(folder)
    class_name = read_config(transformer_folder(path) / "config.json").get("_class_name")
    grid: SigmaGrid = "diffusers" if class_name == "SD3Transformer2DModel" else "linear"
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return PipelineGrid(grid, None)
    config = read_config(file)
    if config.get("use_dynamic_shifting"):
        given = {ours: config[theirs] for ours, theirs in _DYNAMIC.items() if theirs in config}
        return PipelineGrid(grid, resolution_shift(tokens, **given))
    shift = config.get("shift", 1.0)
    return PipelineGrid(grid, float(shift) if isinstance(shift, int | float) else None)


def autoencoder_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The pipeline's autoencoder; None where the folder has none."""
    path = user_path(folder) / "vae"
    return path if (path / "config.json").is_file() else None


def check_positions(
    folder: str | os.PathLike[str], sizes: Iterable[tuple[int, int]], factor: int, option: str
) -> None:
    """Refuse sizes that the transformer has no positions for, where its class has a table of them.

    Args:
        folder: the pipeline's.
        sizes: (width, height) in pixels.
        factor: pixels of a latent's side.
        option: that the sizes were given by, for the message.

    Raises:
        ValueError: a size that is too large.
    """
    file = user_path(folder) / "transformer" / "config.json"
    if not file.is_file():  # of a user's own class
        return
    config = read_config(file)
    places, patch = config.get("pos_embed_max_size"), config.get("patch_size")
    if not isinstance(places, int) or not isinstance(patch, int):
        return
    most = places * patch * factor
    for width, height in sizes:
        if max(width, height) > most:
            raise ValueError(
                f"{option} {width}x{height}: the transformer of {folder} has positions for at most "
                f"{most} pixels a side (pos_embed_max_size {places})"
            )
