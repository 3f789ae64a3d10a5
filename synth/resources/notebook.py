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
from synth.resources.json_tree import dicts
from synth.resources.sections import Sections, at_headings
from synth.resources.text import markdown_headings
from synth.resources.text import read as read_whole

_FORMS = ("plain", "markdown", "latex", "html")  # of an output; the first that says anything is taken
_PICTURES = ("image/", "png", "jpeg", "svg")
_OBJECT = re.compile(r"<[\w.]+ object(?: at \w+)?>")  # what Python says of a thing that has another form to be shown
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
        sheets = [notebook, *dicts(notebook.get("worksheets"))]
        if any("cells" in sheet for sheet in sheets):
            return [cell for sheet in sheets for cell in dicts(sheet.get("cells"))]
    raise UserError(f"{path} is no notebook: expected JSON with cells")


def _pieces(cell: Mapping[str, Any], language: str, left_out: Counter[str]) -> Iterator[str]:
    kind, source = cell.get("cell_type"), _joined(cell.get("source", cell.get("input")))
    if kind == "heading":
        level = cell.get("level")
        yield f"{'#' * (level if isinstance(level, int) else 1)} {source}"
    elif kind != "code":
        yield source
        attachments = cell.get("attachments")
        left_out["pictures"] += len(attachments) if isinstance(attachments, dict) else 0
    elif source.strip():
        yield _fenced(source, language)
    for output in dicts(cell.get("outputs")):
        data = output["data"] if isinstance(output.get("data"), dict) else output
        forms = (form for form in _forms(output, data) if form.strip() and not _OBJECT.fullmatch(form.strip()))
        text = next(forms, _form(data, "plain"))
        left_out["pictures"] += any(kind.startswith(_PICTURES) for kind in data)
        for kind in data:
            if "/" in kind and not kind.startswith(_PICTURES) and kind.removeprefix("text/") not in _FORMS:
                left_out[f"outputs of type {kind}"] += 1
        if text.strip():
            yield _fenced(_COLOURS.sub("", text), "")


def _forms(output: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """What an output is in words, in every form that it has."""
    yield _joined(output.get("text"))
    yield _joined(output.get("traceback"))
    yield ": ".join(str(output[key]) for key in ("ename", "evalue") if output.get(key))
    for form in _FORMS:
        yield _form(data, form)


def _form(data: Mapping[str, Any], form: str) -> str:
    """A form of an output, whose name was shorter before version 4 of the format."""
    text = _joined(data.get(f"text/{form}", data.get(form)))
    return html.to_text(text) if form == "html" and text else text


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
