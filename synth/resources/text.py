"""One text file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from synth.config import ResourceConfig


@dataclasses.dataclass(frozen=True)
class TextFile:
    config: ResourceConfig

    def read(self) -> str:
        """The whole text.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: it holds no text, or is not UTF-8.
        """
        path = Path(self.config.path)
        if not path.is_file():
            raise FileNotFoundError(f"document {path} does not exist: set config.resource.path to a text file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"document {path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
        if not text.strip():
            raise ValueError(f"document {path} is empty: there is nothing to talk about")
        return text
