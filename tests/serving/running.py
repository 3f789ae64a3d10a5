"""A server that runs beside a test, in a thread with an event loop of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cartridges_jax import serve
from cartridges_jax.serving.server import Server


@contextmanager
def running(server: Server) -> Iterator[str]:
    """The server's root URL, on a free port of the loopback."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    sock = serve.bind("127.0.0.1", 0)
    stop = asyncio.Event()

    async def body() -> None:
        runner = await server.start(sock)
        ready.set()
        try:
            await stop.wait()
        finally:
            await runner.cleanup()

    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(body())

    thread = threading.Thread(target=run, name="server")
    thread.start()
    try:
        assert ready.wait(30)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
