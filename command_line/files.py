"""Files that are whole or absent: written under a temporary name in the same folder, synced, then renamed.

And texts that are texts: read with every complaint in one sentence.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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
