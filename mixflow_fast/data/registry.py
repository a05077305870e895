"""Datasets by their names in a configuration."""

from __future__ import annotations

import inspect
from importlib import import_module

from mixflow_fast.data.dataset import Dataset
from mixflow_fast.messages import did_you_mean

# Module and class of each kind; imported when it is asked for.
_KINDS = {
    "photos": ("embedded", "Photos"),
    "digits": ("embedded", "Digits"),
    "folder": ("image_folder", "ImageFolder"),
    "images": ("prepared_images", "PreparedImages"),
    "webdataset": ("webdataset", "WebDataset"),
    "latents": ("latents", "Latents"),
    "captioned": ("captioned", "CaptionedLatents"),
}


def build_dataset(kind: str, **kwargs: object) -> Dataset:
    """A dataset from its name in a recipe.

    Args:
        kind: "photos" (`Photos`), "digits" (`Digits`), "folder" (`ImageFolder`), "images"
            (`PreparedImages`), "webdataset" (`WebDataset`), "latents" (`Latents`),
            "captioned" (`CaptionedLatents`).
        kwargs: arguments of that class.

    Raises:
        ValueError: unknown kind, unknown or missing argument, whatever the class refuses.
    """
    if kind not in _KINDS:
        raise ValueError(
            f"data kind must be one of {', '.join(_KINDS)}, got {kind!r}"
            f"{did_you_mean(kind, _KINDS)}"
        )
    module, name = _KINDS[kind]
    made: type[Dataset] = getattr(import_module(f"mixflow_fast.data.{module}"), name)
    # Checked here: a TypeError of the class would name its `__init__`, not the setting.
    parameters = inspect.signature(made).parameters
    for key in kwargs:
        if key not in parameters:
            raise ValueError(
                f"unknown argument {key!r} of data {kind!r}, which takes {', '.join(parameters)}"
                f"{did_you_mean(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in kwargs:
            raise ValueError(f"data {kind!r} needs the argument {key!r}")
    return made(**kwargs)
