"""Who may ask a server: the pages of which sites, under which of the machine's names, with which key."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Collection

from aiohttp import web

from cartridges_jax.serving import chat_page
from cartridges_jax.serving.protocol import ApiError, shorten

OPEN = ("/", "/health", "/ping")  # the paths that need no key, beside the files of the chat page
ANY = "*"  # an origin that stands for all
PREFLIGHT_SECONDS = 600  # for which a browser need not ask again whether it may ask
ID = "X-Request-Id"
PLAIN = re.compile(r"[\w.:-]{1,128}", re.ASCII)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access:
    """Lets requests in or refuses them.

    Args:
      api_key: what clients must send; without one only this machine's names are answered.
      allow_origins: sites such as `https://chat.example` whose pages may ask, or `*` for all.
    """

    def __init__(self, api_key: str | None, allow_origins: Collection[str]):
        self._api_key, self._allow_origins = api_key, allow_origins
        self.is_loopback = True  # whether the server can be reached from this machine only

    @web.middleware
    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers for the handler where a request may not pass. Raises: ApiError."""
        origin = request.headers.get("Origin", "")
        if origin and origin.partition("://")[2] != request.host:
            if not self._allows(origin):
                raise ApiError(403, f"another site's page, {shorten(origin)}, may not ask this server", code="origin")
            if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
                return _preflight(request)
        if self._api_key is None:
            # another site's name that leads here would give its page what only this machine may have
            if self.is_loopback and not _is_local(_host_of(request)):
                message = f"this server has no API key and is asked as {shorten(request.host)}: ask for 127.0.0.1"
                raise ApiError(403, message, code="host")
        elif not (_is_open(request.path) or hmac.compare_digest(_key_of(request), self._api_key.encode())):
            raise ApiError(401, "no or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
        return await handler(request)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Names the request in its response, for logs, and lets the page of an allowed site read it."""
        if ID not in response.headers:
            response.headers[ID] = request_id(request)
        origin = request.headers.get("Origin", "")
        if origin and self._allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = f"{ID}, Retry-After"
            response.headers["Vary"] = "Origin"

    def _allows(self, origin: str) -> bool:
        return ANY in self._allow_origins or origin in self._allow_origins


def request_id(request: web.Request) -> str:
    """The id that the client gave its request, if it is a short plain one, or else a new one."""
    given = request.headers.get(ID, "")
    return given if PLAIN.fullmatch(given) else uuid.uuid4().hex


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach what listens there."""
    return _is_local(sock.getsockname()[0].partition("%")[0])


def _preflight(request: web.Request) -> web.Response:
    """What a browser asks before a page of another site may ask: it may, whatever it wants to send."""
    headers = {
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
    }
    if "Access-Control-Request-Private-Network" in request.headers:  # from the web to this machine
        headers["Access-Control-Allow-Private-Network"] = "true"
    return web.Response(status=204, headers=headers)


def _is_open(path: str) -> bool:
    return path in OPEN or path.startswith(chat_page.PREFIX)


def _key_of(request: web.Request) -> bytes:
    """The key as OpenAI's clients send it, or as Anthropic's do; bytes that are no UTF-8 are surrogates there."""
    scheme, _, given = request.headers.get("Authorization", "").encode(errors="surrogateescape").partition(b" ")
    if scheme.lower() == b"bearer":
        return given.strip()
    return request.headers.get("X-Api-Key", "").encode(errors="surrogateescape")


def _host_of(request: web.Request) -> str | None:
    try:
        return urllib.parse.urlsplit(f"//{request.host}").hostname
    except ValueError:
        return None


def _is_local(host: str | None) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
