"""Files are written whole or not at all: under a temporary name in the same folder, then synced and renamed.

Texts and JSON that others wrote are read here, too: every complaint is one sentence, and every string that comes out
can be written again.
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
SHIPPED = ("configs", "examples")  # folders of the repository that lie in the package, too
REPLACEMENT = "\ufffd"
# A mark at the beginning of a file says how it is encoded. UTF-32 comes first: its mark begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# An escape in JSON is a pair of surrogates, one alone (the group), or any other. Matches take escapes whole, so that an
# escaped backslash before `ud800` is not taken for a surrogate.
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
    """Yields a temporary path. What is written there replaces `path` on success, and is removed on any error.

    Raises:
      OSError: the folder cannot be written or the disk is full; `path` is then as it was before.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        temporary.chmod(0o644)  # some writers let nobody but its owner read it
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = os.fspath(target)  # "No space left on device" alone does not say where
        raise


def read_text(path: str | os.PathLike[str], expected: str) -> str:
    """Returns the text of a file, which may not be empty, with "\\n" between its lines.

    The file is UTF-8 unless it begins with the byte-order mark of another encoding, which is not part of the text.

    Args:
      expected: what the file should have held, for the complaint about one that does not exist.

    Raises:
      FileNotFoundError, UserError: there is no such file, it is empty, or it is not UTF-8.
    """
    text = _read(Path(path), expected)
    if not text.strip():
        raise UserError(f"{path} is empty: expected a text")
    return text


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises: UserError, if the file holds none."""
    try:
        value = json.loads(decode(Path(path).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole JSON file ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object: download it again")
    return value


def read_json_lines(path: str | os.PathLike[str], expected: str) -> list[tuple[int, str]]:
    """Returns the `json_lines` of a file, of which there may be none, and complains as `read_text` does."""
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
    """Decodes bytes by their byte-order mark, or else as UTF-8. Raises: UnicodeDecodeError."""
    return data.decode(next((encoding for mark, encoding in _MARKS if data.startswith(mark)), "utf-8"))


def writable(text: str, where: str) -> str:
    """Returns the text with U+FFFD for every half of a surrogate pair, which no encoding takes, and logs how many."""
    if text.isascii() or not _SURROGATE.search(text):
        return text
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # joins halves that are a pair
    if count := whole.count(REPLACEMENT) - text.count(REPLACEMENT):
        _log_replaced(count, where)
    return whole


def parse_json(
    text: str | bytes,
    where: str,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
    number: Callable[[str], Any] | None = None,
) -> Any:
    """Returns the value of a JSON text. A lone surrogate in a string, escaped or not, becomes U+FFFD, which is logged.

    Args:
      pairs: makes a value of an object's pairs, whose names may repeat; by default a dict, in which the last one stays.
      number: makes a value of a number as it is written; by default an int or a float, which may be rounded.

    Raises:
      UserError: the text is not JSON, or is nested too deeply; the sentence begins with `where`.
    """
    try:
        text = _decode_json(text) if isinstance(text, bytes) else text.removeprefix("\ufeff")
        return json.loads(
            _without_lone_surrogates(text, where), object_pairs_hook=pairs, parse_int=number, parse_float=number
        )
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from error


def json_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yields the lines that are not blank, each with its number, which counts from 1.

    Only a line feed ends a line. `str.splitlines` would also end one inside of a string, at U+2028 for example.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # files with a mark may have been joined into one
        if line.strip():
            yield number, line


def _decode_json(data: bytes) -> str:
    try:
        return decode(data)
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogatepass")  # a server may write tokens that are no whole characters


def _without_lone_surrogates(text: str, where: str) -> str:
    has_surrogates = "\\" in text and ("\\ud" in text or "\\uD" in text)
    if has_surrogates and (count := sum(bool(found[1]) for found in _ESCAPE.finditer(text))):
        text = _ESCAPE.sub(lambda found: "\\ufffd" if found[1] else found[0], text)
        _log_replaced(count, where)
    return writable(text, where)


def _log_replaced(count: int, where: str) -> None:
    name = _SURROGATE.sub(REPLACEMENT, where)  # the name of a file may hold surrogates, and a terminal takes none
    log.warning("%s: %d halves of surrogate pairs, which are no characters, became U+FFFD", name, count)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps other processes out of a folder, which is made if it is missing, and removed again if it stays empty.

    Raises:
      UserError: another process has locked the folder. A lock ends with its process, however that ends.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(file.fileno()).st_ino == path.stat().st_ino  # or else its last owner has removed it
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
