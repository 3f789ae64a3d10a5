"""The one thread that owns the scheduler and the engine: the only one in a server that computes anything.

A `Job` comes in through a bounded queue, its events go back by `call_soon_threadsafe`; a job is cancelled by a mark on
it that the thread looks at between steps, so that cancelling never has to wait for a place in that queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import queue
import threading
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.calls import Call
from cartridges_jax.serving.protocol import SEEDS, ApiError
from cartridges_jax.serving.scheduler import (
    NOT_FINITE,
    Engine,
    Event,
    Finished,
    Prefix,
    QueueFull,
    Request,
    Scheduler,
    Scored,
)
from cartridges_jax.serving.warmup import Warmup

logger = logging.getLogger(__name__)

PROMPT = {"chat": "messages", "text": "prompt"}  # the field that is too long


@dataclass(frozen=True)
class Accepted:
    """All choices of a job are queued. `prompt` is the score of its only prompt, if asked for."""

    prompt: list[Scored] | None = None


class Job:
    """A call on its way through the engine thread; the numbers in `cancelled` are choices that nobody waits for."""

    def __init__(self, call: Call, prefix: Prefix | None, deadline: float):
        self.id = uuid.uuid4().hex
        self.call, self.prefix, self.deadline = call, prefix, deadline
        # No bound of its own: a choice has at most max_tokens + 2 events, and a slow reader must not stop the others.
        self.events: asyncio.Queue[tuple[int, Accepted | ApiError | Event]] = asyncio.Queue()
        self.cancelled: set[int] = set()

    def cancel(self) -> None:
        self.cancelled.update(range(self.call.num_choices))

    async def accepted(self) -> Accepted:
        """Its first event. Raises: ApiError, when it was refused."""
        _, first = await self.events.get()
        if isinstance(first, ApiError):
            raise first
        assert isinstance(first, Accepted)
        return first


class EngineThread:
    """Runs the scheduler; made and called in the event loop's thread, except for the methods that `_run` calls."""

    def __init__(self, engine: Engine, max_queue: int, max_seconds: float, warmup: Warmup):
        self._engine, self._max_queue, self._max_seconds, self._warmup = engine, max_queue, max_seconds, warmup
        self._inbox: queue.Queue[Job | None] = queue.Queue(engine.num_slots + max_queue)
        self._live: dict[str, tuple[Job, int]] = {}
        self._closed = threading.Lock()
        self._end: ApiError | None = None  # what new jobs are told once the thread takes no more
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.warm, self.failed = asyncio.Event(), asyncio.Event()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._end is None

    @property
    def num_live(self) -> int:
        """Choices that run or wait."""
        return len(self._live)

    def submit(self, call: Call, prefix: Prefix | None, start: float) -> Job:
        """Hands over a call that came at `start`; its first event is `Accepted` or an `ApiError`. Raises: ApiError."""
        job = Job(call, prefix, start + self._max_seconds)
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
            self._warmup.run(lambda: self._stopping)
            self._loop.call_soon_threadsafe(self.warm.set)
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
        for event in scheduler.step(time.monotonic()):
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
            requests = [self._complete(job, request) for request in job.call.requests]
            for index in range(job.call.num_choices):
                which, nth = divmod(index, job.call.n)
                request, id = requests[which], f"{job.id}-{index}"
                scheduler.submit(replace(request, id=id, seed=(request.seed + nth) % SEEDS))
                self._live[id] = job, index
            count, prompt = job.call.prompt_logprobs, None
            if count is not None:
                prompt = self._engine.score(requests[0].prompt, job.prefix, count)
                if not all(math.isfinite(scored.sampled.logprob) for scored in prompt):
                    self._reject(job, ApiError(422, NOT_FINITE, "cartridges", "not_finite"))
                    return
            self._post([(job, 0, Accepted(prompt))])
        except QueueFull as error:
            self._reject(job, _queue_full(str(error)))
        except UserError as error:
            self._reject(job, ApiError(400, str(error), PROMPT[job.call.kind], "context_length_exceeded"))

    def _complete(self, job: Job, request: Request) -> Request:
        room = self._engine.max_length - len(request.prompt) - (job.prefix.length if job.prefix else 0)
        max_tokens = job.call.max_tokens or max(room, 1)
        return replace(request, prefix=job.prefix, max_tokens=max_tokens, deadline=job.deadline)

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
