"""Which requests the engine works on, and when: continuous batching with automatic prefix reuse.

There is no JAX, no asyncio, no clock and no randomness here: the same calls give the same events. Tokens are harvested
a step late: when the host looks at what a step gave, the next one is under way, with tokens that only the device knows.
A request that turns out to have ended has a row in that next step for nothing. What the row writes goes to pages that
the request has just given back, and does no harm there: whoever has them next writes them by calls that the device
does later.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.cache import Allocation, PageCache, Prefix

Reason = Literal["stop", "length", "cancelled", "deadline", "not_finite"]


class BlockTable(NamedTuple):
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
    """A sequence that begins to decode: its next token is written, and the one that follows it sampled."""

    index: int  # which of the sequences that run together, below `max_num_seqs`
    token: int
    position: int  # of the token in its sequence, which begins behind the cartridge
    block_table: BlockTable  # with the pages up to that of the token, or more
    temperature: float
    top_p: float
    top_k: int
    seed: int
    step: int  # how many tokens were sampled before
    top_logprobs: int = 0
    logits: LogitsRules | None = None


class Chunk(NamedTuple):
    """A part of a prompt: its tokens, the position of the first of them, and where the sequence lies."""

    tokens: Sequence[int]
    position: int
    block_table: BlockTable


class Sampled(NamedTuple):
    """A sampled token with the best alternatives; log-probabilities are the model's, before temperature.

    A log-probability of NaN says that the model's logits were not finite: the token means nothing then.
    """

    token: int
    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Scored(NamedTuple):
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
    max_num_batched_tokens: int
    num_pages: int
    page_size: int
    heads_per_page: int

    def head_pages(self, prefix: Prefix) -> int:
        """How many head pages a cartridge takes. Raises: UserError, if it does not fit the model."""

    def load(self, prefix: Prefix, slots: Sequence[int]) -> None:
        """Writes a cartridge to the head pages that begin here, as in a `BlockTable`."""

    def copy(self, source: int, target: int, count: int) -> None:
        """Makes the target page a copy of the source's first `count` positions."""

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        """Writes the keys and values of parts of prompts, at most `max_num_batched_tokens` together."""

    def score(self, chunk: Chunk, following: Sequence[int]) -> Any:
        """`prefill` of one chunk, which also scores the token that follows each of its tokens; need not wait."""

    def scored(self, result: Any, num_top: int) -> list[Scored]:
        """What a `score` found, with so many alternatives."""

    def begin(self, sequence: SequenceInput) -> None:
        """From now on the sequence of this index is this one."""

    def extend(self, index: int, page: int) -> None:
        """Gives a sequence one more page for its tokens."""

    def decode(self, indices: Sequence[int]) -> Any:
        """Writes each sequence's next token and samples the one that follows; need not wait for the result."""

    def forward(self, indices: Sequence[int]) -> Any:
        """The first half of `decode`, up to the logits; need not wait for them."""

    def sample(self, logits: Any, masks: Sequence[Any]) -> Any:
        """The other half, for the newest logits, among the tokens that each sequence's mask allows; None: all."""

    def harvest(self, decoded: Any) -> list[Sampled]:
        """What a step sampled, in the order of its sequences, with the alternatives that each asked for."""


class Constraint(Protocol):
    """What restricts a request's next token by those before it, as a grammar does; if it `is_broken`, no more."""

    is_broken: bool

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
    max_tokens: int = 16  # 0: the prompt is only scored
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int = 0
    logits: LogitsRules | None = None  # None: nothing is done to the logits
    prompt_logprobs: int | None = None  # so many alternatives to each token of the prompt; None: it is not scored
    constraint: Callable[[], Constraint] | None = None  # called once, when the request is submitted
    deadline: float = math.inf  # on the clock that `Scheduler.step` is told


class Started(NamedTuple):
    """The request runs and has the memory for its prompt; `cached_tokens` of the prompt were there already."""

    id: str
    cached_tokens: int


class PromptScored(NamedTuple):
    """The score of a prompt, from its second token on; it comes before the answer's first token."""

    id: str
    scored: list[Scored]


class Token(NamedTuple):
    """The next token of a request, a stop token included; it carries the `top_logprobs` alternatives asked for."""

    id: str
    sampled: Sampled


class Finished(NamedTuple):
    """The request has ended; "not_finite": what the model makes of its cartridge and prompt are no numbers."""

    id: str
    reason: Reason


Event = Started | PromptScored | Token | Finished
NOT_FINITE = (
    "the model's numbers are not finite here: the cartridge holds values that are too large for this model, or the "
    "model's dtype is too small; use another cartridge, or train this one again"
)


class QueueFull(Exception):
    """The queue is full: no other request may wait."""


@dataclass(eq=False, slots=True)
class _Sequence:
    """A request on its way: it waits, or it runs under an index and has pages."""

    request: Request
    constraint: Constraint | None
    to_score: bool  # whether the prompt's score has still to be told
    index: int = -1
    allocation: Allocation | None = None
    started: bool = False
    answer: list[int] = field(default_factory=list)  # the tokens that were harvested
    written: int = 0  # how many tokens its pages hold, or will hold when the engine has done all that it was asked
    room: int = 0  # how many they can hold
    limit: int = 0  # how many they hold in the end: all but the answer's last
    scores: list[Any] = field(default_factory=list)  # of the prompt's parts, which are not harvested yet

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt, and the answer as far as it was harvested."""
        return (*self.request.prompt, *self.answer) if self.answer else self.request.prompt


class _Step(NamedTuple):
    """What was asked of the engine in one step, and is to be harvested in the next one."""

    decoding: Sequence[_Sequence] = ()
    decoded: Any = None
    scoring: Sequence[_Sequence] = ()


class Scheduler:
    """Admits requests first come, first served; `step` prefills a little, then decodes one token for everyone.

    A request is admitted when an index is free, the pages for its prompt, and one more for each that runs already. It
    gets further pages as its answer grows. When none is left, the request that was admitted last gives back its own and
    waits at the head of the queue; it goes on where it was.

    A step prefills at most `max_num_batched_tokens`, of however many requests, so that arrivals and long prompts never
    starve those who decode.
    """

    def __init__(self, engine: Engine, max_queue: int, max_num_batched_tokens: int | None = None):
        self._engine = engine
        self._max_queue = max_queue
        self._max_num_batched_tokens = max_num_batched_tokens or engine.max_num_batched_tokens
        self._cache = PageCache(engine.num_pages, engine.page_size, engine.heads_per_page, engine.head_pages)
        self._sequences: dict[str, _Sequence] = {}  # all that wait or run, by their requests' ids
        self._queue: deque[_Sequence] = deque()
        self._free_indices = list(range(engine.max_num_seqs))  # a heap
        self._filling: _Sequence | None = None  # the one whose prompt is not written yet, the last that was admitted
        self._decoding: list[_Sequence] = []  # the others that run, in the order of their admission
        self._scoring: list[_Sequence] = []  # those of them whose prompts were scored in this step
        self._under_way = _Step()
        self._next_deadline = math.inf
        self._events: list[Event] = []

    @property
    def has_work(self) -> bool:
        return bool(self._sequences or self._events)

    @property
    def num_running(self) -> int:
        num_waiting = len(self._queue)  # any thread may ask, also between the two counts
        return max(len(self._sequences) - num_waiting, 0)

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
        if request.id in self._sequences:
            raise UserError(f"request id {request.id!r} is in use: give every request its own id")
        if len(self._queue) >= self._max_queue + len(self._free_indices):
            raise QueueFull(f"{self._max_queue} requests are waiting already: try again later")
        constraint = request.constraint() if request.constraint else None
        seq = _Sequence(request, constraint, request.prompt_logprobs is not None)
        seq.limit = len(request.prompt) + request.max_tokens - 1
        self._sequences[request.id] = seq
        self._queue.append(seq)
        self._next_deadline = min(self._next_deadline, request.deadline)

    def cancel(self, id: str) -> None:
        """Ends a request where it stands; the next step reports it. One that has ended already is left alone."""
        if (seq := self._sequences.get(id)) is not None:
            self._end(seq, "cancelled")

    def step(self, now: float = -math.inf) -> list[Event]:
        """Prefills a little, starts a step for every request whose prompt is written, and reports the step before.

        Requests whose deadline has come by `now` end first.
        """
        if self._next_deadline <= now:
            self._end_overdue(now)
        self._prefill()
        self._decode()
        events, self._events = self._events, []
        return events

    def _end_overdue(self, now: float) -> None:
        for seq in list(self._sequences.values()):
            if seq.request.deadline <= now:
                self._end(seq, "deadline")
        self._next_deadline = min((seq.request.deadline for seq in self._sequences.values()), default=math.inf)

    def _end(self, seq: _Sequence, reason: Reason) -> None:
        if seq.allocation is None:
            self._queue.remove(seq)
        else:
            self._release(seq)
        del self._sequences[seq.request.id]
        self._events.append(Finished(seq.request.id, reason))

    def _release(self, seq: _Sequence) -> None:
        """Takes its index and its pages from a sequence that runs."""
        assert seq.allocation is not None
        if seq is self._filling:
            self._filling = None
        else:
            self._decoding.remove(seq)
        # what was sampled last has not been written, as far as the host knows
        self._cache.free(seq.allocation, seq.tokens[: min(seq.written, len(seq.tokens) - 1)])
        heapq.heappush(self._free_indices, seq.index)
        seq.index, seq.allocation, seq.scores = -1, None, []

    def _prefill(self) -> None:
        """Writes the next parts of prompts, also of those that wait, if there is room for them."""
        budget, may_load = self._max_num_batched_tokens, True
        chunks: list[Chunk] = []
        while budget > 0:
            if self._filling is None:
                allocation = self._allocate() if may_load and self._queue and self._free_indices else None
                if allocation is None:
                    break
                may_load = not allocation.load  # one cartridge a step at most: that takes its time as well
                if self._reads(allocation, chunks):
                    self._flush(chunks)
                self._admit(allocation)
            budget -= self._fill(budget, chunks)
        self._flush(chunks)

    def _allocate(self) -> Allocation | None:
        """Pages for the first that waits, if there are enough."""
        seq = self._queue[0]
        num_running = len(self._decoding) + (self._filling is not None)
        # of a prompt that is scored every token passes through the model
        shared = () if seq.to_score else seq.tokens[:-1]
        return self._cache.allocate(seq.request.prefix, shared, len(seq.tokens), spare=num_running)

    def _reads(self, allocation: Allocation, chunks: Sequence[Chunk]) -> bool:
        """Whether what was allocated has tokens of these chunks, which are not written yet."""
        size, written = self._engine.page_size, set[int]()
        for chunk in chunks:
            last = chunk.position + len(chunk.tokens) - 1
            written.update(chunk.block_table.pages[chunk.position // size : last // size + 1])
        shared = (page for node in allocation.path[1:] for page in node.pages)
        return not written.isdisjoint([*shared, *(allocation.copy or ())[:1]])

    def _flush(self, chunks: list[Chunk]) -> None:
        if chunks:
            self._engine.prefill(chunks)
            chunks.clear()

    def _admit(self, allocation: Allocation) -> None:
        """Lets the first that waits run."""
        seq = self._queue.popleft()
        if allocation.load:
            assert seq.request.prefix is not None
            self._engine.load(seq.request.prefix, allocation.slots)
        if allocation.copy is not None:
            self._engine.copy(*allocation.copy, allocation.cached % self._engine.page_size)
        seq.index, seq.allocation, seq.written = heapq.heappop(self._free_indices), allocation, allocation.cached
        self._filling = seq
        if not seq.started:
            seq.started = True
            self._events.append(Started(seq.request.id, allocation.cached))

    def _fill(self, budget: int, chunks: list[Chunk]) -> int:
        """Takes the next part of the prompt that is being written; returns how many tokens it has."""
        seq = self._filling
        assert seq is not None and seq.allocation is not None
        tokens, pages = seq.tokens, seq.allocation.pages
        # The last token is left for the first decode, which samples what follows it.
        part = tokens[seq.written : min(seq.written + budget, len(tokens) - 1)]
        chunk = Chunk(part, seq.written, BlockTable(pages, seq.allocation.slots))
        seq.written += len(part)
        if part and seq.to_score:
            self._flush(chunks)
            seq.scores.append(self._engine.score(chunk, tokens[chunk.position + 1 : seq.written + 1]))
        elif part:
            chunks.append(chunk)
        if seq.written == len(tokens) - 1:
            self._cache.insert(seq.allocation, tokens[:-1])
            if seq.allocation.pages != pages:  # others had written the same, and its own pages may be another's next
                self._flush(chunks)
            self._begin(seq)
        return len(part)

    def _begin(self, seq: _Sequence) -> None:
        """Lets a sequence decode whose prompt is written."""
        request, allocation = seq.request, seq.allocation
        assert allocation is not None
        self._filling = None
        self._decoding.append(seq)
        if seq.to_score:
            self._scoring.append(seq)
        seq.room = len(allocation.pages) * self._engine.page_size
        self._engine.begin(
            SequenceInput(
                index=seq.index,
                token=seq.tokens[-1],
                position=seq.written,
                block_table=BlockTable(allocation.pages, allocation.slots),
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=request.top_k,
                seed=request.seed,
                step=len(seq.answer),
                top_logprobs=request.top_logprobs,
                logits=request.logits and replace(request.logits, prompt=request.prompt, answer=tuple(seq.answer)),
            )
        )

    def _decode(self) -> None:
        """Asks for the next token of every sequence that decodes, and harvests what was asked before."""
        decoding = [seq for seq in self._decoding if seq.written < seq.limit]
        if full := [seq for seq in decoding if seq.written == seq.room]:
            self._make_room(full)
            decoding = [seq for seq in self._decoding if seq.written < seq.limit]
        indices = [seq.index for seq in decoding]
        before = self._under_way
        decoded = None
        if any(seq.constraint for seq in decoding):
            # while the model runs, the tokens are read that say what may follow them
            logits = self._engine.forward(indices)
            self._harvest(before)
            masks = [seq.constraint.mask() if seq.constraint and seq.index >= 0 else None for seq in decoding]
            decoded, before = self._engine.sample(logits, masks), _Step()
        elif decoding:
            decoded = self._engine.decode(indices)
        for seq in decoding:
            seq.written += 1
        self._under_way = _Step(decoding, decoded, self._scoring)
        self._scoring = []
        self._harvest(before)

    def _make_room(self, full: Sequence[_Sequence]) -> None:
        """Gives sequences the page for their next token, which those that were admitted last give back if need be.

        What these sample in the step that is under way is dropped, and sampled again when they go on.
        """
        for seq in full:
            while seq.allocation is not None:
                page = self._cache.extend(seq.allocation)
                if page is not None:
                    self._engine.extend(seq.index, page)
                    seq.room += self._engine.page_size
                    break
                last = self._filling or self._decoding[-1]
                self._release(last)
                self._queue.appendleft(last)

    def _harvest(self, step: _Step) -> None:
        for seq in step.scoring:
            if seq.allocation is not None:
                self._take_scores(seq)
        if not any(seq.allocation for seq in step.decoding):
            return  # all have ended meanwhile
        for seq, sampled in zip(step.decoding, self._engine.harvest(step.decoded), strict=True):
            if seq.allocation is not None:
                self._take(seq, sampled)

    def _take_scores(self, seq: _Sequence) -> None:
        request = seq.request
        assert request.prompt_logprobs is not None
        scored = [one for part in seq.scores for one in self._engine.scored(part, request.prompt_logprobs)]
        seq.to_score, seq.scores = False, []
        if not all(math.isfinite(one.sampled.logprob) for one in scored):
            self._end(seq, "not_finite")
            return
        self._events.append(PromptScored(request.id, scored))
        if request.max_tokens == 0:
            self._end(seq, "length")

    def _take(self, seq: _Sequence, sampled: Sampled) -> None:
        request = seq.request
        if not math.isfinite(sampled.logprob):
            self._end(seq, "not_finite")
            return
        seq.answer.append(sampled.token)
        self._events.append(Token(request.id, sampled))
        if sampled.token in request.stop_ids:
            self._end(seq, "length" if seq.constraint and seq.constraint.is_broken else "stop")
        elif len(seq.answer) == request.max_tokens:
            self._end(seq, "length")
        elif seq.constraint is not None:
            seq.constraint.take(sampled.token)


def most_tokens(engine: Engine, prefix: Prefix | None) -> int:
    """How many tokens a prompt and its answer may have: slots take memory, and no positions of the model."""
    return min(engine.max_length - (prefix.length if prefix else 0), engine.max_position_embeddings)


def _check(request: Request, engine: Engine) -> None:
    if not request.prompt:
        raise UserError("the prompt is empty: give at least one token")
    fewest = 1 if request.prompt_logprobs is None else 0
    if request.max_tokens < fewest:
        raise UserError(f"max_tokens is {request.max_tokens}, expected at least {fewest}")
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
