"""Makes many servers of one model look like a single one that does not fail.

Each call goes where there is room, and is tried again when it fails. A reply depends on the call alone, never on which
server or which attempt gave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Self, TypeVar

from cartridges_jax.command_line.addresses import without_credentials
from synth.clients.base import Busy, ChatMessages, Client, Completion, Rejected, Unavailable, Unsuited
from synth.clients.factory import connect
from synth.config import ClientConfig, SamplingConfig
from synth.endpoint import Endpoint, Permit

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
SECONDS_BETWEEN_LINES = 10.0  # of the log about one server and one kind of failure, of which there may be thousands

T = TypeVar("T")

log = logging.getLogger(__name__)


class Fleet:
    """An async context manager that holds a client for each server, and counts their tokens, and failures by kind."""

    def __init__(self, config: ClientConfig, seed: int = 0):
        self._config = config
        self._rng = random.Random(f"{seed}/fleet")  # for the length of waits: no result depends on it
        self._clients = {Endpoint(without_credentials(url), self._rng): connect(config, url) for url in config.urls}
        self._suited: dict[tuple[Endpoint, str], bool] = {}  # whether its last reply of a kind was whole
        self._quiet_until: dict[tuple[str, str], float] = {}
        self.prompt_tokens = self.completion_tokens = 0
        self.errors: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        async with contextlib.AsyncExitStack() as stack:
            for client in self._clients.values():
                await stack.enter_async_context(client)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def check(self) -> None:
        """Raises a sentence unless a server answers, and each that does serves the model."""
        results = await asyncio.gather(*(c.check() for c in self._clients.values()), return_exceptions=True)
        problems = [result for result in results if result is not None]
        absent = [problem for problem in problems if isinstance(problem, Unavailable)]
        for problem in problems:
            if problem not in absent or len(absent) == len(self._clients):
                raise problem
        for endpoint, result in zip(self._clients, results, strict=True):
            if result is not None:
                log.warning("%s", result)
                endpoint.open(_now())

    def route(self) -> Route:
        """One client for calls that begin alike: they go to the same server, for its prefix cache, while it lasts."""
        return Route(self)

    async def call(self, route: Route, what: str, ask: Callable[[Client], Awaitable[T]]) -> T:
        """What a server answers to `ask`; `what` names the kind of call.

        Raises: Refused, if a server cannot serve such calls; Unavailable, when retries or time are used up.
        """
        deadline: float | None = None
        for attempt in itertools.count(1):
            endpoint, permit, deadline = await self._acquire(route, deadline)
            try:
                reply = await self._attempt(endpoint, permit, deadline, what, ask)
            except Unavailable as error:
                wait = min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS)
                wait *= self._rng.uniform(0.5, 1.0)
                if attempt > self._config.max_retries or _now() + wait > deadline:
                    raise Unavailable(f"{error}; that was attempt {attempt}, the last", error.kind) from error
                self._log_retry(endpoint, error, attempt, wait)
            else:
                if isinstance(reply, Completion):
                    self.prompt_tokens += reply.prompt_tokens
                    self.completion_tokens += reply.completion_tokens
                return reply
            await asyncio.sleep(wait)
        raise AssertionError("unreachable")

    async def _attempt(
        self, endpoint: Endpoint, permit: Permit, deadline: float, what: str, ask: Callable[[Client], Awaitable[T]]
    ) -> T:
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    reply = await ask(self._clients[endpoint])
            except TimeoutError as error:
                text = f"{endpoint.name} gave no answer in {self._config.deadline_seconds:g} s, all attempts together"
                raise Unavailable(text, "timeout") from error
            except Rejected as error:
                raise self._classified(endpoint, what, error) from error
        except Unavailable as error:
            self.errors[error.kind] += 1
            if isinstance(error, Busy):
                endpoint.failed(permit, _now(), "busy", error.retry_after)
            else:
                endpoint.failed(permit, _now(), "silence" if error.kind == "timeout" else "fault")
            raise
        except BaseException:
            endpoint.release(permit)
            raise
        self._suited[endpoint, what] = True
        endpoint.succeeded(permit, _now(), reply.completion_tokens if isinstance(reply, Completion) else 0)
        return reply

    def _classified(self, endpoint: Endpoint, what: str, error: Rejected) -> Exception:
        """The error itself if it is about the server, so that no other attempt would end better; else `Unavailable`.

        A server that has answered such a call before rejects this one call. A reply that lacks something may be an
        accident, so it takes two of them.
        """
        key = endpoint, what
        is_odd = self._suited.get(key, False) or (isinstance(error, Unsuited) and key not in self._suited)
        self._suited.setdefault(key, False)
        return Unavailable(str(error), "odd reply" if isinstance(error, Unsuited) else "rejected") if is_odd else error

    async def _acquire(self, route: Route, deadline: float | None) -> tuple[Endpoint, Permit, float]:
        """Waits for a server with room, and returns it with the permit and the time by which the call has to end.

        A call's time runs from its first attempt, or from when no server is there to attempt it.
        """
        called = False
        while True:
            now = _now()
            endpoint = self._choose(route, now)
            if endpoint and endpoint.has_room(now, called):
                return endpoint, endpoint.acquire(now), deadline or now + self._config.deadline_seconds
            if not endpoint or endpoint.is_trying:
                deadline = deadline or now + self._config.deadline_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    if endpoint:
                        await endpoint.wait()
                    else:
                        await asyncio.sleep(min(e.half_open_at for e in self._clients) - now)
            except TimeoutError as error:
                seconds = f"{self._config.deadline_seconds:g} s"
                names = ", ".join(known.name for known in self._clients)
                raise Unavailable(f"no server of {names} was there for {seconds}") from error
            called = endpoint is not None

    def _choose(self, route: Route, now: float) -> Endpoint | None:
        """The server to call or to wait for, or None if the circuits of all are open."""
        for endpoint in self._clients:
            if endpoint.is_half_open(now):
                return endpoint
        if route.home is None or not route.home.is_ready(now):
            ready = [endpoint for endpoint in self._clients if endpoint.is_ready(now)]
            if not ready:
                return next((endpoint for endpoint in self._clients if endpoint.is_trying), None)
            route.home = min(ready, key=lambda endpoint: endpoint.load)
        return route.home

    def _log_retry(self, endpoint: Endpoint, error: Unavailable, attempt: int, wait: float) -> None:
        key, now = (endpoint.name, error.kind), _now()
        if now >= self._quiet_until.get(key, 0.0):
            self._quiet_until[key] = now + SECONDS_BETWEEN_LINES
            retry = f"retry {attempt} of {self._config.max_retries} in {wait:.1f} s"
            log.warning("%s; %s (%d of kind %r so far)", error, retry, self.errors[error.kind], error.kind)


class Route:
    """A `Client` that passes its calls to a fleet, to one server of it while that is there: see `Fleet.route`."""

    def __init__(self, fleet: Fleet):
        self._fleet = fleet
        self.home: Endpoint | None = None

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        what = "answers" if top_logprobs else "texts"
        return await self._fleet.call(
            self, what, lambda client: client.complete(messages, sampling, seed, top_logprobs)
        )

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        return await self._fleet.call(self, "scores", lambda client: client.score(messages, top_logprobs))

    async def tokenize(self, text: str) -> list[int]:
        return await self._fleet.call(self, "tokens", lambda client: client.tokenize(text))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._fleet.call(self, "texts of tokens", lambda client: client.detokenize(token_ids))


def _now() -> float:
    return asyncio.get_running_loop().time()
