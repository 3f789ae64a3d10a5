"""Reads Jupyter notebooks: their cells as one Markdown text, with programs and their outputs in fences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.resources import html
from synth.resources.sections import Sections, at_headings
from synth.resources.text import markdown_headings
from synth.resources.text import read as read_whole

_FORMS = ("plain", "markdown", "latex")  # of an output, which is HTML only if it is nothing else
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def read(path: str) -> Sections:
    """The text of a notebook, cut at the headings of its Markdown cells. Outputs that are no text are left out.

    Raises:
      FileNotFoundError, UserError: no such file, no notebook, or one without words.
    """
    notebook = files.parse_json(read_whole(path), path)
    cells = _cells(notebook, path)
    left_out: Counter[str] = Counter()
    language = str(_get(notebook, "metadata", "kernelspec", "language") or "python")
    pieces = [piece.strip("\n") for cell in cells for piece in _pieces(cell, language, left_out)]
    text = "\n\n".join(piece for piece in pieces if piece.strip()) + "\n"
    if not text.strip():
        raise UserError(f"{path} is a notebook without words")
    sections = at_headings(text, markdown_headings(text), Path(path).name)
    return Sections(sections, {"cells": len(cells)}, left_out)


def _cells(notebook: Any, path: str) -> list[Mapping[str, Any]]:
    """The cells of a notebook. Before version 4 of the format they stood in worksheets."""
    if isinstance(notebook, dict):
        sheets = [notebook, *_dicts(notebook.get("worksheets"))]
        if any("cells" in sheet for sheet in sheets):
            return [cell for sheet in sheets for cell in _dicts(sheet.get("cells"))]
    raise UserError(f"{path} is no notebook: expected JSON with cells")


def _pieces(cell: Mapping[str, Any], language: str, left_out: Counter[str]) -> Iterator[str]:
    kind, source = cell.get("cell_type"), _joined(cell.get("source", cell.get("input")))
    if kind == "heading":
        level = cell.get("level")
        yield f"{'#' * (level if isinstance(level, int) else 1)} {source}"
    elif kind != "code":
        yield source
        left_out["pictures"] += len(_get(cell, "attachments") or {})
    elif source.strip():
        yield _fenced(source, language)
    for output in _dicts(cell.get("outputs")):
        data = output["data"] if isinstance(output.get("data"), dict) else output
        forms = (output.get("text"), output.get("traceback"), *(data.get(f"text/{form}") for form in _FORMS))
        text = next((text for form in forms if (text := _joined(form)).strip()), "")
        text = text or html.to_text(_joined(data.get("text/html")))
        left_out["pictures"] += any(str(kind).startswith(("image/", "png", "jpeg", "svg")) for kind in data)
        if text.strip():
            yield _fenced(_COLOURS.sub("", text), "")


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _joined(value: Any) -> str:
    """A text, which notebooks write as one string or as a list of lines."""
    return "".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _fenced(text: str, language: str) -> str:
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def _get(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
