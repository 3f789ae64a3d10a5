"""Opens documents that are zip archives, unless they would unpack to too much."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from cartridges_jax.command_line.errors import UserError

LARGEST = 2**28  # bytes, unpacked
MOST_MEMBERS = 20_000


@contextlib.contextmanager
def opened(path: str, what: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`. Raises: FileNotFoundError, UserError, if it is none, damaged, or unpacks to too much."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist: expected {what}, set config.resource.path")
    if not Path(path).stat().st_size:
        raise UserError(f"{path} is empty: expected {what}")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if len(members) > MOST_MEMBERS or sum(member.file_size for member in members) > LARGEST:
                raise UserError(f"{path} unpacks to more than {MOST_MEMBERS} files or {LARGEST} bytes: refused")
            yield archive
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be read as {what} ({error}): it is damaged, or needs a password") from error


def check_office(path: str, what: str) -> dict[str, bytes]:
    """The files inside of an office document, by name. The contents of those that are not XML are left out.

    Raises:
      FileNotFoundError, UserError: as `opened` does, or its XML defines entities, which no office program writes and
        which could unfold to anything.
    """
    found = {}
    with opened(path, what) as archive:
        for member in archive.infolist():
            data = archive.read(member)  # all of them: a length that is not the one declared shows here
            if b"<!ENTITY" in data.replace(b"\0", b""):  # in UTF-8 or in UTF-16
                raise UserError(f"{path} defines entities in {member.filename!r}, as no office program does: refused")
            found[member.filename] = data if member.filename.endswith(".xml") else b""
    return found
