"""From a configuration to its objects: network, objective, data. Nothing is written."""

from __future__ import annotations

import dataclasses

import torch

from mixflow_fast.config import DATA_FIELDS, Config, validate
from mixflow_fast.data import Source, build_source
from mixflow_fast.models import build
from mixflow_fast.models.sit import SiT
from mixflow_fast.objective import MixFlow


def build_model(config: Config, device: str | torch.device = "cpu") -> SiT:
    """The network of a configuration with its random initial weights (a function of init_seed)."""
    options = dataclasses.asdict(config.model)
    name, seed = options.pop("name"), options.pop("init_seed")
    options = {key: value for key, value in options.items() if value is not None}
    if "z_dims" in options:
        options["z_dims"] = list(options["z_dims"])
        options.pop("learn_sigma")  # REPA's SiT has none
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return build(name, **options)


def build_objective(config: Config, clock: str) -> MixFlow:
    """The objective of a configuration, in the clock of its model."""
    options = dataclasses.asdict(config.objective)
    options.pop("alignment_weight")
    return MixFlow(**options, clock=clock, seed=config.train.seed)


def build_data(config: Config) -> Source:
    """The source of training examples; ValueError if it does not fit the model."""
    d, m = config.data, config.model
    options = {name: getattr(d, name) for name in DATA_FIELDS[d.kind]}
    if d.kind == "latents":
        options["features"] = d.features if config.objective.alignment_weight else False
    elif options["size"] is None:
        options["size"] = m.input_size
    source = build_source(d.kind, **options)
    expected = (m.in_channels, m.input_size, m.input_size)
    if tuple(source.shape) != expected:
        raise ValueError(
            f"data gives examples of shape {tuple(source.shape)}, the model takes {expected}: set "
            "model.in_channels and model.input_size, or data.size"
        )
    if source.num_classes > m.num_classes:
        raise ValueError(
            f"data has {source.num_classes} classes, the model only {m.num_classes}: set "
            "model.num_classes"
        )
    if config.objective.alignment_weight:
        index = torch.zeros(1, dtype=torch.int64)
        features = source.get(index, index, 0).features
        tokens = (m.input_size // build_model(config, "meta").patch_size) ** 2
        fits = None if features is None else tuple(features.shape[1:])
        if fits != (tokens, *m.z_dims):
            raise ValueError(
                f"data.features must be (N, {tokens}, {m.z_dims[0]}): one row per token and "
                f"model.z_dims channels, got (N, *{fits})"
            )
    return source


def check(config: Config, world_size: int = 1) -> None:
    """`validate`, and that network and objective can be built; reads no data or weights."""
    validate(config, world_size)
    build_objective(config, build_model(config, "meta").clock)
