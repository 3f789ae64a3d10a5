"""Files that are whole or absent: written under a temporary name in the same folder, synced, then renamed.

And texts that are texts, and JSON that is: read with every complaint in one sentence.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from command_line.errors import UserError


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
    """A UTF-8 text that is not empty; `expected` says what a missing file should have been.

    Raises:
      FileNotFoundError, UserError: no such file, an empty one, or one that is not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected {expected}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error
    if not text.strip():
        raise UserError(f"{path} is empty: expected a text")
    return text


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      UserError: it holds none.
    """
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a whole JSON file ({error}): download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected an object: download it again")
    return value


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
