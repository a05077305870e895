"""Recipes, dotted overrides, and the types that values must have."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixflow_fast.config.schema import Config
from mixflow_fast.messages import did_you_mean

REQUIRED = "???"


RECIPES = Path(__file__).parent.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `section.field=value` overrides, check names and types.

    Raises:
        ValueError: unknown recipe, key or type, or a `???` left unset; names the nearest valid one.
    """
    import yaml

    file = Path(recipe)
    if file.suffix not in (".yaml", ".yml"):
        if recipe not in recipe_names():
            raise ValueError(
                f"recipe {recipe!r} is not one of {', '.join(recipe_names())}"
                f"{did_you_mean(recipe, recipe_names())}; or give the path of a .yaml file"
            )
        file = RECIPES / f"{recipe}.yaml"
    if not file.is_file():
        raise ValueError(f"recipe file {recipe} does not exist")
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe file {recipe} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe file {recipe} must hold sections, got {type(tree).__name__}")
    tree.setdefault("out", f"runs/{file.stem}")
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"override {override!r} must have the form section.field=value")
        try:
            _set(tree, dotted, yaml.safe_load(text) if text else None)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: value is not valid YAML: {error}") from None
    return from_dict(tree)


def from_dict(tree: dict[str, Any]) -> Config:
    """Build a `Config` from nested dicts; ValueError on unknown keys, wrong types, unset `???`."""
    return _build(Config, tree, "")


def _build(cls: type, tree: dict[str, Any], prefix: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        name = prefix + str(key)
        if key not in fields:
            every = [prefix + f for f in fields] if prefix else _all_names()
            raise ValueError(f"unknown key {name!r}{did_you_mean(name, every)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{name} must be a section, got {value!r}")
            values[key] = _build(hints[key], value, f"{name}.")
        else:
            values[key] = _convert(name, value, hints[key])
    return cls(**values)


def _convert(name: str, value: Any, hint: Any) -> Any:
    if value == REQUIRED:
        raise ValueError(f"{name} must be given: add {name}=VALUE{_HELP.get(name, '')}")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(option)[0]
            if all(isinstance(v, item) and not isinstance(v, bool) for v in value):
                return tuple(value)
        elif option is float and isinstance(value, (int, float, str)):
            # YAML reads 1e-4 as text: it wants 1.0e-4.
            try:
                if not isinstance(value, bool):
                    return float(value)
            except ValueError:
                continue
        elif option is int and isinstance(value, float) and value.is_integer():
            return int(value)
        elif option is int and isinstance(value, str) and _is_integer(value):
            return int(float(value))
        elif isinstance(option, type) and isinstance(value, option):
            if option is bool or not isinstance(value, bool):
                return value
    names = ["null" if o is type(None) else getattr(o, "__name__", str(o)) for o in options]
    expected = " or ".join(names)
    raise ValueError(f"{name} must be {expected}, got {value!r}")


_HELP = {
    "train.init": " (the checkpoint to post-train; null trains from random weights)",
    "data.path": " (latents: .npz, .npy or a folder; folder: class folders with images)",
}


def _is_integer(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ValueError(f"unknown key {dotted!r}{did_you_mean(dotted, _all_names())}")
    tree[name] = value


def _all_names() -> list[str]:
    names = []
    for name, hint in typing.get_type_hints(Config).items():
        names.append(name)
        if dataclasses.is_dataclass(hint):
            names += [f"{name}.{f.name}" for f in dataclasses.fields(hint)]
    return names
