"""The tools of an MCP server, a child process that is called over stdio (modelcontextprotocol.io)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from cartridges_jax.command_line.errors import MissingPackage, UserError
from synth.config import McpConfig

if TYPE_CHECKING:
    from mcp import ClientSession

START_SECONDS = 120.0  # a server may take: some are downloaded when they start

log = logging.getLogger(__name__)


class McpTool:
    def __init__(self, session: ClientSession, name: str, description: str, parameters: Mapping[str, Any]):
        self._session, self.name, self.description, self.parameters = session, name, description, parameters

    async def call(self, arguments: Mapping[str, Any]) -> str:
        from mcp import MCPError

        try:
            result: Any = await self._session.call_tool(self.name, dict(arguments))
        except MCPError as error:
            raise UserError(f"the MCP server refuses the call: {error}") from error
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise UserError(text or "the tool failed without a word")
        return text


@contextlib.asynccontextmanager
async def opened(config: McpConfig) -> AsyncIterator[list[McpTool]]:
    """The tools of a server that runs meanwhile.

    Raises: MissingPackage, without the package; UserError, if the server does not start or does not speak MCP.
    """
    ready: asyncio.Future[list[McpTool]] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    # In a task of its own: the package's task groups would wrap every error that passes them into a group.
    task = asyncio.create_task(_run(config, ready, stop))
    try:
        yield await _first_words(ready, config)
    finally:
        stop.set()
        if ready.cancelled() or not ready.done():
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _first_words(ready: asyncio.Future[list[McpTool]], config: McpConfig) -> list[McpTool]:
    try:
        return await asyncio.wait_for(ready, START_SECONDS)
    except TimeoutError as error:
        raise UserError(f"config.tools.mcp: {_command(config)} says nothing for {START_SECONDS:g} s") from error


async def _run(config: McpConfig, ready: asyncio.Future[list[McpTool]], stop: asyncio.Event) -> None:
    try:
        from mcp import ClientSession, StdioServerParameters, stdio_client
        from mcp.client.stdio import get_default_environment

        env = get_default_environment() | dict(entry.split("=", 1) for entry in config.env)
        server = StdioServerParameters(command=config.command, args=list(config.args), env=env)
        async with stdio_client(server) as streams, ClientSession(*streams) as session:
            await session.initialize()
            listed = (await session.list_tools()).tools
            ready.set_result([McpTool(session, t.name, t.description or "", t.input_schema) for t in listed])
            await stop.wait()
    except ImportError:
        ready.set_exception(
            MissingPackage("config.tools.mcp needs the mcp package: pip install 'cartridges-jax[tools]'")
        )
    except Exception as error:  # of any kind: the package raises its own, the system's, and groups of both
        if ready.done():
            log.warning("%s ended badly: %s", _command(config), _first(error))
            return
        problem = f"config.tools.mcp: {_command(config)} does not start as an MCP server: {_first(error)}"
        ready.set_exception(UserError(problem))


def _command(config: McpConfig) -> str:
    return repr(" ".join((config.command, *config.args)))


def _first(error: Exception) -> Exception:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error
