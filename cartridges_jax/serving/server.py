"""An OpenAI-compatible server of one model and its cartridges: the routes, and who may use them.

Two worlds that share no state: asyncio speaks HTTP here, one engine thread (`engine_thread.py`) does the rest.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import ipaddress
import logging
import math
import random
import socket
import time
import urllib.parse
from collections.abc import Callable, Sequence
from typing import Any

from aiohttp import web

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving import chat_page, connections
from cartridges_jax.serving.catalog import Catalog
from cartridges_jax.serving.choices import Tokens
from cartridges_jax.serving.completions import Completions, Handler
from cartridges_jax.serving.engine_thread import EngineThread
from cartridges_jax.serving.metrics import Metrics
from cartridges_jax.serving.openapi import document_of
from cartridges_jax.serving.protocol import ApiError, Fields, read_body, shorten, to_json, token_ids
from cartridges_jax.serving.requests import Reader
from cartridges_jax.serving.scheduler import Engine, most_tokens
from cartridges_jax.serving.store import CartridgeStore
from cartridges_jax.serving.warmup import Warmup

logger = logging.getLogger(__name__)

_reply = functools.partial(web.json_response, dumps=to_json)
OPEN = ("/", "/health", "/ping")  # the paths that need no key, beside the files of the chat page


class Server:
    """The routes. `model` is the name that clients use; a cartridge is chosen by its id or as the model `model:id`.

    Args:
      max_queue: how many answers may wait for their turn; beyond them requests are refused.
      max_body: the most bytes that a request may have.
      max_seconds: how long a request may take; fetching and loading a cartridge and waiting are included.
      describe: a function that tells what a loaded cartridge is made of, as JSON.
      kv_bytes_per_token: what a position of prompt, answer or cartridge costs, for the chat page to show.
      document: a text that the chat page compares cartridges with.
      programs: calls that compile one program each, before the first request is answered.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        store: CartridgeStore,
        model: str,
        *,
        max_queue: int = 64,
        max_body: int = 1 << 20,
        max_seconds: float = 600.0,
        api_key: str | None = None,
        describe: Callable[[Any], dict[str, Any]] = lambda _: {},
        kv_bytes_per_token: int = 0,
        document: str | None = None,
        programs: Sequence[Callable[[], object]] = (),
        rng: random.Random | None = None,
    ):
        self._engine, self._tokenizer, self._store, self._model = engine, tokenizer, store, model
        self._max_queue, self._max_body, self._max_seconds, self._api_key = max_queue, max_body, max_seconds, api_key
        self._kv_bytes_per_token, self._document = kv_bytes_per_token, document
        self._created = int(time.time())
        self._loopback = True
        self._connections = connections.Connections(max(connections.LEAST, 2 * (engine.max_num_seqs + max_queue)))
        self._metrics = Metrics()
        self._warmup = Warmup(programs)
        self._catalog = Catalog(store, describe, max_seconds)
        self._reader = Reader(
            engine, tokenizer, store, model, max_choices=engine.max_num_seqs + max_queue, rng=rng or random.Random()
        )
        self._completions = Completions(
            self._reader, self._catalog, Tokens(tokenizer), self._metrics, engine.max_num_seqs, max_seconds
        )
        self._thread: EngineThread | None = None

    async def start(self, sock: socket.socket) -> web.AppRunner:
        """Serves on a bound socket until the runner's `cleanup`."""
        self._loopback = is_loopback(sock)
        # Without handler_cancellation a client that goes away would be answered to the end.
        runner = web.AppRunner(
            self._app(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=5.0,
            auto_decompress=False,
            keepalive_timeout=connections.IDLE_SECONDS,
            logger=connections.logger,
        )
        await runner.setup()
        await connections.Site(runner, sock, self._connections).start()
        return runner

    async def warm(self) -> None:
        """Returns when every program is compiled: what was asked until then is answered from then on."""
        await self._running().warm.wait()

    async def failed(self) -> None:
        """Returns when the engine has failed: nothing is served from then on."""
        await self._running().failed.wait()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=self._max_body, middlewares=[self._counted, _errors, self._authorize])
        reader, completions, catalog = self._reader, self._completions, self._catalog
        app.add_routes(
            [
                *chat_page.routes(self._document),
                web.get("/openapi.json", self._openapi),
                web.get("/health", self._health),
                web.get("/ping", _ping),
                web.get("/metrics", self._metrics_text),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{id}", self._one_model),
                web.post("/v1/chat/completions", completions.single(reader.chat)),
                web.post("/v1/completions", completions.single(reader.completion)),
                web.get("/v1/cartridges", catalog.listing),
                web.get("/v1/cartridges/{id}", catalog.one),
                web.post("/v1/cartridges/load", catalog.managing(catalog.load)),
                web.post("/v1/cartridges/unload", catalog.managing(catalog.unload)),
                web.post("/v1/cartridges/pin", catalog.managing(catalog.pin)),
                web.post("/v1/cartridges/unpin", catalog.managing(catalog.unpin)),
                web.post("/tokenize", self._tokenize),
                web.get("/tokenizer_info", self._tokenizer_info),
                web.post("/detokenize", self._detokenize),
                web.post("/custom/synchronous-batch-completions", completions.batch),
            ]
        )
        for start in ("/custom/cartridge", "/v1/cartridge", "/batch/cartridge"):
            chat = completions.single(functools.partial(reader.chat, fingerprint=True))
            completion = completions.single(functools.partial(reader.completion, fingerprint=True))
            # the older client sends its batches there
            app.router.add_post(f"{start}/chat/completions", completions.batch if "batch" in start else chat)
            app.router.add_post(f"{start}/completions", completion)
            app.router.add_post(f"{start}/synchronous-batch-completions", completions.batch)
        app.on_startup.append(self._start_thread)
        app.on_shutdown.append(self._stop_thread)
        return app

    async def _start_thread(self, _: web.Application) -> None:
        self._thread = EngineThread(self._engine, self._max_queue, self._max_seconds, self._warmup)
        self._completions.thread = self._thread

    async def _stop_thread(self, _: web.Application) -> None:
        self._catalog.close()
        await self._running().stop()

    def _running(self) -> EngineThread:
        assert self._thread is not None, "the server has not been started"
        return self._thread

    @web.middleware
    async def _authorize(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin", "")
        if origin and origin.partition("://")[2] != request.host:
            raise ApiError(403, f"another site's page, {shorten(origin)}, may not ask this server", code="origin")
        if self._api_key is None:
            # another site's name that leads here would give its page what only this machine may have
            if self._loopback and not _is_local(_host_of(request)):
                message = f"this server has no API key and is asked as {shorten(request.host)}: ask for 127.0.0.1"
                raise ApiError(403, message, code="host")
        elif not (request.path in OPEN or request.path.startswith(chat_page.PREFIX)):
            # bytes that are no UTF-8 are surrogates there
            header = request.headers.get("Authorization", "").encode(errors="surrogateescape")
            scheme, _, given = header.partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._api_key.encode()):
                raise ApiError(401, "no or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
        return await handler(request)

    @web.middleware
    async def _counted(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        with self._connections.asking(request):
            response = await handler(request)
        resource = request.match_info.route.resource
        self._metrics.request(resource.canonical if resource else "unknown", response.status)
        return response

    async def _openapi(self, _: web.Request) -> web.Response:
        return _reply(document_of(self._model, self._reader.table))

    async def _health(self, _: web.Request) -> web.Response:
        if not self._running().alive:
            return _reply({"status": "failed"}, status=503)
        if self._warmup.is_done:
            return _reply({"status": "ok"})
        left = self._warmup.seconds_left
        programs = {"programs": self._warmup.total, "compiled": self._warmup.compiled, "seconds_left": left}
        headers = {"Retry-After": str(math.ceil(left or 1))}
        return _reply({"status": "starting", **programs}, status=503, headers=headers)

    async def _metrics_text(self, _: web.Request) -> web.Response:
        gauges = {"answers_live": self._running().num_live}
        gauges |= dict.fromkeys(("max_num_seqs", "slots"), self._engine.max_num_seqs)
        gauges["cartridges_loaded"] = self._store.num_held
        return web.Response(text=self._metrics.text(gauges), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _models(self, _: web.Request) -> web.Response:
        # The model alone: Tokasaurus' clients insist on exactly one, and /v1/cartridges lists the others.
        return _reply({"object": "list", "data": [self._model_entry(self._model)]})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        self._reader.read_model_name(name)
        return _reply(self._model_entry(name))

    def _model_entry(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "cartridges-jax",
            "max_model_len": most_tokens(self._engine, None),
            "kv_bytes_per_token": self._kv_bytes_per_token,
        }

    async def _tokenize(self, request: web.Request) -> web.Response:
        ids, token_strs = await asyncio.to_thread(self._reader.tokenize, await read_body(request))
        longest = most_tokens(self._engine, None)
        return _reply({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": token_strs})

    async def _tokenizer_info(self, _: web.Request) -> web.Response:
        return _reply(self._tokenizer.settings)

    async def _detokenize(self, request: web.Request) -> web.Response:
        return _reply({"prompt": await asyncio.to_thread(self._text, await read_body(request))})

    def _text(self, fields: Fields) -> str:
        return self._tokenizer.decode(
            token_ids("tokens", fields.get("tokens"), self._tokenizer.vocab_size), skip_special_tokens=False
        )


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach what listens there."""
    return _is_local(sock.getsockname()[0].partition("%")[0])


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


async def _ping(_: web.Request) -> web.Response:
    return _reply({"message": "pong"})


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge as error:
        return ApiError(413, error.text or error.reason, code="body_too_large").response()
    except web.HTTPException as error:
        refusal = ApiError(error.status, f"{request.method} {shorten(request.path)}: {error.reason}").response()
        refusal.headers.update({name: error.headers[name] for name in ("Allow",) if name in error.headers})
        return refusal
    except Exception:
        logger.exception("%s %r failed", request.method, request.path)
        return ApiError(500, "the server failed at this request: its log says why").response()
