"""The cartridges of a server, for requests and for those who manage them: `/v1/cartridges`.

Files are read on one thread, fetched on another: neither the event loop nor the engine's thread ever waits for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.protocol import ApiError, check_cartridges, read_body, read_reference, to_json
from cartridges_jax.serving.scheduler import Prefix
from cartridges_jax.serving.store import CartridgeStore, Reference, TooMany, UnknownCartridge, version

logger = logging.getLogger(__name__)

MAX_FETCHES = 8  # downloads that may wait for one another


class Catalog:
    """Loads, describes, pins and drops cartridges; `describe` tells what a loaded one is made of, as JSON."""

    def __init__(self, store: CartridgeStore, describe: Callable[[Any], dict[str, Any]], max_seconds: float):
        self._store, self._describe, self._max_seconds = store, describe, max_seconds
        self._lister = ThreadPoolExecutor(1, "listing")
        self._loader = ThreadPoolExecutor(1, "cartridges")
        self._fetcher = ThreadPoolExecutor(1, "downloads")
        self._fetches = 0
        self._in_use: Counter[str] = Counter()

    def close(self) -> None:
        for executor in (self._lister, self._loader, self._fetcher):
            executor.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def using(self, references: Sequence[Reference]) -> Iterator[None]:
        """Counts a request on these cartridges, while it runs."""
        names = [reference.name for reference in references]
        self._in_use.update(names)
        try:
            yield
        finally:
            self._in_use.subtract(names)
            self._in_use = +self._in_use  # without those that came to 0

    async def prefix(self, references: Sequence[Reference]) -> Prefix | None:
        """The cartridges as one; None if there are none. Raises: ApiError, if they cannot be had, or not in time."""
        if not references:
            return None
        names = ", ".join(reference.name for reference in references)
        try:
            async with asyncio.timeout(self._max_seconds):
                self._store.check(references)
                for reference in references:
                    if self._store.missing(reference):
                        await self._fetch(reference)
                ready = self._store.ready(references)
                return ready or await self._in(self._loader, self._store.prefix, references)
        except TimeoutError as error:
            message = f"cartridge {names!r} was not here within {self._max_seconds:g} s: ask again, or load it first"
            raise ApiError(504, message, "cartridges", "timeout") from error
        except (UnknownCartridge, FileNotFoundError) as error:
            raise ApiError(404, str(error), "cartridges", "cartridge_not_found") from error
        except UserError as error:
            raise ApiError(400, f"cartridge {names!r}: {error}", "cartridges", "cartridge_refused") from error
        except (ConnectionError, PermissionError) as error:
            raise ApiError(502, f"cartridge {names!r}: {error}", "cartridges", "cartridge_unavailable") from error
        except ApiError:
            raise
        except Exception as error:
            logger.exception("cartridge %r cannot be loaded", names)
            message = f"cartridge {names!r} cannot be loaded: the server's log says why"
            raise ApiError(500, message, "cartridges", "cartridge_broken") from error

    async def local_ids(self) -> list[str]:
        """The cartridges that a model's name may choose, sorted."""
        return await self._in(self._lister, self._store.list)

    async def listing(self, _: web.Request) -> web.Response:
        return web.Response(text=await self._in(self._lister, self._listed), content_type="application/json")

    def _listed(self) -> str:
        known = [Reference(id) for id in self._store.list()] + self._store.remote()
        return to_json({"object": "list", "data": [self._entry(reference) for reference in known]})

    async def one(self, request: web.Request) -> web.Response:
        reference = Reference(request.match_info["id"])
        check_cartridges(self._store, [reference], "id")
        return web.json_response(self._entry(reference), dumps=to_json)

    async def load(self, reference: Reference) -> None:
        await self.prefix([reference])

    async def unload(self, reference: Reference) -> None:
        self._store.unload(reference)

    async def pin(self, reference: Reference) -> None:
        await self.prefix([reference])
        self._store.pin(reference, True)

    async def unpin(self, reference: Reference) -> None:
        self._store.pin(reference, False)

    def managing(self, act: Callable[[Reference], Awaitable[None]]) -> Callable[[web.Request], Awaitable[web.Response]]:
        """The handler of a POST with `{"id", "source", "force_redownload"}`; it replies with the cartridge's state."""

        async def handler(request: web.Request) -> web.Response:
            reference = read_reference("cartridge", (await read_body(request)).values)
            check_cartridges(self._store, [reference], "id")
            try:
                await act(reference)
            except UnknownCartridge as error:
                raise ApiError(409, str(error), "id", "cartridge_not_loaded") from error
            except TooMany as error:
                raise ApiError(409, str(error), "id", "too_many_pinned") from error
            except UserError as error:
                raise ApiError(409, str(error), "id", "cartridge_pinned") from error
            return web.json_response(self._entry(reference), dumps=to_json)

        return handler

    def _entry(self, reference: Reference) -> dict[str, Any]:
        prefix, pinned = self._store.state(reference)
        entry: dict[str, Any] = {
            "id": reference.id,
            "object": "cartridge",
            "source": reference.source,
            "loaded": prefix is not None,
            "pinned": pinned,
            "in_use": self._in_use[reference.name],
            "version": prefix and version(prefix),
        }
        return entry | ({"slots": prefix.length, **self._describe(prefix.cartridge)} if prefix else {})

    async def _fetch(self, reference: Reference) -> None:
        if self._fetches >= MAX_FETCHES:
            raise ApiError(429, f"{self._fetches} cartridges are being fetched already: try again later", code="busy")
        self._fetches += 1
        try:
            await self._in(self._fetcher, self._fetch_once, reference)
        finally:
            self._fetches -= 1

    def _fetch_once(self, reference: Reference) -> None:
        if self._store.missing(reference):  # else another request has brought it meanwhile
            self._store.fetch(reference)

    async def _in(self, executor: ThreadPoolExecutor, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(executor, function, *arguments)
