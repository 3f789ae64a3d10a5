"""Sections are consecutive pieces of one text, each with a name that says where it stands. Here texts are cut so."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping

SEPARATOR = " > "  # between a heading and the one below it

_DEFINITION = re.compile(
    r"""^(?:(?:export|default|public|private|protected|internal|static|abstract|final|async|unsafe|pub(?:\([^)]*\))?)
            [ ]+)*
        (?:def|class|func|function\*?|fn|struct|enum|trait|impl|interface|module|type|namespace|record)\b
        (?:<[^>]*>)? [ ]+ (?:\([^)]*\)[ ]*)? (?P<name>(?:[\w.$]|::)+)
      | ^\w[\w\s*&:<>,]*? \b(?P<function>\w+)\([^;=]*\)\s*\{[^;}]*$  # C and its kin
    """,
    re.VERBOSE,
)
_LEADS_TO_DEFINITION = re.compile(r"[@#/*]| \*|\[\w|template\b")  # decorators, attributes and comments


@dataclasses.dataclass(frozen=True)
class Section:
    name: str
    text: str  # with the white space behind it, so that joined sections are the whole text


class Sections(list[Section]):
    """What a reader returns: sections, counts of what there was to read, and counts of what was left out, by reason."""

    def __init__(
        self,
        sections: Iterable[Section] = (),
        read: Mapping[str, int] | None = None,
        left_out: Mapping[str, int] | None = None,
    ):
        super().__init__(sections)
        self.read = Counter(read)  # none: the sections themselves are counted
        self.left_out = +Counter(left_out)  # those that are more than 0

    def __str__(self) -> str:
        read = _counted(self.read or {"sections": len(self)})
        return f"read {read}, {sum(len(section.text) for section in self)} characters; {told(self.left_out)}"


@dataclasses.dataclass(frozen=True)
class Heading:
    offset: int  # in characters of the text
    level: int  # 1 is the highest
    title: str


def at_headings(text: str, headings: Iterable[Heading], name: str) -> list[Section]:
    """Cuts `text` before every heading; a section is named by its heading and those it stands under.

    What comes before the first heading is named `name`.
    """
    above: list[Heading] = []
    sections, start, title = [], 0, name
    for heading in headings:
        if text[start : heading.offset].strip():
            sections.append(Section(title, text[start : heading.offset]))
            start = heading.offset
        above = [*(h for h in above if h.level < heading.level), heading]
        title = SEPARATOR.join(h.title for h in above if h.title) or name
    return [*sections, Section(title, text[start:])]


def at_definitions(code: str, name: str) -> list[Section]:
    """Cuts source code before its outermost functions and classes, which most languages show by how a line begins."""
    lines = code.splitlines(keepends=True)
    begins: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        if found := _DEFINITION.match(line):
            first = number
            while first and _LEADS_TO_DEFINITION.match(lines[first - 1]):
                first -= 1
            begins.append((first, found["name"] or found["function"]))
    sections = []
    for (start, title), (end, _) in itertools.pairwise([(0, ""), *begins, (len(lines), "")]):
        if text := "".join(lines[start:end]):
            sections.append(Section(f"{name}{SEPARATOR}{title}" if title else name, text))
    return sections


def told(left_out: Mapping[str, int]) -> str:
    """The end of a sentence about what was read; counts of zero are not told."""
    counts = {name: count for name, count in left_out.items() if count}
    return f"left out: {_counted(counts)}" if counts else "nothing was left out"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
