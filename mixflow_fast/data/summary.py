"""What a dataset is, in few values: for a run's first lines and its checkpoints' fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mixflow_fast.messages import shorten


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What the data are, whatever folder they are mounted in.

    Attributes:
        unit: what an example is: "images" or "latents".
        examples: how many.
        classes: labels lie in [0, classes); 0 where examples have prompts in place of them.
        shape: (C, H, W) of x1.
        digest: of names, sizes, labels and a fixed sample; other data have another one.
        class_names: in the order of the labels; empty where classes are numbers.
        notes: lines on what was passed over.
        warnings: lines on what is probably a mistake.
    """

    unit: str
    examples: int
    classes: int
    shape: tuple[int, int, int]
    digest: str
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def describe(self) -> str:
        """ "1,281,167 images, 1000 classes, 3 x 256 x 256"."""
        shape = " x ".join(map(str, self.shape))
        unit = self.unit.removesuffix("s") if self.examples == 1 else self.unit
        classes = f"{count_classes(self.classes)}, " if self.classes else ""
        return f"{self.examples:,} {unit}, {classes}{shape}"

    def to_record(self) -> dict[str, object]:
        """The fingerprint: plain values that decide which example a position stands for."""
        return {
            "examples": self.examples,
            "classes": self.classes,
            "shape": list(self.shape),
            "digest": self.digest,
            "class_names": list(self.class_names),
        }

    def changes(self, record: Mapping[str, object]) -> str:
        """How these data differ from those of a fingerprint, in words; "" if they do not.

        Keys that only one of the two has are passed over: other releases may know others.
        """
        mine = self.to_record()
        changed = [key for key in mine if key in record and record[key] != mine[key]]
        if not changed:
            return ""
        words = [f"{_count(record)} -> {_count(mine)}"]
        names, former = self.class_names, _names(record)
        if "shape" in changed:
            words.append(f"shape {record['shape']} -> {mine['shape']}")
        if added := [name for name in names if name not in set(former)]:
            words.append(f"classes added: {shorten(added)}")
        if removed := [name for name in former if name not in set(names)]:
            words.append(f"classes removed: {shorten(removed)}")
        if changed == ["digest"]:
            words.append(f"other files or labels (digest {record['digest']} -> {self.digest})")
        return "; ".join(words)


def sample_rows(count: int, most: int) -> list[int]:
    """At most `most` row numbers of range(count), evenly spaced and always the same."""
    size = min(count, most)
    return [row * count // size for row in range(size)]


def digest_of(parts: Iterable[bytes]) -> str:
    """16 hexadecimal digits of SHA-256 over some parts, each with its length before it."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def count_classes(count: int) -> str:
    """ "1 class", "1000 classes"."""
    return f"{count} class{'es' * (count != 1)}"


def _count(record: Mapping[str, object]) -> str:
    examples, classes = record.get("examples"), record.get("classes")
    examples = f"{examples:,}" if isinstance(examples, int) else examples
    if classes == 0:
        return f"{examples} examples"
    return f"{examples} examples of " + (
        count_classes(classes) if isinstance(classes, int) else "?"
    )


def _names(record: Mapping[str, object]) -> list[str]:
    names = record.get("class_names")
    return [str(name) for name in names] if isinstance(names, list) else []
