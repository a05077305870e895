"""From a configuration to its objects: network, objective, data. Nothing is written."""

from __future__ import annotations

import dataclasses

import torch

from mixflow_fast.config.schema import DATA_FIELDS, Config
from mixflow_fast.config.validate import validate
from mixflow_fast.data import Dataset, build_dataset
from mixflow_fast.models import Execution, Transformer, build
from mixflow_fast.models.teacher import Teacher, TeacherFiles
from mixflow_fast.objective.mixflow import MixFlow

# Fields of the section `model` that are not arguments of the class.
_NOT_ARGUMENTS = ("name", "init_seed", "mode", "attention", "checkpointing")


def build_model(config: Config, device: str | torch.device = "cpu") -> Transformer:
    """The network of a configuration with its random initial weights (a function of init_seed)."""
    options = {f.name: getattr(config.model, f.name) for f in dataclasses.fields(config.model)}
    options = {k: v for k, v in options.items() if v is not None and k not in _NOT_ARGUMENTS}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    if config.model.name.startswith("DiTDH") and "qk_norm" in options:
        options["use_qknorm"] = options.pop("qk_norm")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(config.model.init_seed)
        return build(config.model.name, **options)


def build_execution(config: Config, device: torch.device) -> Execution:
    """How the network of a configuration is run on a device."""
    m = config.model
    mode = m.mode
    if mode == "auto":
        compiles = device.type == "cuda" and config.train.zero_stage < 3
        mode = "compile" if compiles else "eager"
    return Execution(mode=mode, attention=m.attention, checkpointing=m.checkpointing)


def build_objective(config: Config, clock: str) -> MixFlow:
    """The objective of a configuration, in the clock of its model."""
    options = dataclasses.asdict(config.objective)
    for name in ("alignment_weight", "alignment_input"):  # the trainer's: see alignment.py
        options.pop(name)
    return MixFlow(**options, clock=clock, seed=config.train.seed)


def build_data(config: Config) -> Dataset:
    """The source of training examples; ValueError if it does not fit the model."""
    d, m = config.data, config.model
    options = {name: getattr(d, name) for name in DATA_FIELDS[d.kind]}
    if d.kind == "latents":
        options["features"] = d.features or False
        options["images"] = d.images
    elif options["size"] is None:
        options["size"] = m.input_size
    dataset = build_dataset(d.kind, **options)
    expected = (m.in_channels, m.input_size, m.input_size)
    if tuple(dataset.shape) != expected:
        raise ValueError(
            f"data gives examples of shape {tuple(dataset.shape)}, the model takes {expected}: set "
            "model.in_channels and model.input_size, or data.size"
        )
    if dataset.num_classes > m.num_classes:
        raise ValueError(
            f"data has {dataset.num_classes} classes, the model only {m.num_classes}: set "
            "model.num_classes"
        )
    if config.objective.alignment_weight and config.teacher.path is None:
        index = torch.zeros(1, dtype=torch.int64)
        features = dataset.get(index, index, 0).features
        tokens = _token_side(config) ** 2
        fits = None if features is None else tuple(features.shape[1:])
        if fits != (tokens, *m.z_dims):
            raise ValueError(
                f"data.features must be (N, {tokens}, {m.z_dims[0]}): one row per token and "
                f"model.z_dims channels, got (N, *{fits})"
            )
    return dataset


def build_teacher(config: Config, device: str | torch.device = "cpu") -> Teacher | None:
    """The frozen teacher of a configuration on its device; None without one.

    Raises:
        ValueError: files that are missing, or tokens that do not fit the model's.
    """
    if config.teacher.path is None:
        return None
    _check_teacher(config)
    options = dataclasses.asdict(config.teacher)
    options["precision"] = options["precision"] or config.train.precision
    return Teacher(options.pop("path"), _token_side(config), device=device, **options)


def _token_side(config: Config) -> int:
    return config.model.input_size // build_model(config, "meta").patch_size


def _check_teacher(config: Config) -> None:
    """What the teacher's config.json can tell."""
    files, (width,) = TeacherFiles.read(config.teacher.path), config.model.z_dims
    files.resolution(_token_side(config), config.teacher.resolution)
    if files.hidden_size != width:
        raise ValueError(
            f"the teacher {config.teacher.path} has {files.hidden_size} channels, the model's "
            f"projector {width}: set model.z_dims=[{files.hidden_size}], or take another teacher"
        )


def check(config: Config, world_size: int = 1) -> None:
    """`validate`, and that network and objective can be built; reads no data or weights.

    Of a teacher it reads the config.json.
    """
    validate(config, world_size)
    build_objective(config, build_model(config, "meta").clock)
    if config.teacher.path is not None:
        _check_teacher(config)
