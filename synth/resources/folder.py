"""A folder or a code repository: every text in it that its .gitignore files do not leave out."""

from __future__ import annotations

import codecs
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import documents, extras, mail, text
from synth.resources.config import is_mailbox
from synth.resources.sections import SEPARATOR, Section, Sections

LARGEST_FILE = 2**20  # bytes; what is larger was rarely written by a person
LARGEST_DOCUMENT = 2**28  # bytes, pictures included
SNIFFED = 8192  # bytes at the beginning of a file: if there is a zero among them, it is no text

_UNREADABLE = "files and folders that may not be read"

log = logging.getLogger(__name__)


def read(path: str, include: Sequence[str] = ()) -> Sections:
    """The texts under `path` in the order of their names. The first line of each is its own path.

    Symbolic links are not followed: they may lead out of the folder, or around in it.

    Raises:
      NotADirectoryError, UserError: there is no such folder, or no text in it.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotADirectoryError(f"{path} is not a folder: set config.resource.path to one, or another kind")
    wanted = _patterns(include) if include else None
    sections: list[Section] = []
    files, left_out = 0, Counter[str]()
    for file in _walk(root, [], left_out):
        name = file.relative_to(root).as_posix()
        if wanted is not None and not wanted.match_file(name):
            left_out["files that config.resource.include does not name"] += 1
            continue
        try:
            found = _read_file(file, name, left_out)
        except OSError as error:
            found = _unreadable(error, left_out)
        if found:
            files += 1
            first, *rest = found
            sections += [Section(first.name, f"File: {name}\n\n{first.text}"), *rest]
    if not sections:
        fitting = f" that fits config.resource.include, {include}" if include else ""
        raise UserError(f"{path} holds no text{fitting}")
    return Sections(sections, {"files": files, "sections": len(sections)}, left_out)


def _walk(folder: Path, ignored: list[tuple[Path, Any]], left_out: Counter[str]) -> Iterator[Path]:
    """Yields the files below `folder` that neither its .gitignore nor one of a folder above leaves out."""
    try:
        entries = sorted(folder.iterdir())
        gitignore = folder / ".gitignore"
        if gitignore.is_file():
            ignored = [*ignored, (folder, _ignore_file(text.decode(gitignore.read_bytes())))]
    except OSError as error:
        _unreadable(error, left_out)
        return
    for entry in entries:
        if entry.name == ".git":
            continue
        if entry.is_symlink():
            left_out["links"] += 1
        elif _is_ignored(entry, ignored):
            left_out["files and folders that .gitignore names"] += 1
        elif entry.is_dir():
            yield from _walk(entry, ignored, left_out)
        elif entry.is_file():
            yield entry
        else:
            left_out["pipes and devices"] += 1


def _unreadable(error: OSError, left_out: Counter[str]) -> list[Section]:
    log.warning("%s: left out", error)
    left_out[_UNREADABLE] += 1
    return []


def _is_ignored(entry: Path, ignored: Sequence[tuple[Path, Any]]) -> bool:
    """Whether an entry is left out. The innermost .gitignore that says anything about it decides."""
    for folder, patterns in reversed(ignored):
        name = entry.relative_to(folder).as_posix() + ("/" if entry.is_dir() else "")
        verdict = patterns.check_file(name).include
        if verdict is not None:
            return verdict
    return False


def _patterns(lines: Sequence[str]) -> Any:
    try:
        return extras.load("pathspec", "a folder").GitIgnoreSpec.from_lines(lines)
    except ValueError as error:
        raise UserError(f"config.resource.include has what is no pattern of .gitignore's: {error}") from error


def _ignore_file(content: str) -> Any:
    """The patterns of a .gitignore. As in git, a line that is no pattern is passed over."""
    kept = []
    for line in content.split("\n"):
        with contextlib.suppress(UserError):
            _patterns([line])
            kept.append(line)
    return _patterns(kept)


def _read_file(file: Path, name: str, left_out: Counter[str]) -> list[Section]:
    suffix = file.suffix.lower()
    reader = documents.READERS.get(suffix)
    if reader is None and (suffix == ".eml" or is_mailbox(file)):
        reader = mail.read_mbox
    size, largest = file.stat().st_size, LARGEST_DOCUMENT if reader else LARGEST_FILE
    if size > largest:
        log.warning("%s is left out: %d bytes, more than %d", file, size, largest)
        left_out[f"files of more than {largest} bytes"] += 1
        return []
    if reader and size:
        return _read_document(reader, file, name, left_out)
    content = _text_of(file.read_bytes())
    if not content.strip():
        left_out["empty files" if size == 0 or content else "files that are no texts"] += 1
        return []
    found = text.split(content.rstrip() + "\n\n", file, name)
    left_out.update(found.left_out)
    return found


def _text_of(data: bytes) -> str:
    """The text of a file's bytes, or nothing if they are no text."""
    if b"\0" in data[:SNIFFED] and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return ""
    return text.decode(data)


def _read_document(reader: Callable[[str], Sections], file: Path, name: str, left_out: Counter[str]) -> list[Section]:
    try:
        found = reader(str(file))
    except UserError as error:
        log.warning("%s: left out", error)
        left_out["documents that cannot be read"] += 1
        return []
    left_out.update(found.left_out)
    return [Section(f"{name}{SEPARATOR}{section.name}", section.text) for section in found]
