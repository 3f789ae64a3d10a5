"""An OpenAI-compatible server of one model and its cartridges: the routes, and who may use them.

Two worlds that share no state: asyncio speaks HTTP here, one engine thread (`engine_thread.py`) does the rest.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import random
import socket
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from aiohttp import web

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving import chat_page, connections, metrics
from cartridges_jax.serving.access import ID, Access, Handler, is_loopback, request_id
from cartridges_jax.serving.catalog import Catalog
from cartridges_jax.serving.choices import Tokens
from cartridges_jax.serving.completions import Completions
from cartridges_jax.serving.engine_thread import EngineThread
from cartridges_jax.serving.messages import Message
from cartridges_jax.serving.openapi import document_of
from cartridges_jax.serving.protocol import ApiError, Fields, read_body, shorten, to_json, token_ids
from cartridges_jax.serving.requests import Reader
from cartridges_jax.serving.responses import Response
from cartridges_jax.serving.scheduler import Engine, most_tokens
from cartridges_jax.serving.store import CartridgeStore, Reference
from cartridges_jax.serving.warmup import Warmup

logger = logging.getLogger(__name__)

_reply = functools.partial(web.json_response, dumps=to_json)
# Paths of OpenAI's API that clients ask for and that a server like this cannot have.
ABSENT = {"/v1/embeddings": "this server has no embeddings: it serves a language model, ask another server for them"}


class Server:
    """The routes. `model` is the name that clients use; a cartridge is chosen by its id or as the model `model:id`.

    Args:
      max_queue: how many answers may wait for their turn; beyond them requests are refused.
      max_body: the most bytes that a request may have.
      max_seconds: how long a request may take; fetching and loading a cartridge and waiting are included.
      api_key, allow_origins: who may ask, as `Access` has it.
      list_cartridges: whether `/v1/models` lists the model with each cartridge, too.
      describe: a function that tells what a loaded cartridge is made of, as JSON.
      kv_bytes_per_token: what a position of prompt, answer or cartridge costs, for the chat page to show.
      document: a text that the chat page compares cartridges with.
      programs: calls that compile one program each, before the first request is answered.
      rare_programs: the same, while there is no request.
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
        allow_origins: Collection[str] = (),
        list_cartridges: bool = True,
        describe: Callable[[Any], dict[str, Any]] = lambda _: {},
        kv_bytes_per_token: int = 0,
        document: str | None = None,
        programs: Sequence[Callable[[], object]] = (),
        rare_programs: Sequence[Callable[[], object]] = (),
        rng: random.Random | None = None,
    ):
        self._engine, self._tokenizer, self._store, self._model = engine, tokenizer, store, model
        self._max_queue, self._max_body, self._max_seconds = max_queue, max_body, max_seconds
        self._access, self._list_cartridges = Access(api_key, allow_origins), list_cartridges
        self._kv_bytes_per_token, self._document = kv_bytes_per_token, document
        self._created = int(time.time())
        self._connections = connections.Connections(max(connections.LEAST, 2 * (engine.max_num_seqs + max_queue)))
        self._metrics = metrics.Metrics(model)
        self._warmup = Warmup(programs, rare_programs)
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
        self._access.is_loopback = is_loopback(sock)
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
        app = web.Application(client_max_size=self._max_body, middlewares=[self._counted, _errors, self._access.check])
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
                web.post("/v1/responses", completions.speaking(Response)),
                web.post("/v1/messages", completions.speaking(Message)),
                web.post("/v1/messages/count_tokens", self._count_tokens),
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
        app.on_response_prepare.append(self._access.add_headers)
        app.on_startup.append(self._start_thread)
        app.on_shutdown.append(self._stop_thread)
        return app

    async def _start_thread(self, _: web.Application) -> None:
        thread = self._completions.thread = self._thread = EngineThread(
            self._engine, self._max_queue, self._max_seconds, self._warmup
        )
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "vllm:num_requests_running": ("answers that are being written", lambda: thread.num_running),
            "vllm:num_requests_waiting": ("answers that wait for their turn", lambda: thread.num_waiting),
            "vllm:kv_cache_usage_perc": ("part of the KV cache that answers hold, 0 to 1", lambda: thread.kv_usage),
            "cartridges_jax_max_num_seqs": (
                "answers that can be written at the same time",
                lambda: self._engine.max_num_seqs,
            ),
            "cartridges_jax_cartridges_loaded": (
                "cartridges and compositions in memory",
                lambda: self._store.num_held,
            ),
        }
        for name, (help, value) in gauges.items():
            self._metrics.add_gauge(name, help, value)

    async def _stop_thread(self, _: web.Application) -> None:
        self._catalog.close()
        await self._running().stop()

    def _running(self) -> EngineThread:
        assert self._thread is not None, "the server has not been started"
        return self._thread

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
        return web.Response(body=self._metrics.text(), headers={"Content-Type": metrics.TYPE})

    async def _models(self, _: web.Request) -> web.Response:
        ids = await self._catalog.local_ids() if self._list_cartridges else []
        cartridges = [self._model_entry(f"{self._model}:{id}", Reference(id)) for id in ids]
        return _reply({"object": "list", "data": [self._model_entry(self._model, None), *cartridges]})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        return _reply(self._model_entry(name, self._reader.read_model_name(name)))

    def _model_entry(self, name: str, cartridge: Reference | None) -> dict[str, Any]:
        prefix, _ = self._store.state(cartridge) if cartridge else (None, False)
        entry = {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "cartridges-jax",
            "max_model_len": most_tokens(self._engine, prefix),
            "kv_bytes_per_token": self._kv_bytes_per_token,
        }
        return entry | ({"parent": self._model} if cartridge else {})

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked, wants_texts = await asyncio.to_thread(self._reader.tokenize, await read_body(request))
        ready, prefix = await self._completions.prepare(asked)
        ids, longest = list(ready.requests[0].prompt), most_tokens(self._engine, prefix)
        texts = [self._tokenizer.decode([id], skip_special_tokens=False) for id in ids] if wants_texts else None
        return _reply({"count": len(ids), "max_model_len": longest, "tokens": ids, "token_strs": texts})

    async def _count_tokens(self, request: web.Request) -> web.Response:
        message = Message(self._reader, await read_body(request))
        try:
            ready, _ = await self._completions.prepare(await asyncio.to_thread(message.read))
        except ApiError as error:
            return message.refusal(error)
        return _reply({"input_tokens": len(ready.requests[0].prompt)})

    async def _tokenizer_info(self, _: web.Request) -> web.Response:
        return _reply(self._tokenizer.settings)

    async def _detokenize(self, request: web.Request) -> web.Response:
        return _reply({"prompt": await asyncio.to_thread(self._text, await read_body(request))})

    def _text(self, fields: Fields) -> str:
        fields.has_only("tokens", "model")
        return self._tokenizer.decode(
            token_ids("tokens", fields.get("tokens"), self._tokenizer.vocab_size), skip_special_tokens=False
        )


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
        message = ABSENT.get(request.path, f"{request.method} {shorten(request.path)}: {error.reason}")
        refusal = ApiError(error.status, message).response()
        refusal.headers.update({name: error.headers[name] for name in ("Allow",) if name in error.headers})
        return refusal
    except Exception:
        id = request_id(request)
        logger.exception("%s %r failed (request %s)", request.method, request.path, id)
        failure = ApiError(500, f"the server failed at this request: its log says why, at request {id}").response()
        failure.headers[ID] = id
        return failure
