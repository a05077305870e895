"""What stands beside the transformer in a pipeline's folder, for whoever samples with it."""

from __future__ import annotations

import os
from pathlib import Path

from mixflow_fast.files import user_path
from mixflow_fast.models.text_to_image.loading import read_config


def scheduler_shift(folder: str | os.PathLike[str]) -> float | None:
    """Time shift of the pipeline's grid; None without a scheduler, or with one for each size.

    Args:
        folder: the pipeline's.

    Raises:
        ValueError: a scheduler's configuration that cannot be read.
    """
    file = user_path(folder) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    config = read_config(file)
    shift = config.get("shift")
    if config.get("use_dynamic_shifting") or not isinstance(shift, int | float):
        return None
    return float(shift)


def autoencoder_folder(folder: str | os.PathLike[str]) -> Path | None:
    """The pipeline's autoencoder; None where the folder has none."""
    path = user_path(folder) / "vae"
    return path if (path / "config.json").is_file() else None
