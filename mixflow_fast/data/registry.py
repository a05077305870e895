"""Datasets by their names in a configuration."""

from __future__ import annotations

import inspect

from mixflow_fast.data.dataset import Dataset
from mixflow_fast.data.embedded import Digits, Photos
from mixflow_fast.messages import did_you_mean


def build_dataset(kind: str, **kwargs: object) -> Dataset:
    """A dataset from its name in a recipe.

    Args:
        kind: "photos" (`Photos`), "digits" (`Digits`), "folder" (`ImageFolder`), "latents"
            (`Latents`).
        kwargs: arguments of that class.

    Raises:
        ValueError: unknown kind, unknown or missing argument, whatever the class refuses.
    """
    from mixflow_fast.data.image_folder import ImageFolder
    from mixflow_fast.data.latents import Latents

    kinds = {"photos": Photos, "digits": Digits, "folder": ImageFolder, "latents": Latents}
    if kind not in kinds:
        raise ValueError(
            f"data kind must be one of {', '.join(kinds)}, got {kind!r}{did_you_mean(kind, kinds)}"
        )
    # Checked here: a TypeError of the class would name its `__init__`, not the setting.
    parameters = inspect.signature(kinds[kind]).parameters
    for key in kwargs:
        if key not in parameters:
            raise ValueError(
                f"unknown argument {key!r} of data {kind!r}, which takes {', '.join(parameters)}"
                f"{did_you_mean(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in kwargs:
            raise ValueError(f"data {kind!r} needs the argument {key!r}")
    return kinds[kind](**kwargs)
