"""HTML reports as tests read them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A page whose elements nest; what it shows, and what it names.

    Attributes:
        tags: (name, attributes) in order.
        text: what is shown, outside of the style.
        rows: cells of every table row.
        bold: bold text in table cells.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.bold: list[str] = []
        self._open: list[str] = []
        self._parts: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    @property
    def text(self) -> str:
        return "".join(self._parts)

    @property
    def words(self) -> str:
        """The text with one space between words and between elements."""
        return " ".join(" ".join(self._parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            return
        self._parts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data
        if "b" in self._open and "td" in self._open:
            self.bold.append(data)


def assert_loads_nothing(text: str) -> Page:
    """The page, which names nothing outside of itself but by a fragment, and runs no script."""
    assert not re.search(r"https?:|//\w|@import|\bfile:", re.sub(r"base64,[^\"]*", "", text))
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            source = attributes.get(name)
            assert source is None or source.startswith(("data:image/png;base64,", "#")), source
    return page
