"""Sections of a configuration: a value has its field's type and passes its field's check.

The type hint of a field says all of it: `int | None`, a `Literal` of names, a tuple of numbers, or
one of these with a rule, as in `Annotated[int, at_least(1)]`. Values are converted and checked
when the section is made, so a section that exists holds no impossible value.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mixflow_fast.config.renamed import refuse_former_value


@dataclass(frozen=True)
class Rule:
    """What a number has to be beside its type; of a tuple, each of its numbers.

    Attributes:
        text: what stands after "must be" in the error.
        holds: whether a value is allowed.
    """

    text: str
    holds: Callable[[float], bool]


def at_least(low: float) -> Rule:
    """The rule that a number is `low` or more."""
    return Rule(f">= {low}", lambda value: value >= low)


Positive = Annotated[int, at_least(1)]
NotNegative = Annotated[int, at_least(0)]
NotNegativeFloat = Annotated[float, at_least(0)]
PositiveFloat = Annotated[float, Rule("> 0", lambda value: value > 0)]
Fraction = Annotated[float, Rule("in [0, 1)", lambda value: 0 <= value < 1)]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the sections, which are frozen dataclasses with keyword-only fields.

    A subclass names itself in its class line: `class TrainConfig(Section, name="train")`.

    Raises:
        ValueError: a field's value of another type or outside its rule, by its dotted name.
    """

    section_name: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "") -> None:
        super().__init_subclass__()
        cls.section_name = name

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            dotted = f"{self.section_name}.{name}" if self.section_name else name
            # The dataclass is frozen for everybody else.
            object.__setattr__(self, name, convert(dotted, getattr(self, name), hint))
        self.check()

    def check(self) -> None:
        """Refuse fields of this section that do not go together.

        Raises:
            ValueError: names the fields, what came, the way out.
        """


def convert(name: str, value: object, hint: object) -> object:
    """`value` as the type of a field.

    Args:
        name: dotted name, for the error.
        value: what a recipe or a caller gave.
        hint: the field's type with its rule.

    Raises:
        ValueError: it has no such meaning, breaks the rule, or is not finite.
    """
    refuse_former_value(name, value)
    converted = _as(value, hint)
    if converted is _MISFIT:
        raise ValueError(f"{name} must be {describe_hint(hint)}, got {value!r}")
    rule = rule_of(hint)
    for item in converted if isinstance(converted, tuple) else (converted,):
        if isinstance(item, float) and not math.isfinite(item):
            raise ValueError(f"{name} must be finite, got {item}")
        if rule is not None and item is not None and not rule.holds(item):
            raise ValueError(f"{name} must be {rule.text}, got {item}")
    return converted


def from_text(text: str, hint: object) -> object:
    """What the text of a recipe or an override says for a field: null, a flag, or the text.

    Numbers stay text, which `convert` reads as Python does: 010 is ten, and 0x10, 1:30 and dates
    are refused.

    Args:
        text: as it was written, quotes of YAML taken off.
        hint: the field's type with its rule.
    """
    options = _options(hint)
    if type(None) in options and text in _NULLS:
        return None
    return _FLAGS.get(text.lower(), text) if bool in options else text


def takes_text(hint: object) -> bool:
    """Whether a field takes any text or one of some names, so that nothing in it is YAML."""
    options = _options(hint)
    return any(o is str or typing.get_origin(o) is Literal for o in options)


class _Misfit:
    """The type of the answer "this value does not fit", since None is a value."""


_MISFIT = _Misfit()
_TYPES = {
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
}
_NULLS = ("", "null", "~")
_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@functools.cache
def hints_of(cls: type[Section]) -> dict[str, object]:
    """The type of each field of a section with its rule, by the field's name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _options(hint: object) -> tuple[object, ...]:
    """The members of a union; any other hint is the only one of itself."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def rule_of(hint: object) -> Rule | None:
    """The rule of a field's numbers beside their type, None where there is none."""
    for option in _options(hint):
        if typing.get_origin(option) is tuple:
            option = typing.get_args(option)[0]
        if typing.get_origin(option) is Annotated:
            return typing.get_args(option)[1]
    return None


def _as(value: object, hint: object) -> object:
    """`value` as the type `hint`, or `_MISFIT`."""
    options = _options(hint)
    if len(options) > 1:
        found = (_as(value, option) for option in options)
        return next((v for v in found if v is not _MISFIT), _MISFIT)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _as(value, args[0])
    if origin is Literal:
        value = _as(value, type(args[0]))
        return value if value in args else _MISFIT
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _MISFIT
        items = tuple(_as(item, args[0]) for item in value)
        return _MISFIT if _MISFIT in items else items
    # A flag is no number, though Python counts with it.
    if isinstance(value, bool) and hint is not bool:
        return _MISFIT
    if hint in (int, float) and isinstance(value, int | float | str):
        return _as_number(value, whole=hint is int)
    return value if isinstance(hint, type) and isinstance(value, hint) else _MISFIT


def _as_number(value: int | float | str, whole: bool) -> int | float | _Misfit:
    """A number, also from text."""
    try:
        if whole and not isinstance(value, float):
            with contextlib.suppress(ValueError):  # 1e6 is whole, and no text of `int`
                return int(value)
        number = float(value)
    except (ValueError, OverflowError):
        return _MISFIT
    if not whole:
        return number
    return int(number) if number.is_integer() else _MISFIT


def describe_hint(hint: object) -> str:
    """What stands after "must be" where a value has another type."""
    options = _options(hint)
    literal = next((option for option in options if typing.get_origin(option) is Literal), None)
    if literal is not None:
        choices = typing.get_args(literal)
        return f"one of {_listed((*choices, 'null') if type(None) in options else choices)}"
    return " or ".join(_describe_one(option) for option in options)


def _describe_one(hint: object) -> str:
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return describe_hint(args[0])
    if typing.get_origin(hint) is tuple:
        choices = typing.get_origin(args[0]) is Literal
        if choices:
            names = typing.get_args(args[0])
            return f"a list of names out of {_listed(names)}, as [{names[0]}]"
        if _bare(args[0]) is str:
            return "a list of texts, as [name]"
        whole = _bare(args[0]) is int
        return "a list of whole numbers, as [1]" if whole else "a list of numbers, as [0.9]"
    if isinstance(hint, type) and issubclass(hint, Section):
        return "a section"
    return _TYPES.get(hint) or getattr(hint, "__name__", str(hint))


def _bare(hint: object) -> object:
    """A type without its rule."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def _listed(choices: Iterable[object]) -> str:
    return ", ".join(map(str, choices))
