"""CSV: every row a section that repeats the names of the columns, so that it can be read alone."""

from __future__ import annotations

import csv
import io

from command_line.errors import UserError
from synth.resources.sections import Section
from synth.resources.text import read as read_whole

DELIMITERS = ",;\t|"


def read(path: str) -> list[Section]:
    """Rows as lines of `column: value`; the first row names the columns, cells that are empty are left out.

    Raises:
      UserError: there is no row below the first.
    """
    text = read_whole(path)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    try:
        header, *rest = (row for row in rows if any(row))
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}, in line {rows.line_num}") from error
    if not rest:
        raise UserError(f"{path} has no row below its first, which should name the columns")
    sections = []
    for number, row in enumerate(rest, 1):
        names = [*header, *(f"column {i}" for i in range(len(header) + 1, len(row) + 1))]
        cells = [f"{name}: {cell}\n" for name, cell in zip(names, row, strict=False) if cell]
        sections.append(Section(f"row {number}", f"row {number}\n{''.join(cells)}\n"))
    return sections


def _delimiter(text: str) -> str:
    """The one that stands most often in the first line."""
    first = text.partition("\n")[0]
    return max(DELIMITERS, key=first.count)
