"""A real MCP server over stdio, with tools that answer, complain and stall; `python mcp_server.py`."""

from __future__ import annotations

import asyncio
import os

from mcp.server import MCPServer

server = MCPServer("stock")


@server.tool()
def weight(animal: str, number: int = 1) -> str:
    """Says what an animal weighs."""
    if animal == "unicorn":
        raise ValueError("there are no unicorns")
    return f"{number} {animal} weighs {number * 7} {os.environ.get('UNIT', 'grams')}"


@server.tool()
def search() -> str:
    """Has the name of a tool that is built in."""
    return "nothing"


@server.tool()
async def stall() -> str:
    """Never answers in time."""
    await asyncio.sleep(60)
    return "late"


if __name__ == "__main__":
    server.run("stdio")
