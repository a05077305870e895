"""How a number about generated images came about, as a record with a hash: unlike ones are no pair.

The record is JSON in one form (sorted keys, no spaces, floats by `repr`, whole floats as integers,
so that a scale of 1 and of 1.0 are one), and its SHA-256 is the protocol's; people see 12 digits.
What is compared (weights) and what changes rounding only (device, kernels) is not in it.

    sampler     method, intervals, grid (shift, ends), nfe, network_calls, sde, remedy
    guidance    kind, scale, channels, interval, guide_sha256
    source      kind, kappa, mode, w; absent where samples begin at N(0, I)
    precision   network, state, decode, tf32
    set         n, seed, ids, labels, K
    decoder     kind, sha256, scale
    image       size, quantisation
    extractors  [id, sha256, dtype, resize]
    reference   sha256, n
    metrics     ddof, splits, k, pr_fp16
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mixflow_fast.messages import did_you_mean

SCHEMA = "mixflow-protocol/1"
# What decides about the images, about features of them, and about what they are compared with.
PARTS: dict[str, tuple[str, ...]] = {
    "sampling": ("sampler", "guidance", "source", "precision", "set", "decoder", "image"),
    "features": ("extractors",),
    "reference": ("reference", "metrics"),
}
SECTIONS = tuple(section for part in PARTS.values() for section in part)
SHOWN = 12

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True)
class Difference:
    """A field in which protocols differ.

    Attributes:
        field: such as "sampler.method".
        values: of each protocol, in their order; None where it has no such field.
    """

    field: str
    values: tuple[object, ...]

    def __str__(self) -> str:
        if all(value is None for value in self.values):
            return f"{self.field} = None against absent"
        return f"{self.field} = {' against '.join(map(repr, self.values))}"


class Protocol:
    """What a set of samples and the numbers about it came from.

    Args:
        sections: some of SECTIONS, as plain values.

    Attributes:
        record: all of it, `schema` included, in the form that is hashed.

    Raises:
        ValueError: an unknown section, or a value that JSON cannot hold.
    """

    def __init__(self, sections: Mapping[str, object]) -> None:
        for name in sections:
            if name not in (*SECTIONS, "schema"):
                raise ValueError(
                    f"a protocol has no section {name!r}{did_you_mean(name, SECTIONS)}: it has "
                    f"{', '.join(SECTIONS)}"
                )
        if (schema := sections.get("schema", SCHEMA)) != SCHEMA:
            raise ValueError(
                f"the protocol has the schema {schema!r}, expected {SCHEMA!r}: it was written by "
                "another version of mixflow-fast; make the set again, or use that version"
            )
        plain = {name: _plain(value, name) for name, value in sections.items()}
        self.record: dict[str, Json] = {"schema": SCHEMA, **plain}

    def with_sections(self, sections: Mapping[str, object]) -> Protocol:
        """The same with further sections, or with others in their place."""
        return Protocol({**self.record, **sections})

    def part(self, name: str) -> Protocol:
        """What decides about "sampling", "features" or "reference" alone.

        Its hash says what may be used again: images where "sampling" is the same, and their
        features where "features" is so, too.
        """
        if name not in PARTS:
            raise ValueError(f"a protocol has the parts {', '.join(PARTS)}, got {name!r}")
        return Protocol({key: self.record[key] for key in PARTS[name] if key in self.record})

    @property
    def text(self) -> str:
        """The JSON that is hashed."""
        return json.dumps(self.record, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @property
    def sha256(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def short(self) -> str:
        """What people see of the hash."""
        return self.sha256[:SHOWN]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Protocol) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)

    def __repr__(self) -> str:
        return f"Protocol({self.short})"


def differences(protocols: Sequence[Protocol]) -> list[Difference]:
    """The fields, sorted, that are not the same in all of these protocols."""
    flat = [dict(_fields(protocol.record)) for protocol in protocols]
    names = sorted({name for fields in flat for name in fields})
    # A field that is null and one that is absent have different hashes.
    texts = ({_text(fields[name]) if name in fields else "" for fields in flat} for name in names)
    return [
        Difference(name, tuple(fields.get(name) for fields in flat))
        for name, different in zip(names, texts, strict=True)
        if len(different) > 1
    ]


def check_comparable(
    protocols: Mapping[str, Protocol], allow: Iterable[str] = ()
) -> list[Difference]:
    """Refuse to compare numbers that came about in different ways.

    Args:
        protocols: name of what is compared -> its protocol.
        allow: fields that may differ, as "sampler.method" or whole sections as "sampler".

    Returns:
        the differences that were allowed, to be printed above every number; where there are any,
        images of the same id are no pairs, and an interval of paired differences means nothing.

    Raises:
        ValueError: they differ in other fields, which are named; or a field to allow that none of
            them has.
    """
    allowed = list(allow)
    known = {name for p in protocols.values() for name, _ in _fields(p.record)}
    for field in allowed:
        if not any(_is_in(name, field) for name in known):
            raise ValueError(
                f"--allow-different {field}: the protocols have no such field"
                f"{did_you_mean(field, sorted(known))}"
            )
    found = differences(list(protocols.values()))
    refused = [d for d in found if not any(_is_in(d.field, field) for field in allowed)]
    if refused:
        names = ", ".join(f"{name} ({p.short})" for name, p in protocols.items())
        raise ValueError(
            f"{names} have different protocols, so their numbers cannot be compared: "
            f"{'; '.join(map(str, refused))}. Make one of them again as the other, or say that "
            f"it is meant by --allow-different {' '.join(d.field for d in refused)}"
        )
    return found


def _plain(value: object, where: str) -> Json:
    """A value as JSON holds it, in one form; ValueError for what it cannot hold."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} of a protocol must be finite, got {value}")
        return int(value) if value.is_integer() else value
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and "." not in key for key in value):
            raise ValueError(f"keys of {where} must be words without a dot, got {list(value)}")
        return {key: _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}.{i}") for i, inner in enumerate(value)]
    raise ValueError(
        f"{where} of a protocol must be a plain value (numbers, text, lists, mappings), got "
        f"{type(value).__name__}"
    )


def _fields(value: Json, where: str = "") -> Iterable[tuple[str, Json]]:
    """(dotted name, value) of all that holds nothing more; empty lists and mappings are values."""
    inner = (
        value
        if isinstance(value, Mapping)
        else dict(enumerate(value))
        if isinstance(value, list)
        else {}
    )
    if not inner:
        yield where, value
    for key, below in inner.items():
        yield from _fields(below, f"{where}.{key}" if where else str(key))


def _is_in(field: str, name: str) -> bool:
    return field == name or field.startswith(name + ".")


def _text(value: object) -> str:
    return json.dumps(value, sort_keys=True)
