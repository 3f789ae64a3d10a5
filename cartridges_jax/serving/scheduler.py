"""Which requests the engine works on, and when: continuous batching with automatic prefix reuse.

There is no JAX, no asyncio, no clock and no randomness here: the same calls give the same events. Tokens are harvested
a step late: when the host looks at what a step gave, the next one is under way, with tokens that only the device knows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.cache import Allocation, PageCache, Prefix

Reason = Literal["stop", "length", "cancelled", "deadline", "not_finite"]


@dataclass(frozen=True)
class BlockTable:
    """Where a sequence lies: the pages of its tokens, and where its cartridge's head pages begin, page by page.

    Head pages are counted over all pages, of each as many as the engine's `heads_per_page`. The last of a cartridge's
    pages may be shared with other cartridges.
    """

    pages: Sequence[int]
    slots: Sequence[int] = ()


@dataclass(frozen=True)
class LogitsRules:
    """What a request asks to be done to its logits before its tokens are drawn, and what that depends on.

    Attributes:
      frequency_penalty: what a token loses for every time that it is in the answer; presence_penalty: for being there.
      repetition_penalty: what divides the logits, or multiplies negative ones, of tokens of prompt and answer.
      min_p: the least probability that a token may have, as a part of the best one's.
      min_tokens: how many tokens come before any of `stop_ids`.
      bias: what is added to the logits of tokens, by their ids.
      allowed: the only tokens that may be drawn; None: all.
    """

    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0
    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    stop_ids: frozenset[int] = frozenset()
    prompt: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()  # what was drawn already


@dataclass(frozen=True)
class SequenceInput:
    """One request's part of a decoding step."""

    index: int  # which of the sequences that run together, below `max_num_seqs`
    token: int | None  # None: the one that the last step sampled for this sequence
    position: int  # of the token in its sequence, which begins behind the cartridge
    block_table: BlockTable
    temperature: float
    top_p: float
    top_k: int
    seed: int
    step: int
    top_logprobs: int = 0


@dataclass(frozen=True)
class Sampled:
    """A sampled token with the best alternatives; log-probabilities are the model's, before temperature.

    A log-probability of NaN says that the model's logits were not finite: the token means nothing then.
    """

    token: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """A token that was given, not sampled; a `rank` of 1 says that the model found no token more likely."""

    sampled: Sampled
    rank: int


class Engine(Protocol):
    """What the scheduler needs of a device: calls that are done in their order, also if one returns before it is done.

    At most `max_num_seqs` requests run together; a request's cartridge slots, prompt and answer are at most
    `max_length` positions in memory, and its prompt and answer at most the model's `max_position_embeddings`.

    A page has a head page for each of its `heads_per_page`, which are all kv heads of all layers.
    """

    max_num_seqs: int
    max_length: int
    max_position_embeddings: int
    max_top_logprobs: int
    num_pages: int
    page_size: int
    heads_per_page: int

    def head_pages(self, prefix: Prefix) -> int:
        """How many head pages a cartridge takes. Raises: UserError, if it does not fit the model."""

    def load(self, prefix: Prefix, slots: Sequence[int]) -> None:
        """Writes a cartridge to the head pages that begin here, as in a `BlockTable`."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Makes the target page a copy of the source's first `count` positions."""

    def prefill(self, tokens: Sequence[int], position: int, block_table: BlockTable) -> None:
        """Writes the tokens' keys and values at `position`, `position` + 1, … behind the cartridge."""

    def decode(self, inputs: Sequence[SequenceInput]) -> Any:
        """Writes each input's token at its position and samples the one that follows; need not wait for the result."""

    def harvest(self, decoded: Any) -> list[Sampled]:
        """What a `decode` sampled, in the order of its inputs, with at least the alternatives that each asked for."""

    def score(self, tokens: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
        """Every token but the first, as the model would have sampled it; no request is touched."""


class Constraint(Protocol):
    """What restricts a request's next token by those before it, as a grammar does."""

    def mask(self) -> Any:
        """The tokens that may come next, as `Engine.sample` takes them."""

    def take(self, token: int) -> None:
        """The next token is this one."""


@dataclass(frozen=True)
class Request:
    """One answer to write; `top_k` 0 and `top_p` 1 sample from every token, `temperature` 0 takes the best one."""

    id: str
    prompt: tuple[int, ...]
    prefix: Prefix | None = None
    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    logits: LogitsRules | None = None  # its prompt and answer are filled in; None: nothing is done to the logits
    constraint: Callable[[], Constraint] | None = None  # called once, when the request is submitted
    deadline: float = math.inf  # on the clock that `Scheduler.step` is told


@dataclass(frozen=True)
class Started:
    """The request runs and has its memory; `cached_tokens` of its prompt were there already."""

    id: str
    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """The next token of a request, a stop token included; it carries the `top_logprobs` alternatives asked for."""

    id: str
    sampled: Sampled


@dataclass(frozen=True)
class Finished:
    """The request has ended; "not_finite": what the model makes of its cartridge and prompt are no numbers."""

    id: str
    reason: Reason


Event = Started | Token | Finished
NOT_FINITE = (
    "the model's numbers are not finite here: the cartridge holds values that are too large for this model, or the "
    "model's dtype is too small; use another cartridge, or train this one again"
)


class QueueFull(Exception):
    """The queue is full: no other request may wait."""


@dataclass
class _Sequence:
    """One of the sequences that run together; it is free while it has no request."""

    index: int
    request: Request | None = None
    allocation: Allocation | None = None
    prefilled: int = 0  # tokens of the prompt that are written
    dispatched: int = 0  # answer tokens that were sampled or are being sampled
    answer: list[int] = field(default_factory=list)  # those that were harvested


class Scheduler:
    """Admits requests first come, first served; `step` prefills a little, then decodes one token for everyone.

    A request is admitted when a sequence is free, and all the memory that it may come to need; it never waits again.
    A step makes at most `prefills_per_step` engine prefills of at most `prefill_chunk` tokens, so that arrivals and
    long prompts never starve those who decode.
    """

    def __init__(self, engine: Engine, max_queue: int, prefills_per_step: int = 4, prefill_chunk: int = 256):
        self._engine = engine
        self._max_queue = max_queue
        self._prefills_per_step = prefills_per_step
        self._prefill_chunk = prefill_chunk
        self._cache = PageCache(engine.num_pages, engine.page_size, engine.heads_per_page, engine.head_pages)
        self._queue: deque[Request] = deque()
        self._sequences = [_Sequence(i) for i in range(engine.max_num_seqs)]
        self._filling: _Sequence | None = None  # the one sequence whose prompt is not written yet
        self._decoding: tuple[list[tuple[_Sequence, Request]], Any] = ([], None)  # the step that is under way
        self._events: list[Event] = []

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._events or any(s.request for s in self._sequences))

    @property
    def num_running(self) -> int:
        return sum(seq.request is not None for seq in self._sequences)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def kv_usage(self) -> float:
        """The part of the pages that running requests hold, from 0 to 1; any thread may ask."""
        return self._cache.num_used / self._cache.num_pages

    def submit(self, request: Request) -> None:
        """Queues a request. Raises: UserError, if it can never run; QueueFull.

        Besides those that will run at once, `max_queue` requests may wait.
        """
        _check(request, self._engine)
        needed = self._cache.pages_needed(request.prefix, len(request.prompt) + request.max_tokens)
        if needed > self._cache.num_pages:
            raise UserError(
                f"the request needs {needed} pages of {self._cache.page_size} positions and the engine has "
                f"{self._cache.num_pages}: shorten the prompt or lower max_tokens"
            )
        if any(request.id == r.id for r in self._live()):
            raise UserError(f"request id {request.id!r} is in use: give every request its own id")
        free = sum(seq.request is None for seq in self._sequences)
        if len(self._queue) >= self._max_queue + free:
            raise QueueFull(f"{self._max_queue} requests are waiting already: try again later")
        self._queue.append(request)

    def cancel(self, id: str) -> None:
        """Ends a request where it stands; the next step reports it. One that has ended already is left alone."""
        for request in self._live():
            if request.id == id:
                self._end(request, "cancelled")

    def step(self, now: float = -math.inf) -> list[Event]:
        """Prefills a little, starts a step for every request whose prompt is written, and reports the step before.

        Requests whose deadline has come by `now` end first.
        """
        for request in self._live():
            if request.deadline <= now:
                self._end(request, "deadline")
        self._prefill()
        before, self._decoding = self._decoding, self._dispatch()
        self._harvest(*before)
        events, self._events = self._events, []
        return events

    def _live(self) -> list[Request]:
        return [s.request for s in self._sequences if s.request] + list(self._queue)

    def _end(self, request: Request, reason: Reason) -> None:
        seq = next((seq for seq in self._sequences if seq.request is request), None)
        if seq is None:
            self._queue.remove(request)
        else:
            self._release(seq)
        self._events.append(Finished(request.id, reason))

    def _release(self, seq: _Sequence) -> None:
        assert seq.request is not None and seq.allocation is not None
        written = seq.request.prompt[: seq.prefilled]
        if seq.answer:  # what was sampled last has not been written, as far as the host knows
            written = (*seq.request.prompt, *seq.answer[:-1])
        self._cache.free(seq.allocation, written)
        seq.request = seq.allocation = None
        if self._filling is seq:
            self._filling = None

    def _prefill(self) -> None:
        for _ in range(self._prefills_per_step):
            if self._filling is None and not self._admit():
                return
            self._fill_chunk()

    def _admit(self) -> bool:
        seq = next((seq for seq in self._sequences if seq.request is None), None)
        if not self._queue or seq is None:
            return False
        request = self._queue[0]
        allocation = self._cache.allocate(request.prefix, request.prompt, len(request.prompt) + request.max_tokens)
        if allocation is None:
            return False
        self._queue.popleft()
        if allocation.load:
            assert request.prefix is not None
            self._engine.load(request.prefix, allocation.slots)
        if allocation.copy is not None:
            self._engine.copy(*allocation.copy, allocation.cached % self._engine.page_size)
        seq.request, seq.allocation = request, allocation
        seq.prefilled, seq.dispatched, seq.answer = allocation.cached, 0, []
        self._filling = seq
        self._events.append(Started(request.id, allocation.cached))
        return True

    def _fill_chunk(self) -> None:
        """Writes the next part of the prompt that is being written."""
        seq = self._filling
        assert seq is not None and seq.request is not None and seq.allocation is not None
        prompt = seq.request.prompt
        # The last prompt token is left for the first decode, which samples what follows it.
        chunk = prompt[seq.prefilled : -1][: self._prefill_chunk]
        if chunk:
            self._engine.prefill(chunk, seq.prefilled, _block_table(seq))
            seq.prefilled += len(chunk)
        if seq.prefilled == len(prompt) - 1:
            self._cache.insert(seq.allocation, prompt[:-1])
            self._filling = None

    def _dispatch(self) -> tuple[list[tuple[_Sequence, Request]], Any]:
        ready = [
            (seq, seq.request)
            for seq in self._sequences
            if seq.request and seq is not self._filling and seq.dispatched < seq.request.max_tokens
        ]
        if not ready:
            return [], None
        decoded = self._engine.decode([_input(seq) for seq, _ in ready])
        for seq, _ in ready:
            seq.dispatched += 1
        return ready, decoded

    def _harvest(self, ready: list[tuple[_Sequence, Request]], decoded: Any) -> None:
        if not any(seq.request is request for seq, request in ready):
            return  # all have ended meanwhile
        for (seq, request), sampled in zip(ready, self._engine.harvest(decoded), strict=True):
            if seq.request is request:
                self._take(seq, request, sampled)

    def _take(self, seq: _Sequence, request: Request, sampled: Sampled) -> None:
        if not math.isfinite(sampled.logprob):
            self._end(request, "not_finite")
            return
        seq.answer.append(sampled.token)
        count = request.top_logprobs
        wanted = replace(sampled, top_ids=sampled.top_ids[:count], top_logprobs=sampled.top_logprobs[:count])
        self._events.append(Token(request.id, wanted))
        if sampled.token in request.stop_ids:
            self._end(request, "stop")
        elif len(seq.answer) == request.max_tokens:
            self._end(request, "length")


def most_tokens(engine: Engine, prefix: Prefix | None) -> int:
    """How many tokens a prompt and its answer may have: slots take memory, and no positions of the model."""
    return min(engine.max_length - (prefix.length if prefix else 0), engine.max_position_embeddings)


def _check(request: Request, engine: Engine) -> None:
    if not request.prompt:
        raise UserError("the prompt is empty: give at least one token")
    if request.max_tokens < 1:
        raise UserError(f"max_tokens is {request.max_tokens}, expected at least 1")
    slots = request.prefix.length if request.prefix else 0
    num_tokens = len(request.prompt) + request.max_tokens
    if slots + num_tokens > engine.max_length:
        raise UserError(
            f"the request needs {slots + num_tokens} positions ({slots} of the cartridge + {len(request.prompt)} of "
            f"the prompt + {request.max_tokens} of the answer) and may have {engine.max_length}: shorten the prompt or "
            "lower max_tokens"
        )
    if num_tokens > engine.max_position_embeddings:
        raise UserError(
            f"{len(request.prompt)} tokens of the prompt and {request.max_tokens} of the answer exceed the model's "
            f"window of {engine.max_position_embeddings}: shorten the prompt or lower max_tokens"
        )


def _block_table(seq: _Sequence) -> BlockTable:
    assert seq.allocation is not None
    return BlockTable(seq.allocation.pages, seq.allocation.slots)


def _input(seq: _Sequence) -> SequenceInput:
    request = seq.request
    assert request is not None
    return SequenceInput(
        index=seq.index,
        token=None if seq.dispatched else request.prompt[-1],
        position=len(request.prompt) - 1 + seq.dispatched,
        block_table=_block_table(seq),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        step=seq.dispatched,
        top_logprobs=request.top_logprobs,
    )
