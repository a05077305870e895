"""What a listing of captioned images holds, and what its captions must be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

from mixflow_fast.data.decoding import OTHER_IMAGE_SUFFIXES
from mixflow_fast.data.foreign import describe_suffixes, other_images

Layout = Literal["text files", "metadata", "webdataset"]
Problem = Literal[
    "image without a caption",
    "caption without an image",
    "empty caption",
    "caption that is not UTF-8",
    "caption that is no text",
    "second image of one name",
    "name outside the folder",
    "row that cannot be read",
    "image that cannot be used",
]
_LINE_ENDS = re.compile(r"\r\n|\r|\n")


@dataclass(frozen=True)
class Item:
    """An image with its captions.

    Attributes:
        name: of the image, relative to the folder; of a tar's member with the tar's name before.
        captions: at least one, none of them empty.
        place: of a tar's member: (number of the tar, offset of the content, bytes).
    """

    name: str
    captions: tuple[str, ...]
    place: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class BadItem:
    """What no item can be made of.

    Attributes:
        name: of the image, of its caption's file or of the row.
        problem: one of a few kinds, by which they are counted.
        detail: more about this one; may be empty.
    """

    name: str
    problem: Problem
    detail: str = ""

    def describe(self) -> str:
        """One line."""
        return f"{self.name}: {self.problem}" + (f" ({self.detail})" if self.detail else "")


class Refused(ValueError):
    """A caption or a row that cannot be used; whoever reads it knows its name."""

    def __init__(self, problem: Problem, detail: str = "") -> None:
        super().__init__(f"{problem}: {detail}" if detail else problem)
        self.problem, self.detail = problem, detail

    def item(self, name: str) -> BadItem:
        """The same with a name."""
        return BadItem(name, self.problem, self.detail)


class Contents(Protocol):
    """Where the images' files are; safe to use from several threads."""

    def read(self, item: Item) -> bytes:
        """An image's file."""
        ...

    def open(self, item: Item) -> BinaryIO:
        """The same as a stream, for its header; OSError says nothing about the image."""
        ...


@dataclass
class Listing:
    """Images with captions before any image was opened.

    Attributes:
        root: the folder of the images or of the tars.
        layout: which of the three it is.
        contents: the images' files.
        items, bad: what can be used and what cannot.
        passed_over: by suffix, how many files are neither.
    """

    root: Path
    layout: Layout
    contents: Contents
    items: list[Item] = field(default_factory=list)
    bad: list[BadItem] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def remarks(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(notes, warnings) on files that were passed over."""
        if not self.passed_over:
            return (), ()
        line = (f"files passed over: {describe_suffixes(self.passed_over)}",)
        return ((), line) if other_images(self.passed_over) else (line, ())


@dataclass(frozen=True)
class FolderFiles:
    """As `Contents`, of files below a folder."""

    root: Path

    def read(self, item: Item) -> bytes:
        """As `Contents.read`."""
        return (self.root / item.name).read_bytes()

    def open(self, item: Item) -> BinaryIO:
        """As `Contents.open`."""
        return (self.root / item.name).open("rb")


def decode_text(content: bytes) -> str:
    """UTF-8, with or without its byte order mark.

    Raises:
        Refused: something else.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start + 1} is 0x{content[error.start]:02x}"
        raise Refused("caption that is not UTF-8", f"{where}: store it as UTF-8") from error


def lines_of(text: str) -> tuple[str, ...]:
    """The captions of a text file: its lines, without the blank ones.

    Raises:
        Refused: there is none.
    """
    return captions_of([line for line in _LINE_ENDS.split(text) if line.strip()])


def captions_of(value: object) -> tuple[str, ...]:
    """The captions that a table's cell holds: a text, or a list of texts.

    Raises:
        Refused: another type, nothing, an empty text.
    """
    if value is None:
        raise Refused("empty caption", "null")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or isinstance(texts, dict | bytes):
        raise Refused("caption that is no text", f"got {value!r}")
    found = []
    for text in texts:
        if not isinstance(text, str) and text is not None:
            raise Refused("caption that is no text", f"got {text!r}")
        if text is None or not text.strip():
            raise Refused("empty caption")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
            raise Refused("caption that is not UTF-8", str(error)) from error
        found.append(text.strip())
    if not found:
        raise Refused("empty caption")
    return tuple(found)


def unread_image(names: Iterable[str]) -> str:
    """ "a.gif is of a format that is not read", of the first such name; "" where there is none."""
    found = [name for name in names if name.lower().endswith(OTHER_IMAGE_SUFFIXES)]
    return f"{found[0]} is of a format that is not read" if found else ""
