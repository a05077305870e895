"""Recipes by name or file, and dotted overrides.

Both are read as text, and a field's type says what its text means: nothing is guessed from how a
value looks, as YAML does with 010 (eight), 1:30 (ninety), no (false) and 2026-11-30 (a date).

The marker `???` in a recipe stands for a value that the user has to give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mixflow_fast import recipes
from mixflow_fast.config.data_sections import ANY_KIND, DATA_FIELDS, ENCODER_FIELDS
from mixflow_fast.config.renamed import refuse_former_value
from mixflow_fast.config.schema import SECTIONS, Config, check_key, hint_of
from mixflow_fast.config.section import from_text, takes_text
from mixflow_fast.config.source_section import SOURCE_FIELDS
from mixflow_fast.messages import did_you_mean

REQUIRED = "???"
# Fields that each kind of a section takes.
_KIND_FIELDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "data": {kind: (*fields, *ANY_KIND) for kind, fields in DATA_FIELDS.items()},
    "encoder": ENCODER_FIELDS,
    "source": SOURCE_FIELDS,
}
_HELP = {
    "train.init": " (the checkpoint to post-train; null trains from random weights)",
    "data.path": " (latents: .npz, .npy or a folder; folder: class folders with images; captioned: "
    "a cache of `mixflow-fast encode`)",
    "model.folder": " (a local folder of a diffusers pipeline; nothing is downloaded)",
    "encoder.path": " (a local folder of the encoder; nothing is downloaded)",
    "encoder.stats": " (stat.pt of RAE's files for this encoder and size)",
}


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or path, apply `section.field=value` overrides, check every field.

    Raises:
        ValueError: unknown recipe, a key or value that a field refuses, or a `???` left unset;
            names the nearest valid one.
    """
    file = _recipe_file(recipe)
    tree = _read(file)
    tree.setdefault("out", f"runs/{file.stem}")
    recipe_kinds = {name: _kind_of(tree.get(name)) for name in _KIND_FIELDS}
    for override in overrides:
        _apply(tree, override)
    given = {override.partition("=")[0] for override in overrides}
    for name, kind in recipe_kinds.items():
        if name not in given and _kind_of(tree.get(name)) != kind:
            tree[name] = _without_other_kinds(name, tree[name], given)
    return from_dict(_typed(tree))


def _kind_of(section: object) -> object:
    return section.get("kind") if isinstance(section, dict) else None


def _without_other_kinds(
    name: str, section: dict[str, object], given: set[str]
) -> dict[str, object]:
    """A section whose kind is not the recipe's: what the recipe says for its own kind is gone.

    Args:
        name: of the section.
        section: its fields.
        given: dotted names that the user gave; these stay, and are refused where they mean nothing.
    """
    taken = _KIND_FIELDS[name].get(str(section["kind"]))
    if taken is None:  # no such kind, which is refused later
        return section
    return {k: v for k, v in section.items() if k in ("kind", *taken) or f"{name}.{k}" in given}


def from_dict(tree: Mapping[str, object]) -> Config:
    """Build a `Config` from nested mappings.

    Raises:
        ValueError: an unknown key, a value that its field refuses, a `???` left unset.
    """
    _check_keys(tree)
    values: dict[str, object] = {}
    for key, value in tree.items():
        _check_given(key, value)
        if key in SECTIONS and isinstance(value, Mapping):
            for name, item in value.items():
                _check_given(f"{key}.{name}", item)
            value = SECTIONS[key](**value)
        values[key] = value
    return Config(**values)


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name: {"optim": {"lr": 1e-4}} -> {"optim.lr": 1e-4}."""
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _recipe_file(recipe: str) -> Path:
    file = Path(recipe)
    if file.suffix not in (".yaml", ".yml"):
        if recipe not in recipes.recipe_names():
            raise ValueError(
                f"recipe {recipe!r} is not one of {', '.join(recipes.recipe_names())}"
                f"{did_you_mean(recipe, recipes.recipe_names())}; or give the path of a .yaml file"
            )
        return recipes.FOLDER / f"{recipe}.yaml"
    if not file.is_file():
        raise ValueError(f"recipe file {recipe} does not exist")
    return file


def _read(file: Path) -> dict[str, object]:
    """The tree of a recipe file, whose keys are checked here: the error then names the file."""
    import yaml

    try:
        tree = parse_yaml(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe file {file} is not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"recipe file {file} must hold sections, got {type(tree).__name__}")
    try:
        _check_keys(tree)
    except ValueError as error:
        raise ValueError(f"recipe file {file}: {error}") from None
    return tree


def parse_yaml(text: str) -> object:
    """YAML as lists, mappings and texts; every scalar stays the text that it is.

    Raises:
        yaml.YAMLError: it is no YAML, or a mapping names a key twice.
    """
    import yaml

    class TextLoader(yaml.SafeLoader):
        """Knows no numbers, flags or dates; `<<` still merges mappings."""

        yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                problem = f"the key {twice!r} stands there twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(text, TextLoader)


def _apply(tree: dict[str, object], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"override {override!r} must have the form section.field=value")
    section, _, name = dotted.rpartition(".")
    check_key(dotted, text)
    value = _override_value(override, text, hint_of(dotted))
    if section:
        fields = tree.setdefault(section, {})
        # Another value than a section is refused with the whole tree.
        if isinstance(fields, dict):
            fields[name] = value
    else:
        tree[name] = value


def _override_value(override: str, text: str, hint: object) -> object:
    """The text whole, `#` and all, but for lists and sections, which are YAML."""
    import yaml

    if takes_text(hint) or not text.startswith(("[", "{")):
        return text
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: value is not valid YAML: {error}") from None


def _typed(tree: Mapping[str, object]) -> dict[str, object]:
    """Texts of a tree as what they say for their fields; the keys are known."""

    def typed(name: str, value: object) -> object:
        if name in SECTIONS and isinstance(value, Mapping):
            return {own: typed(f"{name}.{own}", item) for own, item in value.items()}
        return from_text(value, hint_of(name)) if isinstance(value, str) else value

    return {name: typed(name, value) for name, value in tree.items()}


def _check_keys(tree: Mapping[str, object]) -> None:
    for key, value in tree.items():
        check_key(str(key), value)
        section, _, name = str(key).partition(".")
        if name:
            raise ValueError(f"{key} must stand below its section: {section}: {{{name}: ...}}")
        if key in SECTIONS and isinstance(value, Mapping):
            for name, item in value.items():
                check_key(f"{key}.{name}", item)
                refuse_former_value(f"{key}.{name}", item)


def _check_given(name: str, value: object) -> None:
    if value == REQUIRED:
        raise ValueError(f"{name} must be given: add {name}=VALUE{_HELP.get(name, '')}")
