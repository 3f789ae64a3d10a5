"""Reads CSV. Every row is a section that repeats the names of the columns, so that it can be read alone."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from cartridges_jax.command_line.errors import UserError
from synth.resources.sections import Section, Sections
from synth.resources.text import read as read_whole

LONGEST_CELL = 2**31 - 1  # characters
DELIMITERS = ",;\t|"
_SEPARATOR = re.compile(r"sep=([^\n])\n")  # as Excel names it in a first line


def read(path: str) -> Sections:
    """The rows as lines of `column: value`. The first row names the columns, and empty cells are left out.

    Raises:
      UserError: there is no row below the first.
    """
    text = read_whole(path)
    csv.field_size_limit(LONGEST_CELL)  # for the process, and there is no other way to say it; 131,072 by default
    named = _SEPARATOR.match(text)
    rows = csv.reader(
        io.StringIO(text[named.end() :] if named else text, newline=""),
        delimiter=named[1] if named else _delimiter(text),
    )
    try:
        table = [row for row in rows if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}, in line {rows.line_num}") from error
    if len(table) < 2:
        raise UserError(f"{path} has no row below its first, which should name the columns")
    sections = sections_of(table)
    return Sections(sections, {"rows": len(sections)})


def sections_of(rows: Sequence[Sequence[str]], where: str = "") -> list[Section]:
    """A section for each row below the first, which names the columns. A single row gives one section of its cells."""
    if len(rows) < 2:
        return [Section(f"{where}row 1", f"{where}row 1\n{' | '.join(filter(None, row))}\n\n") for row in rows]
    header, *rest = rows
    sections = []
    for number, row in enumerate(rest, 1):
        names = [name or f"column {i}" for i, name in enumerate(header, 1)]
        names += [f"column {i}" for i in range(len(header) + 1, len(row) + 1)]
        cells = [f"{name}: {cell}\n" for name, cell in zip(names, row, strict=False) if cell]
        sections.append(Section(f"{where}row {number}", f"{where}row {number}\n{''.join(cells)}\n"))
    return sections


def _delimiter(text: str) -> str:
    """The delimiter that occurs most often in the first line."""
    first = text.partition("\n")[0]
    return max(DELIMITERS, key=first.count)
