"""How many connections a server keeps open, and idle ones for how long: keeping one open costs a client nothing."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from cartridges_jax.serving.protocol import RETRY_AFTER_SECONDS, ApiError

IDLE_SECONDS = 75.0  # in which a whole request head must come; proxies keep a connection for less, 60 s as a rule
UNREAD_SECONDS = 60.0  # for a client that reads nothing of what it is sent
LEAST = 512  # connections, below the 1,024 files that a process may have open on many a system


class _WithoutBadRequests(logging.Filter):
    """Leaves out errors about bytes that are no HTTP: the sender gets them, and could fill the log with tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


logger = logging.getLogger(__name__)
logger.addFilter(_WithoutBadRequests())


class Connections:
    """The open connections. Idle ones make room: first those that never asked, then those answered longest ago."""

    def __init__(self, most: int):
        self._most = most
        self._busy: dict[web.RequestHandler, bool] = {}  # those that have asked; the one answered longest ago first

    @contextmanager
    def asking(self, request: web.Request) -> Iterator[None]:
        """Keeps the connection of a request from making room while the request is under way."""
        self._busy[request.protocol] = True
        try:
            yield
        finally:
            self._busy.pop(request.protocol, None)
            self._busy[request.protocol] = False

    def protocol(self, server: web.Server) -> asyncio.Protocol:
        """The protocol that speaks with a client that has just connected: the server's, or one that turns it away."""
        held = dict.fromkeys(one for one in server.connections if one.transport and not one.transport.is_closing())
        self._busy = {one: busy for one, busy in self._busy.items() if one in held}
        over = len(held) + 1 - self._most
        if over > 0:
            idle = [one for one in held if one not in self._busy]
            idle += [one for one, busy in self._busy.items() if not busy]
            if not idle:
                return _Full()
            for one in idle[:over]:
                assert one.transport is not None
                one.transport.abort()  # closing it politely would wait until the client has read everything
        return server()


class Site(web.SockSite):
    """A bound socket whose number of connections is limited."""

    def __init__(self, runner: web.AppRunner, sock: socket.socket, connections: Connections):
        super().__init__(runner, sock)
        self._connections = connections

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        # The system does it: a connection that was closed here lasts until its client has read everything.
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # on Linux; connections have it from the socket that listens
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * UNREAD_SECONDS))
        self._server = await asyncio.get_running_loop().create_server(
            lambda: self._connections.protocol(server), sock=self._sock, backlog=self._backlog
        )


class _Full(asyncio.Protocol):
    """Tells the client to come again later."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        message = "as many requests as this server takes are on their way: try again later"
        body = json.dumps(ApiError(503, message, code="too_many_connections").body)
        head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: {RETRY_AFTER_SECONDS}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        transport.write((head + body).encode())
        transport.close()
