"""The chat page at `/`: its files, and the document that it compares a cartridge with.

It asks the API as any client does.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from aiohttp import web

from cartridges_jax.serving.protocol import ApiError

FILES = ("index.html", "page.css", "page.js", "chat.js", "compare.js", "markdown.js")
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
PREFIX = "/page/"


def routes(document: str | None) -> Sequence[web.RouteDef]:
    """The routes of the chat page, which anyone may see, and of the document, which needs the key as the API does."""

    async def send_document(_: web.Request) -> web.Response:
        if document is None:
            raise ApiError(404, "this server was started without --document", code="no_document")
        return web.Response(text=document)

    return [web.get("/", _file), web.get(f"{PREFIX}{{name}}", _file), web.get("/document", send_document)]


async def _file(request: web.Request) -> web.Response:
    name = request.match_info.get("name", FILES[0])
    if name not in FILES:
        raise web.HTTPNotFound()
    text = resources.files("cartridges_jax.serving").joinpath("web", name).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=TYPES[name.rpartition(".")[2]], charset="utf-8", headers=HEADERS)
