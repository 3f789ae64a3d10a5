"""Fetches a paper's source from arXiv. It is unpacked in memory, so that no name in it can mean a place on disk."""

from __future__ import annotations

import io
import re
import tarfile
import zlib
from pathlib import PurePosixPath

from cartridges_jax.command_line.errors import UserError
from synth.resources.text import decode
from synth.resources.web import Api

URL = "https://arxiv.org"
LARGEST_DOWNLOAD = 2**27  # bytes
LARGEST_SOURCE = 2**28  # bytes, unpacked
MOST_FILES = 10_000
TEXTS = (".tex", ".ltx", ".latex", ".tikz", ".txt")

_ADDRESS = re.compile(r"arxiv:|https?://arxiv\.org/(?:abs|pdf|src|e-print|html)/", re.IGNORECASE)
_ID = re.compile(r"(?:\d{4}\.\d{4,5}|[a-z-]+(?:\.[A-Z]{2})?/\d{7})(?:v\d+)?")


def is_address(path: str) -> bool:
    return _ADDRESS.match(path) is not None


def fetch(address: str, api_url: str | None = None) -> dict[str, str]:
    """The texts of a paper's source, by their names in its archive.

    Raises:
      UserError: the address names no paper, or arXiv sends no archive of LaTeX source, or one that is refused.
      OSError: arXiv cannot be reached.
    """
    identifier = _ADDRESS.sub("", address, count=1).removesuffix(".pdf")
    if not _ID.fullmatch(identifier):
        raise UserError(f"{address} names no paper on arXiv: expected something like arxiv:2506.06266")
    data = Api(api_url or URL).get(f"src/{identifier}", largest=LARGEST_DOWNLOAD)
    return unpack(data, f"the source of arxiv:{identifier}")


def unpack(data: bytes, what: str) -> dict[str, str]:
    """The texts of a tar archive or of a single file, gzipped or not.

    Raises:
      UserError: it is a PDF, too large, damaged, or has a member that is no file inside its own folder.
    """
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, what)
    if data[:4] == b"%PDF":
        raise UserError(f"{what} is a PDF, its authors gave no LaTeX: download it and read that file")
    file = io.BytesIO(data)
    if not tarfile.is_tarfile(file):
        return {"main.tex": decode(data)}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            return _texts(archive, what)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{what} is a damaged archive: {error}") from error


def _gunzip(data: bytes, what: str) -> bytes:
    try:
        reader = zlib.decompressobj(wbits=31)
        unpacked = reader.decompress(data, LARGEST_SOURCE)
        if reader.unconsumed_tail:
            raise UserError(f"{what} unpacks to more than {LARGEST_SOURCE} bytes: refused")
        return unpacked
    except zlib.error as error:
        raise UserError(f"{what} is damaged: {error}") from error


def _texts(archive: tarfile.TarFile, what: str) -> dict[str, str]:
    texts, size = {}, 0
    for number, member in enumerate(archive, 1):
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            raise UserError(f"{what} has a member outside its own folder, {member.name!r}: refused")
        if not (member.isreg() or member.isdir()):
            raise UserError(f"{what} has a member that is a link or a device, {member.name!r}: refused")
        size += member.size
        if number > MOST_FILES or size > LARGEST_SOURCE:
            raise UserError(f"{what} has more than {MOST_FILES} files or {LARGEST_SOURCE} bytes: refused")
        if member.isreg() and path.suffix.lower() in TEXTS:
            file = archive.extractfile(member)
            texts[path.as_posix()] = decode(file.read()) if file else ""
    return texts
