"""A tool is something that either side of a conversation may ask before it writes a message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol


class Tool(Protocol):
    name: str
    description: str
    parameters: Mapping[str, Any]  # JSON schema of the arguments

    async def call(self, arguments: Mapping[str, Any]) -> str:
        """The tool's answer. Raises: UserError, with the tool's complaint."""
        ...
