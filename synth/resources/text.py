"""Reads texts that are taken as they stand: plain text, Markdown, reStructuredText and source code."""

from __future__ import annotations

import contextlib
import itertools
import re
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.resources import extras, rst
from synth.resources.sections import Heading, Section, Sections, at_definitions, at_headings

_DECLARATION = re.compile(rb"(?:charset|coding)\s*[:=]\s*[\"']?([\w.-]+)")  # of XML, HTML, Python, Emacs and Vim
_LATIN = (b"iso-8859-1", b"latin", b"ascii", b"us-ascii")  # often declared for what is Windows' form of it
_BEGINNING = 2**16  # bytes
PROSE_SUFFIXES = ("", ".txt", ".log")  # other texts of a folder are code, as far as their lines look like it


def read(path: str) -> str:
    """The text of a file. Raises: FileNotFoundError, UserError: it is not there, holds no text, or is not UTF-8."""
    text = files.read_text(path, "a text file: set config.resource.path")
    if "\0" in text:
        raise UserError(f"{path} holds zero bytes: it is no text, or UTF-16 without a byte-order mark, convert it")
    return text


def decode(data: bytes) -> str:
    """Decodes a text of unknown encoding: UTF-8, perhaps damaged, or what it declares, or what its bytes look like."""
    try:
        return files.decode(data)
    except UnicodeDecodeError:
        pass
    if (declared := _DECLARATION.search(data[:_BEGINNING])) and not declared[1].lower().startswith(_LATIN):
        with contextlib.suppress(LookupError, ValueError):
            return data.decode(declared[1].decode())
    text = data.decode("utf-8", "replace")
    damaged = text.count(files.REPLACEMENT)
    if sum(not character.isascii() for character in text) > 2 * damaged:  # UTF-8 with a few bytes that are not
        return text
    high = re.findall(rb"[\x80-\xff]+", data)
    if sum(map(len, high)) > 2 * len(high):  # in Latin letters such bytes stand alone
        sample = data[: data.rfind(b"\n", 0, _BEGINNING) + 1 or None]
        best = extras.load("charset_normalizer", "a text that is not UTF-8").from_bytes(sample).best()
        if best is not None:
            return data.decode(best.encoding, "replace")
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
    return rst.sections_of(read(path), Path(path).name)


def split(text: str, path: Path, name: str) -> Sections:
    """Cuts one text of a folder into sections, as its suffix tells."""
    suffix = path.suffix.lower()
    if suffix in (".md", ".markdown"):
        return Sections(at_headings(text, markdown_headings(text), name))
    if suffix == ".rst":
        return rst.sections_of(text, name)
    return Sections([Section(name, text)] if suffix in PROSE_SUFFIXES else at_definitions(text, name))
