"""An OpenAI-compatible server of one model and its cartridges.

Two worlds that share no state: asyncio speaks HTTP, one engine thread owns the scheduler, the engine and the loading of
cartridges, and is the only thread that calls JAX. A `Job` goes one way through a bounded queue, its events come back by
`call_soon_threadsafe`; a job is cancelled by a mark on it that the engine thread looks at between steps, so that
cancelling never has to wait for a place in that queue.
API shapes: OpenAI's chat completions, with vLLM's `return_token_ids` and `return_tokens_as_token_ids`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import queue
import random
import socket
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NoReturn

from aiohttp import web

from cartridges_jax.serving.scheduler import (
    Engine,
    Event,
    Finished,
    QueueFull,
    Request,
    Sampled,
    Scheduler,
    Started,
    Token,
)
from cartridges_jax.serving.store import CartridgeStore, UnknownCartridge
from cartridges_jax.tokenizer import StreamDecoder, Tokenizer

logger = logging.getLogger(__name__)

MAX_STOPS = 16
SEEDS = 2**31
RETRY_AFTER_SECONDS = 1
# Fields that would change the answer and that are not there yet: asking for them is refused, a neutral value is not.
UNSUPPORTED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "continue_final_message": False,
    "echo": False,
    "prompt_logprobs": 0,
}


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = (
            "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
            if self.status < 500
            else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        extra = {429: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        return web.json_response(self.body, status=self.status, headers=extra.get(self.status))


@dataclass(frozen=True)
class Call:
    """A chat completion that is asked for, checked; `request` lacks what only the engine thread knows or decides."""

    model: str
    cartridge: str | None
    request: Request
    max_tokens: int | None  # None: as many as fit
    n: int = 1
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False


class Fields:
    """A JSON object, read field by field; null is as good as absent, and every complaint names its field."""

    def __init__(self, values: object):
        if not isinstance(values, dict):
            raise ApiError(400, "the body is not a JSON object")
        self._values = values

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            refuse(name, value, "true or false")
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        value = default if self.get(name) is None else self.get(name)
        if value is not default and (type(value) is not int or not low <= value <= high):
            refuse(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = default if self.get(name) is None else self.get(name)
        if type(value) not in (int, float) or not low <= value <= high:
            refuse(name, value, f"a number from {low} to {high}")
        return float(value)

    def text(self, name: str) -> str:
        return text(name, self.get(name))


def refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ApiError(400, f"{name} is {shorten(value)}, expected {expected}", name, "invalid_value")


def shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(name, value, "a text without lone surrogates")
    return value


def read_messages(values: object) -> list[dict[str, str]]:
    if not isinstance(values, list) or not values:
        refuse("messages", values, "a list with at least one message")
    return [_read_message(f"messages[{i}]", value) for i, value in enumerate(values)]


def _read_message(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(where, value, "an object with role and content")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_read_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    return {"role": text(f"{where}.role", value.get("role")), "content": text(f"{where}.content", content)}


def _read_part(where: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        refuse(where, part, 'a part of type "text"')
    return text(f"{where}.text", part.get("text"))


def read_stops(value: object) -> tuple[str, ...]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse("stop", value, f"a text or a list of at most {MAX_STOPS}")
    stops = tuple(text("stop", stop) for stop in values)
    if "" in stops:
        refuse("stop", value, "texts that are not empty")
    return stops


def read_cartridge(value: object) -> str | None:
    """The id in `cartridges: [{"id", "source"}]`."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not isinstance(value[0], dict):
        refuse("cartridges", value, 'a list like [{"id": "manual", "source": "local"}]')
    if len(value) > 1:
        refuse("cartridges", value, "at most one cartridge: compose several into one file first")
    if value[0].get("source", "local") != "local":
        refuse("cartridges", value, 'the source "local": put the file into the folder of cartridges')
    return text("cartridges[0].id", value[0].get("id"))


@dataclass(frozen=True)
class Accepted:
    """All choices of a job are queued; they see a cartridge of so many slots."""

    cartridge_tokens: int


class Job:
    """A call on its way through the engine thread; the numbers in `cancelled` are choices that nobody waits for."""

    def __init__(self, call: Call):
        self.id = uuid.uuid4().hex
        self.call = call
        # No bound of its own: a choice has at most max_tokens + 2 events, and a slow reader must not stop the others.
        self.events: asyncio.Queue[tuple[int, Accepted | ApiError | Event]] = asyncio.Queue()
        self.cancelled: set[int] = set()

    def cancel(self) -> None:
        self.cancelled.update(range(self.call.n))


class EngineThread:
    """Runs the scheduler; made and called in the event loop's thread, except for the methods that `_run` calls."""

    def __init__(self, engine: Engine, store: CartridgeStore, max_queue: int):
        self._engine, self._store, self._max_queue = engine, store, max_queue
        self._inbox: queue.Queue[Job | None] = queue.Queue(engine.num_slots + max_queue)
        self._live: dict[str, tuple[Job, int]] = {}
        self._closed = threading.Lock()
        self._end: ApiError | None = None  # what new jobs are told once the thread takes no more
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.failed = asyncio.Event()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._end is None

    def submit(self, call: Call) -> Job:
        """Hands a call over; its first event is `Accepted` or an `ApiError`. Raises: ApiError."""
        job = Job(call)
        with self._closed:
            if self._end is not None:
                raise self._end
            try:
                self._inbox.put_nowait(job)
            except queue.Full:
                raise _queue_full("the server takes no more requests") from None
        return job

    async def stop(self) -> None:
        """Ends every job with an error and the thread after the step it is in."""
        self._stopping = True
        with contextlib.suppress(queue.Full):  # if it is full, the thread is not waiting for a job and sees the flag
            self._inbox.put_nowait(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        end = ApiError(503, "the server is stopping", code="stopping")
        try:
            scheduler = Scheduler(self._engine, self._max_queue)
            while not self._stopping:
                self._cycle(scheduler)
        except Exception:
            logger.exception("the engine failed: restart the server")
            end = ApiError(500, "the engine failed: the server's log says why", code="engine_failed")
            self._loop.call_soon_threadsafe(self.failed.set)
        self._close(end)

    def _cycle(self, scheduler: Scheduler) -> None:
        for job in self._arrivals(wait=not scheduler.has_work):
            self._admit(scheduler, job)
        for id, (job, index) in self._live.items():
            if index in job.cancelled:
                scheduler.cancel(id)
        updates = []
        for event in scheduler.step():
            job, index = self._live[event.id]
            updates.append((job, index, event))
            if isinstance(event, Finished):
                del self._live[event.id]
        self._post(updates)

    def _arrivals(self, wait: bool) -> list[Job]:
        jobs = [self._inbox.get()] if wait else []
        while not self._inbox.empty():  # this thread is the only one that takes
            jobs.append(self._inbox.get())
        return [job for job in jobs if job is not None]

    def _admit(self, scheduler: Scheduler, job: Job) -> None:
        """Submits the choices of a job: all of them or none."""
        try:
            request = self._complete(job)
            for index in range(job.call.n):
                id = f"{job.id}-{index}"
                scheduler.submit(replace(request, id=id, seed=(request.seed + index) % SEEDS))
                self._live[id] = job, index
            self._post([(job, 0, Accepted(request.prefix.length if request.prefix else 0))])
        except ApiError as error:
            self._reject(job, error)
        except QueueFull as error:
            self._reject(job, _queue_full(str(error)))
        except ValueError as error:
            self._reject(job, ApiError(400, str(error), "messages", "context_length_exceeded"))

    def _complete(self, job: Job) -> Request:
        call = job.call
        try:
            prefix = self._store.get(call.cartridge) if call.cartridge else None
        except UnknownCartridge as error:  # it was there when the call was checked
            raise ApiError(404, str(error), "cartridges", "cartridge_not_found") from error
        except ValueError as error:
            raise ApiError(400, f"cartridge {call.cartridge!r}: {error}", "cartridges", "cartridge_refused") from error
        except Exception as error:
            logger.exception("cartridge %r cannot be loaded", call.cartridge)
            message = f"cartridge {call.cartridge!r} cannot be loaded: the server's log says why"
            raise ApiError(500, message, "cartridges", "cartridge_broken") from error
        room = self._engine.max_length - len(call.request.prompt) - (prefix.length if prefix else 0)
        return replace(call.request, prefix=prefix, max_tokens=call.max_tokens or max(room, 1))

    def _reject(self, job: Job, error: ApiError) -> None:
        job.cancel()  # choices that were submitted before the one that failed
        self._post([(job, 0, error)])

    def _close(self, end: ApiError) -> None:
        with self._closed:
            self._end = end
        waiting = self._arrivals(wait=False)
        self._post([(job, 0, end) for job in [*waiting, *{job for job, _ in self._live.values()}]])

    def _post(self, updates: list[tuple[Job, int, Any]]) -> None:
        if updates:
            self._loop.call_soon_threadsafe(_deliver, updates)


def _deliver(updates: list[tuple[Job, int, Any]]) -> None:
    for job, index, event in updates:
        job.events.put_nowait((index, event))


def _queue_full(message: str) -> ApiError:
    return ApiError(429, message, code="queue_full")


class StopStrings:
    """Lets text through up to the first stop string; holds back an end that may still become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string follows it."""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        split = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[:split], self._held[split:]
        return certain, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(held: str, stop: str) -> int:
    """Length of the longest end of `held` that begins `stop`."""
    return next((n for n in range(min(len(held), len(stop) - 1), 0, -1) if held.endswith(stop[:n])), 0)


@dataclass
class Delta:
    """What one or more events add to a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Choice:
    """Turns the events of one choice into deltas."""

    def __init__(self, call: Call, tokenizer: Tokenizer, token_text: Callable[[int], str]):
        self._call, self._token_text = call, token_text
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(call.stops)
        self.num_tokens = self.cached_tokens = 0
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def take(self, event: Event) -> Delta:
        delta = Delta()
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, Token):
            self.num_tokens += 1
            delta = self._token(event.sampled)
        else:
            delta.text = self._certain(self._decoder.flush())
            if self.finish_reason is None:  # flushing may have completed a stop string
                delta.text += self._stops.flush()
                self.finish_reason = event.reason
        delta.finish_reason = self.finish_reason
        return delta

    def _token(self, sampled: Sampled) -> Delta:
        request = self._call.request
        hidden = sampled.token in request.stop_ids and not request.ignore_eos
        text = "" if hidden else self._certain(self._decoder.push(sampled.token))
        return Delta(text, [sampled.token], [self._entry(sampled)] if self._call.logprobs else [])

    def _certain(self, piece: str) -> str:
        certain, stopped = self._stops.push(piece)
        if stopped:
            self.finish_reason = "stop"
        return certain

    def _entry(self, sampled: Sampled) -> dict[str, Any]:
        alternatives = zip(sampled.top_ids, sampled.top_logprobs, strict=True)
        best = [self._logprob(token, logprob) for token, logprob in alternatives]
        return {**self._logprob(sampled.token, sampled.logprob), "top_logprobs": best}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        name = f"token_id:{token}" if self._call.tokens_as_ids else text
        return {"token": name, "token_id": token, "logprob": logprob, "bytes": list(text.encode())}


class Answer:
    """The choices of one job, and the JSON that they make."""

    def __init__(self, job: Job, cartridge_tokens: int, tokenizer: Tokenizer, token_text: Callable[[int], str]):
        self.call = job.call
        self.choices = [Choice(self.call, tokenizer, token_text) for _ in range(self.call.n)]
        self._job, self._cartridge_tokens = job, cartridge_tokens
        self._id, self._created = f"chatcmpl-{job.id}", int(time.time())

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    async def next(self) -> tuple[int, Delta]:
        """The next thing that happens to a choice. Raises: ApiError, when the engine ends first."""
        while True:
            index, event = await self._job.events.get()
            if isinstance(event, ApiError):
                raise event
            assert not isinstance(event, Accepted)
            choice = self.choices[index]
            if choice.finish_reason is None:  # else a stop string ended it, and these tokens were on their way
                delta = choice.take(event)
                if choice.finish_reason is not None:
                    self._job.cancelled.add(index)
                return index, delta

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": delta.text}, **self._details(delta)}
            for i, delta in enumerate(deltas)
        ]
        return self._envelope("chat.completion", choices) | self._prompt_ids() | {"usage": self._usage()}

    def first_chunk(self, index: int) -> dict[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, **self._details(Delta())}
        return self._envelope("chat.completion.chunk", [choice]) | self._prompt_ids()

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """None when there is nothing to tell yet."""
        details = self._details(delta)
        if not (delta.text or details["logprobs"] or details.get("token_ids") or delta.finish_reason):
            return None
        content = {"content": delta.text} if delta.text else {}
        return self._envelope("chat.completion.chunk", [{"index": index, "delta": content, **details}])

    def usage_chunk(self) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", []) | {"usage": self._usage()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.call.model,
            "choices": choices,
        }

    def _details(self, delta: Delta) -> dict[str, Any]:
        details: dict[str, Any] = {
            "logprobs": {"content": delta.logprobs} if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self.call.return_token_ids:
            details["token_ids"] = delta.token_ids
        return details

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.call.request.prompt)} if self.call.return_token_ids else {}

    def _usage(self) -> dict[str, Any]:
        prompt, answer = len(self.call.request.prompt), sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            # The choices share their prompt: what the first of them found is what earlier requests had left.
            "prompt_tokens_details": {"cached_tokens": self.choices[0].cached_tokens},
            "cartridge_tokens": self._cartridge_tokens,
        }


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
            answer = Answer(job, first.cartridge_tokens, self._tokenizer, self._token_text)
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
