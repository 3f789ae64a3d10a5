"""One text file."""

from __future__ import annotations

import dataclasses

from command_line import files
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
        return files.read_text(self.config.path, "a text file: set config.resource.path")
