"""Commands that measure networks of classes, and networks that are told prompts instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixflow_fast.models.weights.files import WeightsFile


def refuse_text_to_image(command: str, path: Path, file: WeightsFile, weights: str) -> None:
    """ValueError for a network that is told prompts, before it is loaded.

    Args:
        command: that does not measure it.
        path: of its file or run, for the error.
        file: that file, opened.
        weights: which of its weights are meant.
    """
    from mixflow_fast.models.weights.naming import kind_of

    if kind_of(file.state(weights)) == "text-to-image":
        raise ValueError(
            f"{path} is a text-to-image network, which {command} does not measure: it samples from "
            "labels of classes and latents of one size. train.validate_every gives its loss by the "
            "label, `mixflow-fast sample --prompts FILE` pictures of two networks from the same "
            "prompts and noise"
        )
