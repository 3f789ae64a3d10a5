"""Cuts reStructuredText at its headings, and counts the files that it names."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from synth.resources import extras
from synth.resources.sections import Heading, Sections, at_headings

# Nothing outside of the text is read for it, and no complaint of the library's ends the reading.
_SETTINGS = {
    "file_insertion_enabled": False,
    "raw_enabled": False,
    "report_level": 5,
    "halt_level": 5,
    "doctitle_xform": False,
    "syntax_highlight": "none",
    "_disable_config": True,
}
_FOREIGN_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # only the library takes these for line breaks
_LINE_BREAK = re.compile(r"\r\n?|\n")
_DIRECTIVE = re.compile(
    r"^([ \t]*)\.\. (?:\|[^|\n]*\| )?(?P<name>[\w-]+)::(?=(?P<body>.*(?:\n(?:\1[ \t]+.*|[ \t]*$))*))", re.MULTILINE
)


def sections_of(text: str, name: str) -> Sections:
    """Cuts a text, which stays as it stands, or leaves it whole if it is too strange for the library.

    Files that its directives name are not read, but counted.
    """
    publish = extras.load("docutils.core", "reStructuredText").publish_doctree
    try:
        tree = publish(_FOREIGN_BREAKS.sub(" ", text), settings_overrides=_SETTINGS)
    except Exception:  # it raises almost any of them
        return Sections(at_headings(text, [], name))
    nodes = extras.load("docutils.nodes", "reStructuredText")
    return Sections(at_headings(text, _headings(tree, nodes, text), name), left_out=_unread(tree, nodes))


def _headings(tree: Any, nodes: Any, text: str) -> Iterator[Heading]:
    lines = _LINE_BREAK.split(text)
    starts = [0, *(found.end() for found in _LINE_BREAK.finditer(text))]
    for section in tree.findall(nodes.section):
        title = section.line - 2  # what the library counts is the line below it
        is_overlined = title > 0 and lines[title - 1].strip() == lines[title + 1].strip()
        level = 1
        above = section.parent
        while isinstance(above, nodes.section):
            level, above = level + 1, above.parent
        yield Heading(starts[title - is_overlined], level, " ".join(section[0].astext().split()))


def _unread(tree: Any, nodes: Any) -> Counter[str]:
    """Counts the files that directives name. Those that the library does not follow stand in its complaints."""
    left_out = Counter({"pictures": len({image["uri"] for image in tree.findall(nodes.image)})})
    blocks = (block for told in tree.findall(nodes.system_message) for block in told.findall(nodes.literal_block))
    for found in itertools.chain.from_iterable(_DIRECTIVE.finditer(block.astext()) for block in blocks):
        name, body = found["name"], found["body"]
        if name == "toctree":
            lines = [line.strip() for line in body.split("\n")[1:]]
            left_out["files named by toctree"] += sum(bool(line) and not line.startswith(":") for line in lines)
        elif name in ("image", "figure"):
            left_out["pictures"] += 1
        elif re.fullmatch("(?:literal)?include|auto.*", name) or re.search(
            r"^[ \t]+:(?:file|url):", body, re.MULTILINE
        ):
            left_out[f"files named by {name}"] += 1
    return left_out
