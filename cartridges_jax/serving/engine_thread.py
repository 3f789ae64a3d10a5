"""The one thread that owns the scheduler and the engine: the only one in a server that computes anything.

A `PendingRequest` comes in through a bounded queue, and its events go back by `call_soon_threadsafe`. It is cancelled
by a mark on it that the thread looks at between steps, so that cancelling never has to wait for room in that queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import uuid
from dataclasses import replace
from typing import Any

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.metrics import TokenTimer
from cartridges_jax.serving.protocol import SEEDS, ApiError
from cartridges_jax.serving.requests import GenerationRequest
from cartridges_jax.serving.scheduler import (
    Engine,
    Event,
    Finished,
    QueueFull,
    Request,
    Scheduler,
    Token,
    most_tokens,
)
from cartridges_jax.serving.warmup import Warmup

logger = logging.getLogger(__name__)

QUIET_SECONDS = 30.0  # without a request, after which a program is compiled that would hold up the next one
PROMPT = {"chat": "messages", "text": "prompt"}  # the field that is too long


class Accepted:
    """All choices of a request are queued."""


class PendingRequest:
    """A request on its way through the engine thread; `cancelled` has the numbers of choices that nobody waits for."""

    def __init__(self, generation: GenerationRequest, prefix: Prefix | None, deadline: float, timer: TokenTimer):
        self.id = uuid.uuid4().hex
        self.generation, self.prefix, self.deadline, self.timer = generation, prefix, deadline, timer
        # No bound of its own: a choice has at most max_tokens + 2 events, and a slow reader must not stop the others.
        self.events: asyncio.Queue[tuple[int, Accepted | ApiError | Event]] = asyncio.Queue()
        self.cancelled: set[int] = set()

    def cancel(self) -> None:
        self.cancelled.update(range(self.generation.num_choices))

    async def accepted(self) -> None:
        """Waits for its first event. Raises: ApiError, when it was refused."""
        _, first = await self.events.get()
        if isinstance(first, ApiError):
            raise first
        assert isinstance(first, Accepted)


class EngineThread:
    """Runs the scheduler; made and called in the event loop's thread, except for the methods that `_run` calls."""

    def __init__(self, engine: Engine, max_queue: int, max_seconds: float, warmup: Warmup):
        self._engine, self._max_seconds, self._warmup = engine, max_seconds, warmup
        self._inbox: queue.Queue[PendingRequest | None] = queue.Queue(engine.max_num_seqs + max_queue)
        self._live: dict[str, tuple[PendingRequest, int]] = {}
        self._scheduler = Scheduler(engine, max_queue)
        self._closed = threading.Lock()
        self._end: ApiError | None = None  # the error that new requests get once the thread takes no more
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.warm, self.failed = asyncio.Event(), asyncio.Event()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._end is None

    @property
    def num_running(self) -> int:
        """Choices that are being written."""
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Choices that wait for their turn, or for programs to be compiled."""
        with self._inbox.mutex:
            arriving = [pending for pending in self._inbox.queue if pending is not None]
        return self._scheduler.num_waiting + sum(pending.generation.num_choices for pending in arriving)

    @property
    def kv_usage(self) -> float:
        """The part of the pages that running requests hold, from 0 to 1."""
        return self._scheduler.kv_usage

    def submit(self, generation: GenerationRequest, prefix: Prefix | None, timer: TokenTimer) -> PendingRequest:
        """Hands over a request. Its first event is `Accepted` or an `ApiError`. Raises: ApiError."""
        pending = PendingRequest(generation, prefix, timer.start + self._max_seconds, timer)
        with self._closed:
            if self._end is not None:
                raise self._end
            try:
                self._inbox.put_nowait(pending)
            except queue.Full:
                raise ApiError(429, "the server takes no more requests", code="queue_full") from None
        return pending

    async def stop(self) -> None:
        """Ends every request with an error, and the thread after the step it is in."""
        self._stopping = True
        with contextlib.suppress(queue.Full):  # then the thread is not waiting for a request, and sees the flag
            self._inbox.put_nowait(None)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        end = ApiError(503, "the server is stopping", code="stopping")
        try:
            self._warmup.run(lambda: self._stopping)
            self._loop.call_soon_threadsafe(self.warm.set)
            while not self._stopping:
                self._cycle(self._scheduler)
        except Exception:
            logger.exception("the engine failed: restart the server")
            end = ApiError(500, "the engine failed: the server's log says why", code="engine_failed")
            self._loop.call_soon_threadsafe(self.failed.set)
        self._close(end)

    def _cycle(self, scheduler: Scheduler) -> None:
        for pending in self._arrivals(wait=not scheduler.has_work):
            self._admit(scheduler, pending)
        for id, (pending, index) in self._live.items():
            if index in pending.cancelled:
                scheduler.cancel(id)
        updates = []
        for event in scheduler.step(time.monotonic()):
            pending, index = self._live[event.id]
            updates.append((pending, index, event))
            if isinstance(event, Finished):
                del self._live[event.id]
        self._post(updates)

    def _arrivals(self, wait: bool) -> list[PendingRequest]:
        arrivals = [self._next()] if wait else []
        while not self._inbox.empty():  # this thread is the only one that takes
            arrivals.append(self._inbox.get())
        return [pending for pending in arrivals if pending is not None]

    def _next(self) -> PendingRequest | None:
        """Waits for a request. Each time that none has come for a while, one of the rare programs is compiled."""
        quiet: float | None = QUIET_SECONDS
        while True:
            try:
                return self._inbox.get(timeout=quiet)
            except queue.Empty:
                quiet = QUIET_SECONDS if self._warmup.run_rare() else None

    def _admit(self, scheduler: Scheduler, pending: PendingRequest) -> None:
        """Submits the choices of a request: all of them or none."""
        try:
            requests = [self._complete(pending, request) for request in pending.generation.requests]
            for index in range(pending.generation.num_choices):
                which, nth = divmod(index, pending.generation.n)
                request, id = requests[which], f"{pending.id}-{index}"
                scored = pending.generation.prompt_alternatives(nth)
                seed = (request.seed + nth) % SEEDS
                scheduler.submit(replace(request, id=id, seed=seed, prompt_logprobs=scored))
                self._live[id] = pending, index
            self._post([(pending, 0, Accepted())])
        except QueueFull as error:
            self._reject(pending, ApiError(429, str(error), code="queue_full"))
        except ApiError as error:
            self._reject(pending, error)
        except UserError as error:
            self._reject(pending, ApiError(400, str(error), PROMPT[pending.generation.kind], "context_length_exceeded"))

    def _complete(self, pending: PendingRequest, request: Request) -> Request:
        """The request with what only this thread knows. Raises: ApiError, if it does not fit."""
        if not request.prompt:
            raise ApiError(
                400, "the prompt is empty: give at least one token", PROMPT[pending.generation.kind], "invalid_value"
            )
        most, max_tokens = most_tokens(self._engine, pending.prefix), pending.generation.max_tokens
        if max_tokens is None:
            max_tokens = max(most - len(request.prompt), 1)
        if len(request.prompt) + max_tokens > most:
            raise _overflow(pending, most, len(request.prompt), max_tokens)
        if request.logits is not None and request.logits.min_tokens > max_tokens:
            message = f"min_tokens is {request.logits.min_tokens}, expected at most {max_tokens}: so many tokens fit"
            raise ApiError(400, message, "min_tokens", "invalid_value")
        return replace(request, prefix=pending.prefix, max_tokens=max_tokens, deadline=pending.deadline)

    def _reject(self, pending: PendingRequest, error: ApiError) -> None:
        pending.cancel()  # choices that were submitted before the one that failed
        self._post([(pending, 0, error)])

    def _close(self, end: ApiError) -> None:
        with self._closed:
            self._end = end
        waiting = self._arrivals(wait=False)
        self._post([(pending, 0, end) for pending in [*waiting, *{pending for pending, _ in self._live.values()}]])

    def _post(self, updates: list[tuple[PendingRequest, int, Any]]) -> None:
        if updates:
            self._loop.call_soon_threadsafe(_deliver, updates)


def _overflow(pending: PendingRequest, most: int, prompt: int, answer: int) -> ApiError:
    """Says that a request is too long in OpenAI's words, in which clients look for the numbers."""
    param, slots = PROMPT[pending.generation.kind], pending.prefix.length if pending.prefix else 0
    message = (
        f"This model's maximum context length is {most} tokens{f' behind {slots} slots of a cartridge' * (slots > 0)}. "
        f"However, you requested {prompt + answer} tokens ({prompt} in the {param}, {answer} in the completion). "
        f"Please reduce the length of the {param} or completion."
    )
    return ApiError(400, message, param, "context_length_exceeded")


def _deliver(updates: list[tuple[PendingRequest, int, Any]]) -> None:
    for pending, index, event in updates:
        if isinstance(event, Token):
            pending.timer.token(index)
        pending.events.put_nowait((index, event))
