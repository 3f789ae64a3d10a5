"""The readers of documents that need a library, by suffix: of resources, a folder's files and e-mails' attachments."""

from __future__ import annotations

from collections.abc import Callable

from synth.resources import epub, notebook, office, pdf
from synth.resources.sections import Sections

READERS: dict[str, Callable[[str], Sections]] = {
    ".pdf": pdf.read,
    ".docx": office.read_docx,
    ".pptx": office.read_pptx,
    ".xlsx": office.read_spreadsheet,
    ".xlsm": office.read_spreadsheet,
    ".epub": epub.read,
    ".ipynb": notebook.read,
}
