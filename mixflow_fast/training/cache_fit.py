"""Whether a cache of captioned images is one for the network that is to train on it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping

import torch

from mixflow_fast.data.captioned import CaptionedInfo, CaptionedLatents
from mixflow_fast.files import ENDS, ends_digest, existing_path, sha256
from mixflow_fast.models.autoencoders.sdvae_files import WEIGHTS
from mixflow_fast.models.text_to_image.network import TextToImage
from mixflow_fast.models.text_to_image.prompts import Part, PromptEncoder, PromptLayout

_WAY_OUT = "give a cache that `mixflow-fast encode` made with the model in model.folder"


def check_cache(
    dataset: CaptionedLatents,
    model: TextToImage,
    layout: PromptLayout,
    encoder: PromptEncoder | None = None,
) -> None:
    """Refuse latents and prompts of another model, before anything is trained on them.

    Args:
        dataset: the cache.
        model: the network, on any device.
        layout: of its prompts.
        encoder: what embeds tokens during training; None for a cache of embeddings.

    Raises:
        ValueError: a cache for another class; latents of other channels or another scale; parts of
            prompts that the network, or the encoder, does not take.
    """
    channels, own = model.in_channels, model.config["class"]
    if dataset.info.class_name != own:
        raise ValueError(
            f"data were encoded for a {dataset.info.class_name}, the network in model.folder is a "
            f"{own}: {_WAY_OUT}"
        )
    if channels is not None and dataset.shape[0] != channels:  # a user's adapter may not say them
        raise ValueError(
            f"data gives latents of {dataset.shape[0]} channels, the network in model.folder takes "
            f"{channels}: {_WAY_OUT}"
        )
    latents = model.config["latents"]
    scale = None if latents is None else latents["scale"]
    # Numbers for each channel are in the stored latents.
    if isinstance(scale, float) and not math.isclose(dataset.scale, scale, rel_tol=1e-6):
        raise ValueError(
            f"data gives latents of scale {dataset.scale:g}, the autoencoder in model.folder says "
            f"{scale:g}: {_WAY_OUT}"
        )
    stored = {
        name: Part(part.shape, getattr(torch, part.dtype))
        for name, part in dataset.prompts.info.parts.items()
    }
    if encoder is None:
        try:
            layout.check(stored)
        except ValueError as error:
            raise ValueError(f"data do not fit the network in model.folder: {error}") from error
    elif stored != encoder.token_parts:
        raise ValueError(
            f"data holds the tokens {_text(stored)}, the encoders in model.folder take "
            f"{_text(encoder.token_parts)}: {_WAY_OUT}"
        )


def check_encoders(info: CaptionedInfo, folder: str | os.PathLike[str]) -> None:
    """Refuse a cache that another autoencoder or other text encoders made than a folder's.

    They may have the same classes and shapes. Compared are files that both have: a transformer's
    own folder has no encoders.

    Args:
        info: of the cache, which says the hashes of what made it.
        folder: model.folder.

    Raises:
        ValueError: a file with another content.
    """
    root = existing_path(folder, "model.folder")
    for name, digest in _recorded(info.model):
        file = root / name
        if not file.is_file():
            continue
        if digest != (ends_digest(file) if digest.startswith(ENDS) else sha256(file)):
            raise ValueError(
                f"data were encoded with another {name} than that in {root}: {_WAY_OUT}, or, if "
                f"they shall be trained on, model.folder={root / 'transformer'}, which has no "
                "encoders"
            )


def _recorded(model: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Names and hashes of weights: configurations change with the library that saves them."""
    encoders, vae = (model.get(name) for name in ("encoders", "vae"))
    for name, digest in encoders.items() if isinstance(encoders, Mapping) else ():
        if name.endswith(".safetensors"):
            yield name, str(digest)
    if isinstance(vae, Mapping) and "weights_sha256" in vae:
        yield f"vae/{WEIGHTS}", str(vae["weights_sha256"])


def _text(parts: dict[str, Part]) -> str:
    return ", ".join(f"{name} {part.shape}" for name, part in parts.items()) or "nothing"
