"""Reads HTML: its text in blocks, with headings and list items marked as in Markdown, but no scripts and navigation."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import extras
from synth.resources.sections import Heading, Sections, at_headings
from synth.resources.text import read as read_whole

UNSEEN = ("script", "style", "title")
LEFT_OUT = {
    "nav": "navigation menus",
    "button": "buttons",
    "noscript": "texts for browsers without scripts",
    "template": "templates",
    "iframe": "frames",
    "svg": "pictures",
    "img": "pictures",
    "audio": "films and sounds",
    "video": "films and sounds",
}
MEDIA = ("iframe", "svg", "img", "audio", "video")  # the others are counted only if there are words in them
BLOCK = re.compile(
    "address|article|aside|blockquote|body|br|center|dd|details|div|dl|dt|fieldset|figcaption|figure|footer|form"
    "|h[1-6]|header|hgroup|hr|legend|li|main|menu|ol|optgroup|option|p|pre|search|section|select|summary|table|tbody"
    "|tfoot|thead|tr|ul"
)
CELLS = ("td", "th")
TITLES = re.compile("h[1-6]|dt|summary")  # a button in one opens what stands below
HEADING = re.compile(r"h([1-6])")
_TAG = re.compile(rf"<(/?)({'|'.join(('title', *LEFT_OUT))})\b[^<>]*?(/?)>", re.IGNORECASE)
_POWER = re.compile(r"[+\u2212-]?[\w.]+[+\u2212-]?|\(.*\)")
_ORDINAL = re.compile(r"st|nd|rd|th|er|re|ème|TM|SM|®|\W*")  # nothing changes if these are not raised


def read(path: str) -> Sections:
    sections = sections_of(read_whole(path), Path(path).name)
    if not any(section.text.strip() for section in sections):
        raise UserError(f"{path} holds no text outside its scripts and navigation")
    return sections


def sections_of(source: str, name: str) -> Sections:
    """Cuts a page at its headings. What comes before the first is named by the page's title, or else `name`."""
    page = _Page(source)
    text, headings = page.read()
    return Sections(at_headings(text, headings, page.title() or name), left_out=page.left_out)


def to_text(source: str) -> str:
    """The text of a page as one string, such as an e-mail's body."""
    return _Page(source).read()[0]


class _Page:
    """Walks a tree and writes down what a reader would see."""

    def __init__(self, source: str):
        self._tree = extras.load("bs4", "HTML").BeautifulSoup(source, "html.parser")
        opened, closed = Counter[str](), Counter[str]()
        for end, name, is_empty in _TAG.findall(source):
            if not is_empty:
                (closed if end else opened)[name.lower()] += 1
        # one that is never closed would hide the rest of the page
        self._unclosed = {name for name in opened if opened[name] > closed[name]} - {"img"}
        self.left_out: Counter[str] = Counter()
        self._lines: list[str] = []
        self._line = ""
        self._headings: list[tuple[int, int, str]] = []  # (line, level, title)
        self._verbatim = 0  # how many <pre> are open
        self._cells = 0  # how many <td> and <th>
        self._titles = 0
        self._raised: list[tuple[int, int]] = []  # where every <sup> that is open began: (line, place in it)

    def title(self) -> str:
        found = None if "title" in self._unclosed else self._tree.title
        return " ".join(found.get_text().split()) if found else ""

    def read(self) -> tuple[str, list[Heading]]:
        self._visit(self._tree)
        self._end_line()
        offsets = [0, *itertools.accumulate(len(line) + 2 for line in self._lines)]
        headings = [Heading(offsets[line], level, title) for line, level, title in self._headings]
        return "\n\n".join(self._lines) + "\n", headings

    def _visit(self, tree: Any) -> None:
        """Walks the tree without recursion, as broken pages nest thousands deep."""
        bs4 = extras.load("bs4.element", "HTML")
        words = (bs4.NavigableString, bs4.CData, bs4.RubyTextString)  # not a comment or a doctype
        waiting: list[tuple[Any, bool]] = [(tree, False)]
        while waiting:
            node, is_left = waiting.pop()
            if isinstance(node, bs4.PageElement) and not isinstance(node, bs4.Tag):
                if type(node) in words:
                    self._write(str(node))
            elif is_left:
                self._leave(node)
            elif self._is_left_out(node):
                if node.name in MEDIA or (node.name in LEFT_OUT and node.get_text(strip=True)):
                    self.left_out[LEFT_OUT[node.name]] += 1
            else:
                self._enter(node)
                waiting.append((node, True))
                waiting += [(child, False) for child in reversed(node.contents)]

    def _is_left_out(self, node: Any) -> bool:
        if node.name in self._unclosed or (node.name == "button" and self._titles):
            return False
        return node.name in UNSEEN or node.name in LEFT_OUT

    def _enter(self, node: Any) -> None:
        self._break(node.name)
        self._verbatim += node.name == "pre"
        self._cells += node.name in CELLS
        self._titles += bool(TITLES.fullmatch(node.name))
        if found := HEADING.fullmatch(node.name):
            title = " ".join(node.get_text(" ").split())
            self._headings.append((len(self._lines), int(found[1]), title))
            self._line = "#" * int(found[1]) + " "
        elif node.name == "li":
            self._line = "- "
        elif node.name in CELLS and self._line.strip():
            self._line = self._line.rstrip() + " | "
        elif node.name == "sup":
            self._raised.append((len(self._lines), len(self._line)))
        elif node.name == "rt":
            self._line += "("

    def _leave(self, node: Any) -> None:
        self._break(node.name)
        self._verbatim -= node.name == "pre"
        self._cells -= node.name in CELLS
        self._titles -= bool(TITLES.fullmatch(node.name))
        if node.name == "sup":
            self._raise(node, *self._raised.pop())
        elif node.name == "rt":
            self._line += ")"

    def _raise(self, node: Any, line: int, start: int) -> None:
        """Tells what is raised from what it stands behind: a power as ^2, a note's number as [2]."""
        before, words = self._line[:start], self._line[start:].strip()
        if line != len(self._lines) or not before.strip(" #-") or _ORDINAL.fullmatch(words):
            return  # at the beginning of a line it is the number of a note itself
        if node.parent.name == "a" or any(child.name == "a" for child in node.contents):
            self._line = before + (words if words.startswith(("[", "(")) else f"[{words}]")
        else:
            self._line = before + (f"^{words}" if _POWER.fullmatch(words) else f"^({words})")

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
            self._lines.append(self._line.rstrip().strip("\n") if self._verbatim else self._line.strip(" \n"))
        elif self._headings and self._headings[-1][0] == len(self._lines):
            self._headings.pop()  # an empty heading
        self._line = ""
