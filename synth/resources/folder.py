"""A folder or a code repository: every text in it that its .gitignore files do not leave out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from command_line.errors import UserError
from synth.resources import extras, pdf, text
from synth.resources.sections import SEPARATOR, Section

LARGEST_FILE = 2**20  # bytes; what is larger was rarely written by a person
SNIFFED = 8192  # bytes of a file in which a zero tells that it is no text

log = logging.getLogger(__name__)


def read(path: str, include: Sequence[str] = ()) -> list[Section]:
    """The texts under `path` in the order of their names, each headed by a line with its own path.

    Symbolic links are not followed: they may lead out of the folder, or around in it.

    Raises:
      NotADirectoryError, UserError: there is no such folder, or no text in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"{path} is not a folder: set config.resource.path to one, or another kind")
    wanted = _patterns(include) if include else None
    sections: list[Section] = []
    for file in _walk(root, []):
        name = file.relative_to(root).as_posix()
        if wanted is None or wanted.match_file(name):
            sections += _read_file(file, name)
    if not sections:
        fitting = f" that fits config.resource.include, {include}" if include else ""
        raise UserError(f"{path} holds no text{fitting}")
    return sections


def _walk(folder: Path, ignored: list[tuple[Path, Any]]) -> Iterator[Path]:
    """Files below `folder`, without what a .gitignore of it or of a folder above leaves out."""
    gitignore = folder / ".gitignore"
    if gitignore.is_file():
        ignored = [*ignored, (folder, _patterns(text.decode(gitignore.read_bytes()).splitlines()))]
    for entry in sorted(folder.iterdir()):
        if entry.is_symlink() or entry.name == ".git" or _is_ignored(entry, ignored):
            continue
        if entry.is_dir():
            yield from _walk(entry, ignored)
        elif entry.is_file():
            yield entry


def _is_ignored(entry: Path, ignored: Sequence[tuple[Path, Any]]) -> bool:
    """By the innermost .gitignore that says anything about it."""
    for folder, patterns in reversed(ignored):
        name = entry.relative_to(folder).as_posix() + ("/" if entry.is_dir() else "")
        verdict = patterns.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _patterns(lines: Sequence[str]) -> Any:
    return extras.load("pathspec", "a folder").GitIgnoreSpec.from_lines(lines)


def _read_file(file: Path, name: str) -> list[Section]:
    if file.suffix.lower() == ".pdf":
        return _read_pdf(file, name)
    size = file.stat().st_size
    if size > LARGEST_FILE:
        log.warning("%s is left out: %d bytes, more than %d", file, size, LARGEST_FILE)
        return []
    data = file.read_bytes()
    if b"\0" in data[:SNIFFED] or not data.strip():
        return []
    first, *rest = text.split(text.decode(data).rstrip() + "\n\n", file, name)
    return [Section(first.name, f"File: {name}\n\n{first.text}"), *rest]


def _read_pdf(file: Path, name: str) -> list[Section]:
    try:
        first, *rest = pdf.read(str(file))
    except ValueError as error:
        log.warning("%s: left out", error)
        return []
    pages = [Section(first.name, f"File: {name}\n\n{first.text}"), *rest]
    return [Section(f"{name}{SEPARATOR}{page.name}", page.text) for page in pages]
