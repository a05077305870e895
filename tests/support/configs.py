"""The shipped recipes with the values that they ask for."""

from __future__ import annotations

from mixflow_fast.config.loading import load_config
from mixflow_fast.config.schema import Config
from mixflow_fast.reports.previews import PreviewOptions

GIVEN = {"train.init": "null", "data.path": "latents"}


def resolved(name: str) -> Config:
    given = {} if name in ("photos", "photos-mixed", "digits") else GIVEN
    if "sd35" in name:
        given = {"model.folder": "sd35", "data.path": "cache"}
    if "repa" in name:
        given = given | {"data.features": "features.npy"}
    if "rae" in name:
        given = given | {"encoder.path": "dinov2", "encoder.stats": "stat.pt"}
    return load_config(name, [f"{key}={value}" for key, value in given.items()])


def preview_options(config: Config) -> PreviewOptions:
    """How previews of a run of this configuration come about."""
    shift, stats = config.objective.shift, config.encoder.stats
    return PreviewOptions.of(config.train, config.model, shift, config.latent, stats)
