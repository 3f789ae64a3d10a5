"""The settings of the resources that a run reads, and how their kinds are recognised."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cartridges_jax.command_line.errors import UserError

Kind = Literal[
    "text",
    "directory",
    "json",
    "jsonl",
    "markdown",
    "rst",
    "html",
    "pdf",
    "docx",
    "pptx",
    "xlsx",
    "epub",
    "ipynb",
    "latex",
    "csv",
    "mbox",
    "slack",
    "gmail",
]
SUFFIXES: dict[str, Kind] = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".md": "markdown",
    ".markdown": "markdown",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
    ".rst": "rst",
    ".pdf": "pdf",
    ".docx": "docx",
    ".pptx": "pptx",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".epub": "epub",
    ".ipynb": "ipynb",
    ".tex": "latex",
    ".csv": "csv",
    ".tsv": "csv",
    ".mbox": "mbox",
    ".eml": "mbox",
}
APPLE = "mbox"  # the file with the letters, in a folder that Apple's program calls NAME.mbox
_LETTER = re.compile(rb"From .*\d\d:\d\d.*\n[!-9;-~]+:")  # an envelope and a header
# Addresses instead of paths: what they give may be another text tomorrow.
SCHEMES: dict[str, Kind] = {"arxiv:": "latex", "https://arxiv.org/": "latex", "slack:": "slack", "gmail:": "gmail"}


@dataclasses.dataclass(frozen=True)
class ResourceConfig:
    """A text to read, and more of them in `also`."""

    path: str  # a file, a folder, or one of arxiv:ID, slack:CHANNEL,CHANNEL and gmail:QUERY
    kind: Kind | None = None  # None: the path tells
    include: tuple[str, ...] = ()  # of a directory: the files to read, in .gitignore's patterns; none: every text
    api_url: str | None = None  # where arXiv, Slack or Gmail answer; None: their public address
    weight: float = 1.0  # its share of the chunks, where there are several
    also: tuple[ResourceConfig, ...] = ()  # more resources of the same run

    def __post_init__(self):
        if not 0 < self.weight < float("inf"):
            raise UserError(f"config.resource.weight is {self.weight}, expected a number above 0")

    @property
    def is_remote(self) -> bool:
        return self.path.startswith(tuple(SCHEMES))

    def every(self) -> Iterator[ResourceConfig]:
        """Yields this resource and all others of the run."""
        yield self
        for other in self.also:
            yield from other.every()

    def found_kind(self) -> Kind:
        """The kind that was set, or else the one that the path shows by its scheme, folder or suffix."""
        if self.kind:
            return self.kind
        for scheme, kind in SCHEMES.items():
            if self.path.startswith(scheme):
                return kind
        path = Path(self.path)
        if path.is_dir():
            if (path / "channels.json").is_file() and (path / "users.json").is_file():
                return "slack"
            if is_mailbox(path / APPLE):
                return "mbox"
            return "latex" if any(_is_main_file(file) for file in path.glob("*.tex")) else "directory"
        if path.suffix.lower() == ".zip":
            return "slack"  # the only kind that comes as an archive
        return SUFFIXES.get(path.suffix.lower()) or ("mbox" if is_mailbox(path) else "text")


def is_mailbox(path: Path) -> bool:
    """Whether a file begins as an mbox file does, whatever it is called: many programs give such files no suffix."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return bool(_LETTER.match(file.read(4096)))


def _is_main_file(path: Path) -> bool:
    try:
        return path.is_file() and b"\\documentclass" in path.read_bytes()
    except OSError:  # the folder's own reader counts what it may not read
        return False
