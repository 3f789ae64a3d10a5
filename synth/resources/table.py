"""Reads CSV. Every row is a section that repeats the names of the columns, so that it can be read alone."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cartridges_jax.command_line.errors import UserError
from synth.resources.sections import Section, Sections
from synth.resources.text import read as read_whole

LONGEST_CELL = 2**31 - 1  # characters
LONGEST_HEADER = 2**14  # characters in which the first row parts its cells
DELIMITERS = ",;\t|"
# How programs write a quote inside of a cell: twice, behind a backslash, or as any other character.
QUOTINGS: tuple[dict[str, Any], ...] = ({}, {"escapechar": "\\"}, {"quoting": csv.QUOTE_NONE})
_SEPARATOR = re.compile(r"sep=([^\n])\n")  # as Excel names it in a first line


def read(path: str) -> Sections:
    """The rows as lines of `column: value`. The first row names the columns, and empty cells are left out.

    What parts the cells, and how quotes are written, is what makes the rows fit the first one best.

    Raises:
      UserError: there is no row below the first.
    """
    text = read_whole(path)
    csv.field_size_limit(LONGEST_CELL)  # for the process, and there is no other way to say it; 131,072 by default
    named = _SEPARATOR.match(text)
    text = text[named.end() :] if named else text
    delimiters = named[1] if named else [one for one in DELIMITERS if one in text[:LONGEST_HEADER]] or ","
    fit, dialect = max((_best_quoting(text, delimiter) for delimiter in delimiters), key=lambda pair: pair[0])
    rows = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        table = [row for row in rows if any(row)]
    except csv.Error as error:
        raise UserError(f"{path} is not CSV: {error}, in line {rows.line_num}") from error
    if len(table) < 2:
        raise UserError(f"{path} has no row below its first, which should name the columns")
    sections = sections_of(table)
    return Sections(sections, {"rows": len(sections)}, {"quotes that are not closed": int(fit.quotes == 0)})


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


class _Fit(NamedTuple):
    """How well rows fit the first one. The greatest is the best."""

    share: float = 0.0  # of the rows that have as many cells as the first
    quotes: int = 1  # 2: they stand around whole cells; 1: none, or some stand elsewhere; 0: and cells have many lines
    columns: int = 0


def _best_quoting(text: str, delimiter: str) -> tuple[_Fit, dict[str, Any]]:
    fits: list[tuple[_Fit, dict[str, Any]]] = []
    for quoting in QUOTINGS if '"' in text else QUOTINGS[:1]:
        dialect = {"delimiter": delimiter, "skipinitialspace": True} | quoting
        fits.append((fit := _fit(text, dialect), dialect))
        if fit[:2] == (1.0, 2):  # no other way is better
            break
    return max(fits, key=lambda pair: pair[0])


def _fit(text: str, dialect: dict[str, Any]) -> _Fit:
    try:
        rows, quotes = _rows(text, dialect | {"strict": True}), 2
    except csv.Error:
        try:
            rows = _rows(text, dialect)
        except csv.Error:
            return _Fit()
        quotes = int(not any("\n" in cell for row in rows for cell in row))
    if "quoting" in dialect:
        quotes = 1
    columns = len(rows[0]) if rows else 0
    share = sum(len(row) == columns for row in rows) / len(rows) if columns > 1 else 0.0
    return _Fit(share, quotes, columns)


def _rows(text: str, dialect: dict[str, Any]) -> list[list[str]]:
    return [row for row in csv.reader(io.StringIO(text, newline=""), **dialect) if any(row)]
