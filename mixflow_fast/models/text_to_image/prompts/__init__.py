"""Prompts of text-to-image networks: encoders, their parts, and how a condition is made of them."""

from mixflow_fast.models.text_to_image.prompts.encoder import (
    PromptEncoder,
    Stage,
    prompt_encoder,
)
from mixflow_fast.models.text_to_image.prompts.layout import (
    Part,
    Parts,
    PromptLayout,
    layout_for,
)

__all__ = [
    "Part",
    "Parts",
    "PromptEncoder",
    "PromptLayout",
    "Stage",
    "layout_for",
    "prompt_encoder",
]
