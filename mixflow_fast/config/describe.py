"""What can be set, and what the recipes are, in tables: for `mixflow-fast settings` and `recipes`.

`docs/settings.md` is `settings_markdown()`; a test holds it to that.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from mixflow_fast.config.data_sections import DATA_FIELDS
from mixflow_fast.config.loading import REQUIRED, flatten, parse_yaml
from mixflow_fast.config.schema import SECTIONS, Config, check_key
from mixflow_fast.config.section import Section, describe_hint, hints_of, rule_of
from mixflow_fast.recipes import FOLDER, recipe_names


@dataclass(frozen=True)
class Setting:
    """One field of the configuration.

    Attributes:
        name: dotted name, as an override writes it.
        takes: values that it takes.
        default: as an override writes it.
        text: what it means.
    """

    name: str
    takes: str
    default: str
    text: str


@dataclass(frozen=True)
class RecipeSummary:
    """A recipe that comes with the package.

    Attributes:
        name: as `train` takes it.
        text: the comment at its head.
        asks_for: settings that have to be given with it.
    """

    name: str
    text: str
    asks_for: tuple[str, ...]


def settings(part: str = "") -> list[Setting]:
    """The settings of all sections, of one section, or one setting.

    Args:
        part: name of a section, dotted name of a setting, or "" for all.

    Raises:
        ValueError: there is none of that name, with the nearest one.
    """
    if part:
        check_key(part)
    every = [*_fields(Config), *(f for cls in SECTIONS.values() for f in _fields(cls))]
    return [s for s in every if not part or s.name == part or s.name.startswith(f"{part}.")]


def recipes() -> list[RecipeSummary]:
    """The recipes that come with the package, by name."""
    found = []
    for name in recipe_names():
        text = (FOLDER / f"{name}.yaml").read_text()
        comment = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
        asks_for = [key for key, value in flatten(parse_yaml(text)).items() if value == REQUIRED]
        found.append(RecipeSummary(name, " ".join(comment), tuple(sorted(asks_for))))
    return found


def settings_text(part: str = "", width: int = 100) -> str:
    """`settings(part)` for a terminal: a line with the values, the meaning below it."""
    lines = []
    for setting in settings(part):
        lines.append(f"{setting.name}={setting.default}   ({setting.takes})")
        lines += textwrap.wrap(setting.text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def settings_markdown() -> str:
    """The page docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made by `mixflow-fast settings --markdown` from the sections in `mixflow_fast/config/`; "
        "do not edit it.",
        "",
        "A setting is written as `section.field=value` after the recipe: `mixflow-fast train "
        "photos optim.lr=3e-4 out=runs/one`. A recipe is a YAML file with the same sections and "
        "changes the defaults below; `--dry-run` prints what a run would use.",
    ]
    kinds = "; ".join(f"`{kind}`: {', '.join(names)}" for kind, names in DATA_FIELDS.items())
    for name, cls in {"": Config, **SECTIONS}.items():
        lines += ["", f"## {name or 'The run'}", "", *(inspect.getdoc(cls) or "").splitlines()]
        if name == "data":
            lines += ["", f"What a kind takes: {kinds}; and `workers`, `depth`."]
        lines += ["", "| setting | default | takes | meaning |", "|---|---|---|---|"]
        for s in _fields(cls):
            cells = (f"`{s.name}`", f"`{s.default}`", s.takes, s.text)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _fields(cls: type[Section]) -> Iterator[Setting]:
    texts = _field_texts(cls)
    for field in dataclasses.fields(cls):
        # The sections of `Config`, which have tables of their own.
        if field.default is dataclasses.MISSING:
            continue
        name = f"{cls.section_name}.{field.name}" if cls.section_name else field.name
        yield Setting(
            name, _takes(hints_of(cls)[field.name]), _written(field.default), texts[field.name]
        )


def _takes(hint: object) -> str:
    rule = rule_of(hint)
    return describe_hint(hint) + (f", {rule.text}" if rule is not None else "")


def _written(value: object) -> str:
    """A default as an override writes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_written, value))}]"
    return str(value)


def _field_texts(cls: type[Section]) -> dict[str, str]:
    """The text under each field in the source, which Python itself does not keep."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts = {}
    for field, below in zip(tree.body, tree.body[1:], strict=False):
        text = getattr(below, "value", None)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Constant):
            texts[field.target.id] = " ".join(str(text.value).split())
    return texts
