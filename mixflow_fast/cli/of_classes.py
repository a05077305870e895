"""Commands that measure networks of classes, and networks that are told prompts instead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mixflow_fast.models import Network


def refuse_text_to_image(command: str, path: Path, model: Network) -> None:
    """ValueError for a network that is told prompts.

    Args:
        command: that does not measure it.
        path: of its file or run, for the error.
        model: the network.
    """
    from mixflow_fast.models.text_to_image.network import TextToImage

    if isinstance(model, TextToImage):
        raise ValueError(
            f"{path} is a text-to-image network, which {command} does not measure: it samples from "
            "labels of classes and latents of one size. train.validate_every gives its loss by the "
            "label, `mixflow-fast sample --prompts FILE` pictures of two networks from the same "
            "prompts and noise"
        )
