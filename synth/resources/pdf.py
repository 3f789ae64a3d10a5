"""Reads PDF: the text of every page, with the notes on it, and what is filled into its form."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import extras
from synth.resources.sections import Section, Sections


def read(path: str) -> Sections:
    """The text of a PDF, with a section for every page, in reading order as far as the file tells it, and its form.

    Raises:
      FileNotFoundError, UserError: no such file, one that is damaged, needs a password, or holds pictures only.
    """
    pypdf = extras.load("pypdf", "a PDF")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every oddity that it copes with
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a PDF, set config.resource.path")
    try:
        reader = pypdf.PdfReader(path)
        is_locked = reader.is_encrypted and not reader.decrypt("")
        pages = [] if is_locked else [_text_of(page) for page in reader.pages]
    except Exception as error:  # damage shows as almost any of them
        raise UserError(f"{path} cannot be read as a PDF: {error or type(error).__name__}") from error
    if is_locked:
        raise UserError(f"{path} needs a password: save it without one")
    left_out: Counter[str] = Counter()
    form = _form(reader, left_out)
    if not any(pages) and not form:
        raise UserError(f"{path} holds no text on its {len(pages)} pages: run it through OCR first")
    sections = [Section(f"page {number}", f"{text}\n\n") for number, text in enumerate(pages, 1) if text]
    read_pages = len(sections)
    left_out["pages without text"] = len(pages) - read_pages
    if form:
        sections.append(Section("form", f"{form}\n\n"))
    return Sections(sections, {"pages": read_pages}, left_out)


def _text_of(page: Any) -> str:
    notes = [note.get_object() for note in page.annotations or ()]
    # a link's text is the page's, a widget is a field of the form, and a pop-up shows another note
    written = [
        note for note in notes if isinstance(note, dict) and note.get("/Subtype") not in ("/Link", "/Widget", "/Popup")
    ]
    contents = [str(note["/Contents"]).strip() for note in written if note.get("/Contents")]
    return "\n\n".join([page.extract_text(), *(f"Note: {text}" for text in contents)]).strip()


def _form(reader: Any, left_out: Counter[str]) -> str:
    """The fields of a form that are filled in, a line for each."""
    try:
        fields = reader.get_fields() or {}
        return "\n".join(f"{name}: {value}" for name, field in fields.items() if (value := _value(field)))
    except Exception:  # the pages may be sound
        left_out["forms that cannot be read"] += 1
        return ""


def _value(field: Any) -> str:
    """What is filled into a field of a form. Of a box it is the name of its state, and a signature has no words."""
    value = field.get("/V")
    texts = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    if field.get("/FT") == "/Btn":
        texts = [text.removeprefix("/") for text in texts if text != "/Off"]
    return ", ".join(texts).strip()
