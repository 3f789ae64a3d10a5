"""An OpenAI-compatible server of one model and its cartridges: the routes.

Two worlds that share no state: asyncio speaks HTTP here, one engine thread (`engine_thread.py`) does the rest.
"""

from __future__ import annotations

import functools
import hmac
import json
import logging
import random
import socket
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from aiohttp import web

from cartridges_jax.serving.answers import Answer, Delta
from cartridges_jax.serving.engine_thread import Accepted, EngineThread
from cartridges_jax.serving.protocol import (
    SEEDS,
    UNSUPPORTED,
    ApiError,
    Call,
    Fields,
    read_cartridge,
    read_messages,
    read_stops,
    refuse,
    shorten,
)
from cartridges_jax.serving.scheduler import Engine, Request
from cartridges_jax.serving.store import CartridgeStore, UnknownCartridge
from cartridges_jax.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class Server:
    """The routes. `model` is the name that clients use; a cartridge is chosen by its id or as the model `model:id`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        store: CartridgeStore,
        model: str,
        *,
        max_queue: int = 64,
        max_body: int = 1 << 20,
        api_key: str | None = None,
        rng: random.Random | None = None,
    ):
        self._engine, self._tokenizer, self._store, self._model = engine, tokenizer, store, model
        self._max_queue, self._max_body, self._api_key = max_queue, max_body, api_key
        self._rng = rng or random.Random()
        self._created = int(time.time())
        self._token_text = functools.lru_cache(1 << 16)(self._decode_token)
        self._thread: EngineThread | None = None

    async def start(self, sock: socket.socket) -> web.AppRunner:
        """Serves on a bound socket until the runner's `cleanup`."""
        # Without handler_cancellation a client that goes away would be answered to the end.
        runner = web.AppRunner(self._app(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        return runner

    async def failed(self) -> None:
        """Returns when the engine has failed: nothing is served from then on."""
        await self._running().failed.wait()

    def _app(self) -> web.Application:
        app = web.Application(client_max_size=self._max_body, middlewares=[_errors, self._authorize])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/v1/models", self._models),
                web.post("/v1/chat/completions", self._chat),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
            ]
        )
        app.on_startup.append(self._start_thread)
        app.on_shutdown.append(self._stop_thread)
        return app

    async def _start_thread(self, _: web.Application) -> None:
        self._thread = EngineThread(self._engine, self._store, self._max_queue)

    async def _stop_thread(self, _: web.Application) -> None:
        await self._running().stop()

    def _running(self) -> EngineThread:
        assert self._thread is not None, "the server has not been started"
        return self._thread

    @web.middleware
    async def _authorize(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._api_key is not None and request.path != "/health":
            given = request.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self._api_key}".encode()):
                raise ApiError(401, "no or wrong API key: send Authorization: Bearer KEY", code="invalid_api_key")
        return await handler(request)

    async def _health(self, _: web.Request) -> web.Response:
        alive = self._running().alive
        return web.json_response({"status": "ok" if alive else "failed"}, status=200 if alive else 503)

    async def _models(self, _: web.Request) -> web.Response:
        names = [self._model, *(f"{self._model}:{id}" for id in self._store.list())]
        shared = {
            "object": "model",
            "created": self._created,
            "owned_by": "cartridges-jax",
            "max_model_len": self._engine.max_length,
        }
        return web.json_response({"object": "list", "data": [{"id": name, **shared} for name in names]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        fields = await read_body(request)
        if fields.get("messages") is None:
            special = fields.flag("add_special_tokens", True)
            ids = self._tokenizer.encode(fields.text("prompt"), add_special_tokens=special)
        else:
            ids = self._chat_ids(fields, self._tokenizer.chat_ids)
        reply = {"count": len(ids), "max_model_len": self._engine.max_length, "tokens": ids, "token_strs": None}
        return web.json_response(reply)

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = (await read_body(request)).get("tokens")
        size = self._tokenizer.vocab_size
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < size for i in ids):
            refuse("tokens", ids, f"a list of token ids from 0 to {size - 1}")
        return web.json_response({"prompt": self._tokenizer.decode(ids, skip_special_tokens=False)})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        job = self._running().submit(self._read_call(await read_body(request)))
        try:
            _, first = await job.events.get()
            if isinstance(first, ApiError):
                raise first
            assert isinstance(first, Accepted)
            answer = Answer(job, first, self._tokenizer, self._token_text)
            return await (_stream(request, answer) if job.call.stream else _respond(answer))
        finally:
            job.cancel()

    def _read_call(self, fields: Fields) -> Call:
        for name, neutral in UNSUPPORTED.items():
            if fields.get(name) not in (None, neutral):
                refuse(name, fields.get(name), "nothing: this server does not support it")
        model, cartridge = self._read_model(fields)
        logprobs = fields.flag("logprobs")
        top_logprobs = fields.integer("top_logprobs", 0, 0, self._engine.max_top_logprobs)
        if top_logprobs and not logprobs:
            refuse("top_logprobs", top_logprobs, "logprobs to be true as well")
        prompt_logprobs = fields.integer("prompt_logprobs", None, 0, self._engine.max_top_logprobs)
        if prompt_logprobs is not None and fields.flag("stream"):
            refuse("prompt_logprobs", prompt_logprobs, "stream to be false")
        request = Request(
            id="",
            prompt=tuple(self._chat_ids(fields, self._tokenizer.turn_ids if cartridge else self._tokenizer.chat_ids)),
            temperature=fields.number("temperature", 1.0, 0.0, 2.0),
            top_p=fields.number("top_p", 1.0, 0.0, 1.0),
            top_k=max(fields.integer("top_k", 0, -1, SEEDS - 1), 0),  # vLLM's clients write -1 for "all"
            seed=fields.integer("seed", self._rng.randrange(SEEDS), -(2**63), 2**63 - 1) % SEEDS,
            stop_ids=self._tokenizer.stop_ids,
            ignore_eos=fields.flag("ignore_eos"),
            top_logprobs=top_logprobs,
        )
        max_tokens = fields.integer("max_tokens", None, 1, SEEDS)
        options = Fields(fields.get("stream_options") or {})
        return Call(
            model=model,
            cartridge=cartridge,
            request=request,
            max_tokens=fields.integer("max_completion_tokens", max_tokens, 1, SEEDS),
            n=fields.integer("n", 1, 1, self._engine.num_slots + self._max_queue),
            stops=read_stops(fields.get("stop")),
            stream=fields.flag("stream"),
            include_usage=options.flag("include_usage"),
            logprobs=logprobs,
            return_token_ids=fields.flag("return_token_ids"),
            tokens_as_ids=fields.flag("return_tokens_as_token_ids"),
            prompt_logprobs=prompt_logprobs,
        )

    def _chat_ids(self, fields: Fields, encode: Callable[..., list[int]]) -> list[int]:
        messages = read_messages(fields.get("messages"))
        try:
            return encode(messages, add_generation_prompt=fields.flag("add_generation_prompt", True))
        except ValueError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error

    def _read_model(self, fields: Fields) -> tuple[str, str | None]:
        """The model's name and the cartridge, which the name or `cartridges` may choose."""
        name = self._model if fields.get("model") is None else fields.text("model")
        asked = read_cartridge(fields.get("cartridges"))
        if asked is not None:
            self._check_cartridge(asked, "cartridges", "cartridge_not_found")
        if name == self._model:
            return name, asked
        base, _, named = name.rpartition(":")
        if base != self._model:
            message = f"model {shorten(name)} does not exist: this server has {self._model!r}, see /v1/models"
            raise ApiError(404, message, "model", "model_not_found")
        self._check_cartridge(named, "model", "model_not_found")
        if asked not in (None, named):
            refuse("cartridges", asked, f"the cartridge that the model's name chooses, {named!r}, or none")
        return name, named

    def _check_cartridge(self, id: str, param: str, code: str) -> None:
        try:
            self._store.find(id)
        except ValueError as error:
            raise ApiError(400, str(error), param, "invalid_value") from error
        except UnknownCartridge as error:
            raise ApiError(404, str(error), param, code) from error

    def _decode_token(self, id: int) -> str:
        return self._tokenizer.decode([id], skip_special_tokens=False)


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return error.response()
    except web.HTTPRequestEntityTooLarge as error:
        return ApiError(413, error.text or error.reason, code="body_too_large").response()
    except web.HTTPException as error:
        return ApiError(error.status, f"{request.method} {shorten(request.path)}: {error.reason}").response()
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return ApiError(500, "the server failed at this request: its log says why").response()


async def read_body(request: web.Request) -> Fields:
    try:
        return Fields(json.loads(await request.read()))
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


async def _respond(answer: Answer) -> web.Response:
    deltas = [Delta() for _ in answer.choices]
    while not answer.finished:
        index, delta = await answer.next()
        deltas[index].add(delta)
    return web.json_response(answer.whole(deltas))


async def _stream(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
    await response.prepare(request)
    try:
        await _send(response, (answer.first_chunk(index) for index in range(answer.call.n)))
        while not answer.finished:
            index, delta = await answer.next()
            chunk = answer.chunk(index, delta)
            await _send(response, [chunk] if chunk else [])
        await _send(response, [answer.usage_chunk()] if answer.call.include_usage else [])
    except ApiError as error:  # the status is out already
        await _send(response, [error.body])
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _send(response: web.StreamResponse, chunks: Iterable[dict[str, Any]]) -> None:
    for chunk in chunks:
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
