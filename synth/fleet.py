"""Many servers of one model, seen as one that does not fail: each call goes where there is room, and is tried again.

What comes back depends on the call alone, never on the server or the attempt that answered it.
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
from synth.endpoint import Endpoint, Ticket

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
SECONDS_BETWEEN_LINES = 10.0  # of one server and one kind: a fleet in trouble fails thousands of times

T = TypeVar("T")

log = logging.getLogger(__name__)


class Fleet:
    """An async context manager. Counts the tokens that pass, and the failures by their kind."""

    def __init__(self, config: ClientConfig, seed: int = 0):
        self._config = config
        self._rng = random.Random(f"{seed}/fleet")  # of waits, not of results
        self._clients = {Endpoint(without_credentials(url), self._rng): connect(config, url) for url in config.urls}
        self._suited: dict[tuple[Endpoint, str], bool] = {}  # by kind of call: whether its last reply was whole
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
                endpoint.shut(_now())

    def route(self) -> Route:
        """One client for calls that begin alike: they go to the same server, for its prefix cache, while it lasts."""
        return Route(self)

    async def call(self, route: Route, what: str, ask: Callable[[Client], Awaitable[T]]) -> T:
        """Raises: Refused, if a server is not what `what` needs; Unavailable, when retries or time are used up."""
        deadline: float | None = None
        for attempt in itertools.count(1):
            endpoint, ticket, deadline = await self._turn(route, deadline)
            try:
                reply = await self._attempt(endpoint, ticket, deadline, what, ask)
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
        self, endpoint: Endpoint, ticket: Ticket, deadline: float, what: str, ask: Callable[[Client], Awaitable[T]]
    ) -> T:
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    reply = await ask(self._clients[endpoint])
            except TimeoutError as error:
                text = f"{endpoint.name} gave no answer in {self._config.deadline_seconds:g} s, all attempts together"
                raise Unavailable(text, "timeout") from error
            except Rejected as error:
                raise self._judged(endpoint, what, error) from error
        except Unavailable as error:
            self.errors[error.kind] += 1
            if isinstance(error, Busy):
                endpoint.failed(ticket, _now(), "busy", error.retry_after)
            else:
                endpoint.failed(ticket, _now(), "silence" if error.kind == "timeout" else "fault")
            raise
        except BaseException:
            endpoint.left(ticket)
            raise
        self._suited[endpoint, what] = True
        endpoint.succeeded(ticket, _now(), reply.completion_tokens if isinstance(reply, Completion) else 0)
        return reply

    def _judged(self, endpoint: Endpoint, what: str, error: Rejected) -> Exception:
        """The error itself where it tells how the server is, which another call would not change.

        From a server that has answered before it is about one call; and of a reply that lacks something, it takes two.
        """
        key = endpoint, what
        is_odd = self._suited.get(key, False) or (isinstance(error, Unsuited) and key not in self._suited)
        self._suited.setdefault(key, False)
        return Unavailable(str(error), "odd reply" if isinstance(error, Unsuited) else "rejected") if is_odd else error

    async def _turn(self, route: Route, deadline: float | None) -> tuple[Endpoint, Ticket, float]:
        """Where and when to call. The time of a call runs from its first attempt, or while no server is there."""
        called = False
        while True:
            now = _now()
            endpoint = self._choose(route, now)
            if endpoint and endpoint.has_room(now, called):
                return endpoint, endpoint.begin(now), deadline or now + self._config.deadline_seconds
            if not endpoint or endpoint.is_probed:
                deadline = deadline or now + self._config.deadline_seconds
            try:
                async with asyncio.timeout_at(deadline):
                    if endpoint:
                        await endpoint.wait()
                    else:
                        await asyncio.sleep(min(e.opens_at for e in self._clients) - now)
            except TimeoutError as error:
                seconds = f"{self._config.deadline_seconds:g} s"
                names = ", ".join(known.name for known in self._clients)
                raise Unavailable(f"no server of {names} was there for {seconds}") from error
            called = endpoint is not None

    def _choose(self, route: Route, now: float) -> Endpoint | None:
        """The server to call or to wait for; none if all are shut."""
        for endpoint in self._clients:
            if endpoint.is_due(now):
                return endpoint
        if route.home is None or not route.home.is_ready(now):
            ready = [endpoint for endpoint in self._clients if endpoint.is_ready(now)]
            if not ready:
                return next((endpoint for endpoint in self._clients if endpoint.is_probed), None)
            route.home = min(ready, key=lambda endpoint: endpoint.load)
        return route.home

    def _log_retry(self, endpoint: Endpoint, error: Unavailable, attempt: int, wait: float) -> None:
        key, now = (endpoint.name, error.kind), _now()
        if now >= self._quiet_until.get(key, 0.0):
            self._quiet_until[key] = now + SECONDS_BETWEEN_LINES
            retry = f"retry {attempt} of {self._config.max_retries} in {wait:.1f} s"
            log.warning("%s; %s (%d of kind %r so far)", error, retry, self.errors[error.kind], error.kind)


class Route:
    """A `Client` over a fleet; see `Fleet.route`."""

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
