"""Reads HTML: its text in blocks, with headings and list items marked as in Markdown, but no scripts and navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import extras
from synth.resources.sections import Heading, Section, at_headings
from synth.resources.text import read as read_whole

LEFT_OUT = ("head", "script", "style", "noscript", "template", "svg", "nav", "iframe", "button")
BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|dd|details|div|dl|dt|figcaption|figure|footer|h[1-6]|header|hr|li|main|ol"
    "|p|pre|section|summary|table|tbody|tfoot|thead|tr|ul"
)
CELLS = ("td", "th")
HEADING = re.compile(r"h([1-6])")


def read(path: str) -> list[Section]:
    sections = sections_of(read_whole(path), Path(path).name)
    if not any(section.text.strip() for section in sections):
        raise UserError(f"{path} holds no text outside its scripts and navigation")
    return sections


def sections_of(source: str, name: str) -> list[Section]:
    """Cuts a page at its headings. What comes before the first is named by the page's title, or else `name`."""
    soup = _parse(source)
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    text, headings = _Text().of(soup)
    return at_headings(text, headings, title or name)


def to_text(source: str) -> str:
    """The text of a page as one string, such as an e-mail's body."""
    return _Text().of(_parse(source))[0]


def _parse(source: str) -> Any:
    return extras.load("bs4", "HTML").BeautifulSoup(source, "html.parser")


class _Text:
    """Walks a tree and writes down what a reader would see."""

    def __init__(self):
        self._lines: list[str] = []
        self._line = ""
        self._headings: list[tuple[int, int, str]] = []  # (line, level, title)
        self._verbatim = 0  # how many <pre> are open
        self._cells = 0  # how many <td> and <th>

    def of(self, tree: Any) -> tuple[str, list[Heading]]:
        self._visit(tree)
        self._end_line()
        offsets = [0]
        for line in self._lines:
            offsets.append(offsets[-1] + len(line) + 2)
        headings = [Heading(offsets[line], level, title) for line, level, title in self._headings]
        return "\n\n".join(self._lines) + "\n", headings

    def _visit(self, tree: Any) -> None:
        """Walks the tree without recursion, as broken pages nest thousands deep."""
        bs4 = extras.load("bs4", "HTML")
        waiting: list[tuple[Any, bool]] = [(tree, False)]
        while waiting:
            node, is_left = waiting.pop()
            if isinstance(node, bs4.PageElement) and not isinstance(node, bs4.Tag):
                if type(node) is bs4.NavigableString:  # not a comment or a doctype
                    self._write(str(node))
            elif is_left:
                self._leave(node)
            elif node.name not in LEFT_OUT:
                self._enter(node)
                waiting.append((node, True))
                waiting += [(child, False) for child in reversed(node.contents)]

    def _enter(self, node: Any) -> None:
        self._break(node.name)
        self._verbatim += node.name == "pre"
        self._cells += node.name in CELLS
        if found := HEADING.fullmatch(node.name):
            title = " ".join(node.get_text(" ").split())
            self._headings.append((len(self._lines), int(found[1]), title))
            self._line = "#" * int(found[1]) + " "
        elif node.name == "li":
            self._line = "- "
        elif node.name in CELLS and self._line.strip():
            self._line = self._line.rstrip() + " | "

    def _leave(self, node: Any) -> None:
        self._verbatim -= node.name == "pre"
        self._cells -= node.name in CELLS
        self._break(node.name)

    def _break(self, name: str) -> None:
        """Ends the line at the border of a block. A paragraph inside of a cell ends no line of the table."""
        if self._cells and name in ("p", "div", "br"):
            self._line += " " if self._line and not self._line.endswith(" ") else ""
        elif BLOCK.fullmatch(name):
            self._end_line()

    def _write(self, text: str) -> None:
        if self._verbatim:
            self._line += text
            return
        words = re.sub(r"\s+", " ", text)
        self._line += words.lstrip() if self._line.endswith(" ") or not self._line else words

    def _end_line(self) -> None:
        if self._line.strip(" #-\n"):
            self._lines.append(self._line.strip(" \n"))
        elif self._headings and self._headings[-1][0] == len(self._lines):
            self._headings.pop()  # an empty heading
        self._line = ""
