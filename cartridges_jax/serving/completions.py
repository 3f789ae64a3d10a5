"""The routes that answer: chat completions and completions, whole or streamed, and Tokasaurus' batches of them."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from aiohttp import web

from cartridges_jax.serving import npz
from cartridges_jax.serving.access import Handler
from cartridges_jax.serving.answers import Answer
from cartridges_jax.serving.catalog import Catalog
from cartridges_jax.serving.choices import Delta, Tokens
from cartridges_jax.serving.dialects import ChunkWriter, Dialect, EventWriter
from cartridges_jax.serving.engine_thread import EngineThread
from cartridges_jax.serving.metrics import Metrics, TokenTimer
from cartridges_jax.serving.protocol import ApiError, Fields, read_body, refuse, to_json, to_json_in_pieces
from cartridges_jax.serving.requests import GenerationRequest, Reader, check_logprobs
from cartridges_jax.serving.scheduler import Prefix

logger = logging.getLogger(__name__)

WRITE_SECONDS = 60.0  # for a reader that has stopped reading
LONG_BODY = 1 << 13  # bytes; tokenizing more than this would hold up the event loop
# So would compiling a grammar, which these ask for.
GRAMMARS = frozenset(("response_format", "structured_outputs", "tools", "bad_words"))
GRAMMARS |= {f"guided_{form}" for form in ("json", "regex", "choice", "grammar")}
MAX_BATCH = 4096
NPZ = "application/x-npz"

T = TypeVar("T")


class Completions:
    """Answers the requests for generation on one engine thread."""

    def __init__(
        self,
        reader: Reader,
        catalog: Catalog,
        tokens: Tokens,
        metrics: Metrics,
        batch_width: int,
        max_seconds: float,
    ):
        self._reader, self._catalog, self._metrics = reader, catalog, metrics
        self._tokens = tokens
        self._batch_width, self._max_seconds = batch_width, max_seconds
        self._tokasaurus_chat = functools.partial(reader.chat, fingerprint=True)
        self.thread: EngineThread | None = None

    def single(self, read: Callable[[Fields], GenerationRequest]) -> Handler:
        """The handler of a POST whose body asks for one generation."""

        async def handler(request: web.Request) -> web.StreamResponse:
            return await self._one(request, await self._read(read, await read_body(request)))

        return handler

    def speaking(self, dialect: type[Dialect]) -> Handler:
        """The handler of a POST in an API of other words, which asks for one answer."""

        async def handler(request: web.Request) -> web.StreamResponse:
            try:
                spoken = dialect(self._reader, await read_body(request))
                generation = await asyncio.to_thread(spoken.read)
                async with self._answering(generation) as answer:
                    if generation.stream:
                        return await _stream(request, answer, spoken.writer(answer))
                    deltas = await answer.all()
                    return web.json_response(spoken.whole(answer, deltas), dumps=to_json)
            except ApiError as error:
                return dialect.refusal(error)

        return handler

    async def prepare(self, generation: GenerationRequest) -> tuple[GenerationRequest, Prefix | None]:
        """The request as it will be answered, and its cartridges, loaded. Raises: ApiError."""
        prefix = await self._catalog.prefix(generation.cartridges)
        return self._reader.fitted(await _in_mode_of(prefix, generation), prefix), prefix

    async def batch(self, request: web.Request) -> web.StreamResponse:
        """`{"requests": […]}`: the chat completions of all, in their order, as JSON or npz; or one of them, unwrapped.

        None is begun unless all are well-formed. Each waits for its turn, so that a batch may be larger than the queue.
        """
        fields = await read_body(request)
        if fields.get("requests") is None:
            return await self._one(request, await self._read(self._tokasaurus_chat, fields))
        generations = await self._read(self._read_batch, fields)
        turns = asyncio.Semaphore(self._batch_width)
        tasks = [asyncio.create_task(self._in_turn(generation, turns)) for generation in generations]
        try:
            replies = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        text = await asyncio.to_thread(encoded, [reply for reply, _ in replies])
        if NPZ in request.headers.get("Accept", ""):
            body = await asyncio.to_thread(npz.of_batch, text, [deltas for _, deltas in replies])
            return web.Response(body=body, content_type=NPZ)
        return _response(text)

    async def _one(self, request: web.Request, generation: GenerationRequest) -> web.StreamResponse:
        async with self._answering(generation) as answer:
            if generation.stream:
                return await _stream(request, answer, ChunkWriter(answer))
            deltas = await answer.all()
            return _response(await asyncio.to_thread(lambda: encoded(answer.whole(deltas))))

    @asynccontextmanager
    async def _answering(self, generation: GenerationRequest) -> AsyncIterator[Answer]:
        """An answer under way, which ends when nobody waits for it any more."""
        assert self.thread is not None, "the server has not been started"
        timer = TokenTimer(self._metrics, time.monotonic())
        with self._catalog.using(generation.cartridges):
            pending = self.thread.submit(*await self.prepare(generation), timer)
            answer = None
            try:
                await pending.accepted()
                answer = Answer(pending, self._tokens)
                yield answer
            except asyncio.CancelledError:
                if answer is None:
                    self._metrics.aborted(generation.num_choices)
                raise
            finally:
                pending.cancel()
                if answer is not None:
                    self._metrics.answer(answer, timer.start)

    async def _in_turn(
        self, generation: GenerationRequest, turns: asyncio.Semaphore
    ) -> tuple[dict[str, Any], list[Delta]]:
        """Tries again while others fill the queue, for as long as a request may take."""
        async with turns:
            end = time.monotonic() + self._max_seconds
            while True:
                try:
                    async with self._answering(generation) as answer:
                        deltas = await answer.all()
                        return await asyncio.to_thread(answer.whole, deltas), deltas
                except ApiError as error:
                    if error.code != "queue_full" or time.monotonic() > end:
                        raise
                await asyncio.sleep(0.05)

    async def _read(self, read: Callable[[Fields], T], fields: Fields) -> T:
        is_long = fields.size > LONG_BODY or not GRAMMARS.isdisjoint(fields.values)
        return await asyncio.to_thread(read, fields) if is_long else read(fields)

    def _read_batch(self, fields: Fields) -> list[GenerationRequest]:
        fields.has_only("requests", "model")
        bodies = fields.get("requests")
        if not isinstance(bodies, list) or not 0 < len(bodies) <= MAX_BATCH:
            refuse("requests", bodies, f"a list of 1 to {MAX_BATCH} chat completions")
        generations, count = [], 0
        for i, body in enumerate(bodies):
            generations.append(self._read_one_of_many(f"requests[{i}]", body))
            count += self._reader.num_logprobs(generations[-1])
            check_logprobs(count, f"requests[{i}]")
        return generations

    def _read_one_of_many(self, where: str, body: object) -> GenerationRequest:
        try:
            generation = self._tokasaurus_chat(Fields(body, where))
        except ApiError as error:
            param = where + (f".{error.param}" if error.param else "")
            raise ApiError(error.status, f"{where}: {error.message}", param, error.code) from error
        if generation.stream:
            refuse(f"{where}.stream", True, "false: a batch is answered as a whole")
        return generation


def encoded(reply: Any) -> bytes:
    """A reply, or several, as JSON."""
    if isinstance(reply, list):
        return b"[%b]" % b", ".join(map(encoded, reply))
    parts = {name: to_json_in_pieces(value) for name, value in reply.items() if name != "choices"}
    parts["choices"] = f"[{', '.join(map(to_json_in_pieces, reply['choices']))}]"
    return f"{{{', '.join(f'{to_json(name)}: {parts[name]}' for name in reply)}}}".encode()


def _response(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", charset="utf-8")


async def _in_mode_of(prefix: Prefix | None, generation: GenerationRequest) -> GenerationRequest:
    """The request with its prompt in the mode of thinking in which the cartridge was trained, if it was in one."""
    if prefix is None or prefix.thinking is None or generation.in_mode is None:
        return generation
    prompt = await asyncio.to_thread(generation.in_mode, prefix.thinking)
    return replace(generation, requests=tuple(replace(request, prompt=prompt) for request in generation.requests))


async def _stream(request: web.Request, answer: Answer, writer: EventWriter) -> web.StreamResponse:
    # X-Accel-Buffering: nginx would keep the chunks until they fill a buffer
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    response = web.StreamResponse(headers=headers)
    try:
        await response.prepare(request)
        await _send(response, writer.begin())
        try:
            while not answer.finished:
                await _send(response, writer.push(*await answer.next()))
            await _send(response, writer.end())
        except ApiError as error:  # the status is out already
            await _send(response, writer.fail(error))
        except ConnectionResetError:
            raise
        except Exception:
            logger.exception("a streamed answer failed")
            await _send(response, writer.fail(ApiError(500, "the server failed: its log says why", code="failed")))
        await response.write_eof()
    except ConnectionResetError:
        if request.transport is not None:
            request.transport.abort()
    return response


async def _send(response: web.StreamResponse, events: Iterable[bytes]) -> None:
    for written in events:
        await _write(response, written)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    try:
        async with asyncio.timeout(WRITE_SECONDS):
            await response.write(data)
    except TimeoutError:
        raise ConnectionResetError(f"the client has read nothing for {WRITE_SECONDS:.0f} s") from None
