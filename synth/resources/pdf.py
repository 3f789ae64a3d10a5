"""Reads PDF: the text of every page."""

from __future__ import annotations

import logging
from pathlib import Path

from cartridges_jax.command_line.errors import UserError
from synth.resources import extras
from synth.resources.sections import Section, Sections


def read(path: str) -> Sections:
    """The text of a PDF, with a section for every page, in reading order as far as the file tells it.

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
        pages = [] if is_locked else [page.extract_text().strip() for page in reader.pages]
    except Exception as error:  # damage shows as almost any of them
        raise UserError(f"{path} cannot be read as a PDF: {error or type(error).__name__}") from error
    if is_locked:
        raise UserError(f"{path} needs a password: save it without one")
    if not any(pages):
        raise UserError(f"{path} holds no text on its {len(pages)} pages: run it through OCR first")
    sections = [Section(f"page {number}", f"{text}\n\n") for number, text in enumerate(pages, 1) if text]
    return Sections(sections, {"pages": len(sections)}, {"pages without text": len(pages) - len(sections)})
