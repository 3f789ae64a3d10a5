"""The tools that a config names, opened together and closed together."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from cartridges_jax.command_line.errors import UserError
from synth.config import SynthConfig
from synth.tools import mcp
from synth.tools.base import Tool
from synth.tools.search import Search


@contextlib.asynccontextmanager
async def opened(config: SynthConfig, text: str) -> AsyncIterator[tuple[Tool, ...]]:
    """The tools that the config names, ready for use. `text` is what the search tool searches.

    Raises:
      ImportError, UserError: an MCP server cannot be used, or two tools share a name.
    """
    async with contextlib.AsyncExitStack() as stack:
        tools: list[Tool] = [Search(text)] if config.tools.search else []
        for server in config.tools.mcp:
            tools += await stack.enter_async_context(mcp.opened(server))
        names = [tool.name for tool in tools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(
                f"config.tools: more than one tool is called {', '.join(twice)}, so a call would be unclear"
            )
        yield tuple(tools)
