"""Finds the headings of reStructuredText."""

from __future__ import annotations

import re
from collections.abc import Iterator

from synth.resources import extras
from synth.resources.sections import Heading

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
_LINE_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")  # only the library takes these for line breaks


def headings(text: str) -> Iterator[Heading]:
    """Yields the headings of a text, or none if it is too strange for the library."""
    nodes = extras.load("docutils.nodes", "reStructuredText")
    publish = extras.load("docutils.core", "reStructuredText").publish_doctree
    try:
        tree = publish(_LINE_BREAKS.sub(" ", text), settings_overrides=_SETTINGS)
    except Exception:  # it raises almost any of them
        return
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for section in tree.findall(nodes.section):
        title = section.line - 2  # what the library counts is the line below it
        is_overlined = title > 0 and lines[title - 1].strip() == lines[title + 1].strip()
        level = 1
        above = section.parent
        while isinstance(above, nodes.section):
            level, above = level + 1, above.parent
        yield Heading(starts[title - is_overlined], level, " ".join(section[0].astext().split()))
