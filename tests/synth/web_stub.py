"""arXiv, Slack and Gmail as far as resources ask them, on the loopback, in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class WebStub:
    """Serves `routes` ({"GET /path/{name}": handler}) from `start` to `stop`; every request is kept in `requests`."""

    def __init__(self, routes: dict[str, Handler]):
        self.requests: list[web.BaseRequest] = []
        self.url = ""
        self._routes = routes
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), daemon=True)

    def __enter__(self) -> WebStub:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()

        @web.middleware
        async def remember(request: web.Request, handler: Handler) -> web.StreamResponse:
            self.requests.append(request)
            return await handler(request)

        app = web.Application(client_max_size=2**28, middlewares=[remember])
        for route, handler in self._routes.items():
            method, path = route.split()
            app.router.add_route(method, path, handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        self._started.set()
        await self._stopped.wait()
        await runner.cleanup()
