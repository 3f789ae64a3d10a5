"""Reads Word, PowerPoint and spreadsheets by libraries, and counts what those leave out."""

from __future__ import annotations

import datetime
import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import archive, extras, html, table
from synth.resources.sections import Section, Sections

# Files of their own inside of a document, by how their names begin, and what they are counted as.
_DRAWN = {"media/": "pictures and films", "charts/chart": "charts", "diagrams/data": "diagrams"}
_CELL = re.compile(rb"""<(?:\w+:)?c\b[^>]*?\br=["']([A-Z]{1,3})(\d{1,7})["']""")
MOST_CELLS = 2**25  # of a sheet
_FORMULA = re.compile(rb"<m:oMath\b")
_TWO_WAYS = "{http://schemas.openxmlformats.org/markup-compatibility/2006}AlternateContent"  # to show one thing
# What stands around text in Word's XML, where the library knows no such element and would pass over the text.
_AROUND = re.compile(rb"</?w:(?:fldSimple|bdo|dir|ruby|rubyBase)\b[^>]*>")
_OLD_BOXES = "text boxes in the form of older programs"
_UNREAD_IN_WORD = {
    "formulas": _FORMULA,
    "readings above words": re.compile(rb"<w:rt>"),
    "drop-down fields": re.compile(rb"<w:ddList>"),
    "text boxes": re.compile(rb"<wps:txbx\b"),
    _OLD_BOXES: re.compile(rb"<v:textbox\b"),
}
_UNREAD_IN_SLIDES = {"formulas": _FORMULA, "comments": re.compile(rb"<(?:p|p188):cm\b")}
_UNREAD_IN_SHEETS = {
    "cells with an error": re.compile(rb"<c\b[^>]*\bt=[\"']e[\"'][^>]*(?<!/)>"),
    # a text may be empty, but no number
    "formulas without a saved value": re.compile(
        rb"<c\b(?![^>]*\bt=)[^>]*(?<!/)><f\b(?:[^>]*/>|[^>]*>[^<]*</f>)(?:<v\s*/>|<v></v>)?</c>"
    ),
    "text boxes": re.compile(rb"<xdr:txBody>(?:(?!</xdr:txBody>).)*?<a:t>", re.DOTALL),
    "page headers": re.compile(rb"<(?:odd|even|first)Header>"),
    "page footers": re.compile(rb"<(?:odd|even|first)Footer>"),
}


def read_docx(path: str) -> Sections:
    """The text of a Word document by headings, with notes and comments at the end, and all changes taken as accepted.

    Raises:
      FileNotFoundError, UserError: no such file, one that is damaged or needs a password, or without text.
    """
    mammoth = extras.load("mammoth", "a Word document")
    found = archive.check_office(path, "a Word document")
    left_out = _unread(found, "word/", _DRAWN | {"header": "page headers", "footer": "page footers"})
    left_out.update(_unread_in(found, "word/", _UNREAD_IN_WORD))
    left_out["text boxes"] = max(0, left_out["text boxes"] - left_out.pop(_OLD_BOXES))  # read are those in the old form
    try:
        with _with_all_text(path, found) as file:
            source = mammoth.convert_to_html(
                file,
                style_map="comment-reference => sup",
                include_embedded_style_map=False,
                convert_image=mammoth.images.img_element(lambda image: {}),
            ).value
    except Exception as error:  # damage shows as almost any of them
        raise UserError(f"{path} cannot be read as a Word document: {error or type(error).__name__}") from error
    return _some(html.sections_of(source, Path(path).name), path, {}, left_out)


def read_pptx(path: str) -> Sections:
    """The text of a presentation, slide by slide, with tables and the speaker's notes; raises as `read_docx` does."""
    pptx = extras.load("pptx", "a presentation")
    found = archive.check_office(path, "a presentation")
    left_out = _unread(found, "ppt/", _DRAWN)
    for folder in ("ppt/slides/", "ppt/comments/"):
        left_out.update(_unread_in(found, folder, _UNREAD_IN_SLIDES))
    try:
        slides = [_slide(number, slide) for number, slide in enumerate(pptx.Presentation(path).slides, 1)]
    except Exception as error:
        raise UserError(f"{path} cannot be read as a presentation: {error or type(error).__name__}") from error
    sections = [slide for slide in slides if slide.text.strip()]
    left_out["slides without text"] = len(slides) - len(sections)
    return _some(sections, path, {"slides": len(sections)}, left_out)


def read_spreadsheet(path: str) -> Sections:
    """The rows of every sheet, as those of CSV; a formula is its saved value. It raises as `read_docx` does."""
    calamine = extras.load("python_calamine", "a spreadsheet")
    found = archive.check_office(path, "a spreadsheet")
    left_out = _unread(found, "xl/", _DRAWN | {"comments": "sheets' comments", "threadedComments": "comments"})
    left_out.update(_unread_in(found, "xl/", _UNREAD_IN_SHEETS))
    for name, data in found.items():
        if (cells := _spanned(data)) > MOST_CELLS:
            raise UserError(
                f"{path} spans {cells} cells in {name!r}, more than {MOST_CELLS}: save a smaller part of it"
            )
    try:
        with calamine.CalamineWorkbook.from_path(path) as book:
            sheets = {name: book.get_sheet_by_name(name).to_python() for name in book.sheet_names}
    except Exception as error:
        raise UserError(f"{path} cannot be read as a spreadsheet: {error or type(error).__name__}") from error
    sections = []
    for name, cells in sheets.items():
        rows = [row for row in ([_value(cell) for cell in row] for row in cells) if any(row)]
        left_out["empty sheets"] += not rows
        sections += table.sections_of(rows, f"{name}, " if len(sheets) > 1 else "")
    return _some(sections, path, {"sheets": len(sheets), "rows": len(sections)}, left_out)


def _spanned(sheet: bytes) -> int:
    """How many cells the rectangle around a sheet's cells has: the library holds them all, even if few are filled."""
    rows = columns = 0
    for letters, row in set(_CELL.findall(sheet)):
        column = 0
        for letter in letters:
            column = column * 26 + letter - ord("A") + 1
        rows, columns = max(rows, int(row)), max(columns, column)
    return rows * columns


def _unread(found: Iterable[str], folder: str, kinds: dict[str, str]) -> Counter[str]:
    names = [name.removeprefix(folder) for name in found if name.startswith(folder)]
    return Counter(kind for name in names for start, kind in kinds.items() if name.startswith(start))


def _unread_in(found: Mapping[str, bytes], folder: str, kinds: Mapping[str, re.Pattern[bytes]]) -> Counter[str]:
    texts = [data for name, data in found.items() if name.startswith(folder)]
    return Counter({kind: sum(len(pattern.findall(data)) for data in texts) for kind, pattern in kinds.items()})


def _with_all_text(path: str, found: Mapping[str, bytes]) -> IO[bytes]:
    """A Word document without what stands around some of its text."""
    if not any(_AROUND.search(data) for data in found.values()):
        return open(path, "rb")
    made = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name, data in found.items():
            new.writestr(name, _AROUND.sub(b"", data) if data else old.read(name))
    return made


def _some(sections: Sequence[Section], path: str, read: dict[str, int], left_out: Counter[str]) -> Sections:
    if not any(section.text.strip() for section in sections):
        raise UserError(f"{path} holds no text: what it shows may be pictures, run it through OCR first")
    return Sections(sections, read, left_out)


def _slide(number: int, slide: Any) -> Section:
    for ways in list(slide.element.iter(_TWO_WAYS)):  # the library passes over them
        for shape in [shape for first in ways[:1] for shape in first]:
            ways.addprevious(shape)
    shapes = slide.shapes
    title = " ".join(shapes.title.text_frame.text.split()) if shapes.title is not None else ""
    lines = [line for shape in shapes for line in _shape_lines(shape)]
    if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
        notes = slide.notes_slide.notes_text_frame.text.strip()
        lines += ["", f"Notes: {notes}"] if notes else []
    text = "\n".join(lines).replace("\v", "\n")  # a line break inside of a paragraph
    name = f"slide {number}" + (f": {title}" if title else "")
    return Section(name, f"{text}\n\n" if text.strip() else "")


def _shape_lines(shape: Any) -> Iterator[str]:
    if hasattr(shape, "shapes"):  # a group
        for inside in shape.shapes:
            yield from _shape_lines(inside)
    elif shape.has_text_frame and shape.text_frame.text.strip():
        yield shape.text_frame.text
    elif getattr(shape, "has_table", False):
        for row in shape.table.rows:
            yield " | ".join(" ".join(cell.text.split()) for cell in row.cells)


def _value(cell: Any) -> str:
    """A cell's value as a person would write it."""
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    return str(cell)
