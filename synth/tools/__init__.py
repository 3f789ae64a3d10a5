"""Tools that either side of a conversation may use."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from synth.config import SynthConfig
from synth.tools.base import Tool


@contextlib.asynccontextmanager
async def opened(config: SynthConfig, text: str) -> AsyncIterator[tuple[Tool, ...]]:
    """The tools that the config names, ready for use; `text` is what a retrieval tool searches."""
    yield ()
