"""Reads texts that are taken as they stand: plain text, Markdown, reStructuredText and source code."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

from cartridges_jax.command_line import files
from synth.resources import extras, rst
from synth.resources.sections import Heading, Section, Sections, at_definitions, at_headings

_DIRECTIVES = re.compile(r"^[ \t]*\.\. (include|literalinclude|toctree|image|figure)::", re.MULTILINE)
PROSE_SUFFIXES = ("", ".txt", ".log")  # other texts of a folder are code, as far as their lines look like it


def read(path: str) -> str:
    """The whole text of a file.

    Raises:
      FileNotFoundError, UserError: there is no such file, it holds no text, or is not UTF-8.
    """
    return files.read_text(path, "a text file: set config.resource.path")


def decode(data: bytes) -> str:
    """Decodes a text of unknown encoding: it is UTF-8, perhaps damaged, or else Latin-1 or Windows' form of that."""
    try:
        return files.decode(data)
    except UnicodeDecodeError:
        pass
    text = data.decode("utf-8", "replace")
    damaged = text.count(files.REPLACEMENT)
    if sum(not character.isascii() for character in text) > 2 * damaged:  # UTF-8 with a few bytes that are not
        return text
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def read_text(path: str) -> list[Section]:
    return [Section(Path(path).name, read(path))]


def read_markdown(path: str) -> list[Section]:
    return at_headings(text := read(path), markdown_headings(text), Path(path).name)


def markdown_headings(text: str) -> list[Heading]:
    """The headings of the document itself, without those in code blocks, quotes and lists."""
    starts = [0, *(found.end() for found in re.finditer(r"\r\n?|\n", text))]
    tokens = extras.load("markdown_it", "a Markdown file").MarkdownIt().parse(text)
    return [
        Heading(starts[token.map[0]], int(token.tag[1]), inside.content)
        for token, inside in itertools.pairwise(tokens)
        if token.type == "heading_open" and token.level == 0
    ]


def read_rst(path: str) -> Sections:
    """A reStructuredText file as it stands. Files that its directives name are not read, but counted."""
    text = read(path)
    unread = Counter(f"files named by {name}" for name in _DIRECTIVES.findall(text))
    return Sections(at_headings(text, rst.headings(text), Path(path).name), left_out=unread)


def split(text: str, path: Path, name: str) -> list[Section]:
    """Cuts one text of a folder into sections, as its suffix tells."""
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown"):
        return at_headings(text, markdown_headings(text), name)
    if suffix == ".rst":
        return at_headings(text, rst.headings(text), name)
    return [Section(name, text)] if suffix in PROSE_SUFFIXES else at_definitions(text, name)
