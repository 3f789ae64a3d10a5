"""Files that are whole or absent: written under a temporary name in the same folder, synced, then renamed.

And texts that are texts, also those in JSON: read with every complaint in one sentence, and fit to be written again.
"""

from __future__ import annotations

import codecs
import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError

PACKAGE = Path(__file__).parents[1]
SHIPPED = ("configs", "examples")  # folders that the package brings
REPLACEMENT = "\ufffd"
# a mark at the beginning of a file says how it is encoded; that of UTF-32 begins as that of UTF-16 does
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# a pair of surrogates, one alone, or any other escape of JSON: taken whole, so that `\\ud800` is none
_ESCAPE = re.compile(
    r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_SURROGATE = re.compile("[\ud800-\udfff]")

log = logging.getLogger(__name__)


def find(path: str | os.PathLike[str]) -> Path:
    """The path itself or, if it begins with `configs/` or `examples/` and nothing lies there, the package's file."""
    path = Path(path)
    if not path.exists() and path.parts[0] in SHIPPED and (PACKAGE / path).is_file():
        return PACKAGE / path
    return path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes `path`'s place, on any error it is removed.

    Raises:
      OSError: the folder cannot be written or the disk is full; `path` is then as it was before.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers leave it readable by its owner only
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(target)  # "No space left on device" alone does not say where
        raise


def read_text(path: str | os.PathLike[str], expected: str) -> str:
    """A text that is not empty, with "\\n" between its lines; `expected` says what a missing file should have been.

    It is UTF-8 unless it begins with the byte-order mark of another encoding; the mark itself is no text.

    Raises:
      FileNotFoundError, UserError: no such file, an empty one, or one that is not UTF-8.
    """
    text = _read(Path(path), expected)
    if not text.strip():
        raise UserError(f"{path} is empty: expected a text")
    return text


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it holds none.
    """
    try:
        value = json.loads(decode(Path(path).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole JSON file ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object: download it again")
    return value


def read_json_lines(path: str | os.PathLike[str], expected: str) -> list[tuple[int, str]]:
    """Of a file, as `json_lines` does; there may be none. Raises: as `read_text` does."""
    return list(json_lines(_read(Path(path), expected)))


def _read(path: Path, expected: str) -> str:
    found = find(path)
    if not found.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected {expected}")
    try:
        text = decode(found.read_bytes())
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes) -> str:
    """By its byte-order mark, else as UTF-8. Raises: UnicodeDecodeError."""
    return data.decode(next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8"))


def writable(text: str, where: str) -> str:
    """The text with U+FFFD, told, for every half of a surrogate pair: no encoding takes one, so no file could."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins halves that are a pair
    if count := whole.count(REPLACEMENT) - text.count(REPLACEMENT):
        _tell_replaced(count, where)
    return whole


def parse_json(text: str | bytes, where: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of one JSON text; a lone surrogate in a string, escaped or not, becomes U+FFFD, told.

    Args:
      pairs: what becomes of an object, whose names may occur more than once; a dict, which has the last, by default.

    Raises:
      UserError: it is none, or too deep; the sentence begins with `where`.
    """
    try:
        text = _decode_json(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(_without_lone_surrogates(text, where), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of JSON lines with their numbers, which count from 1; blank ones are passed over.

    A line ends with a line feed and with nothing else: `str.splitlines` ends one inside of strings, too, at U+2028 say.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # of a file that another one was appended to
        if line.strip():
            yield number, line


def _decode_json(data: bytes) -> str:
    try:
        return decode(data)
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogatepass")  # servers write whatever a model's tokens give


def _without_lone_surrogates(text: str, where: str) -> str:
    if "\\ud" in text or "\\uD" in text:
        count = 0

        def replaced(found: re.Match[str]) -> str:
            nonlocal count
            count += bool(found[1])
            return "\\ufffd" if found[1] else found[0]

        text = _ESCAPE.sub(replaced, text)
        if count:
            _tell_replaced(count, where)
    return writable(text, where)


def _tell_replaced(count: int, where: str) -> None:
    name = _SURROGATE.sub(REPLACEMENT, where)  # a file's name may be none, and what is told goes to a terminal
    log.warning("%s: %d halves of surrogate pairs, which are no characters, became U+FFFD", name, count)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """A folder for one process at a time; made if it is missing, and taken away again if nothing was put there.

    Raises:
      UserError: another process writes there. The lock goes with the process, however it ends.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(file.fileno()).st_ino == path.stat().st_ino  # else its last owner has removed it
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        if not is_ours:
            raise UserError(f"{folder} is in use by another run: wait for it or choose another output_dir")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
