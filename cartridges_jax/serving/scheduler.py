"""Who uses which slot of the engine, and when: continuous batching with automatic prefix reuse.

No JAX, no asyncio, no clock and no randomness: the same calls give the same events. The one idea: a slot is described
by what its cache holds (a cartridge and the tokens written after it), also after its request has ended, so that a new
request starts from the slot that already holds most of its prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class Prefix:
    """A loaded cartridge: `key` is its identity, version included, and `length` its number of slots p."""

    key: str
    length: int
    cartridge: object = field(compare=False)


@dataclass(frozen=True)
class SlotInput:
    slot: int
    token: int
    position: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    step: int


@dataclass(frozen=True)
class Sampled:
    """A sampled token; log-probabilities are raw (before temperature), the alternatives best first."""

    token: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Scored:
    """A token that was given, not sampled; `rank` counts from 1, the token that the model liked best."""

    sampled: Sampled
    rank: int


class Engine(Protocol):
    """What the scheduler needs of a device; `max_length` counts cartridge slots, prompt and answer of one slot."""

    @property
    def num_slots(self) -> int: ...
    @property
    def max_length(self) -> int: ...
    @property
    def max_top_logprobs(self) -> int: ...

    def clear(self, slot: int, prefix: Prefix | None) -> None:
        """From here on the slot holds the cartridge's positions, or nothing."""

    def copy(self, source: int, target: int) -> None:
        """Makes the target's cache a copy of the source's."""

    def prefill(self, slot: int, tokens: Sequence[int], position: int) -> None:
        """Writes the tokens' keys and values at `position`, `position` + 1, …"""

    def decode(self, inputs: Sequence[SlotInput]) -> list[Sampled]:
        """Writes each input's token at its position and samples the one that follows."""
        ...

    def score(self, tokens: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
        """Every token but the first, as the model would have sampled it; no slot is touched."""
        ...


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
    ignore_eos: bool = False
    top_logprobs: int = 0


@dataclass(frozen=True)
class Started:
    """The request has a slot; `cached_tokens` of its prompt were there already."""

    id: str
    cached_tokens: int


@dataclass(frozen=True)
class Token:
    """The next token of a request, a stop token included; it carries the `top_logprobs` alternatives asked for."""

    id: str
    sampled: Sampled


@dataclass(frozen=True)
class Finished:
    id: str
    reason: Literal["stop", "length", "cancelled"]


Event = Started | Token | Finished


class QueueFull(Exception):
    """As many requests wait as may wait."""


@dataclass
class _Slot:
    index: int
    key: str | None = None
    tokens: list[int] = field(default_factory=list)  # written after the cartridge's positions
    request: Request | None = None
    next_token: int = 0  # what the next decode writes
    generated: int = 0
    last_used: int = 0


class Scheduler:
    """Admits requests first come, first served; `step` prefills a little, then decodes one token for everyone.

    A step makes at most `prefills_per_step` engine prefills of at most `prefill_chunk` tokens, so that arrivals and
    long prompts never starve those who decode. Copying a slot costs the same however little of it is wanted: it is done
    when it saves `min_copy` tokens.
    """

    def __init__(
        self, engine: Engine, max_queue: int, prefills_per_step: int = 4, prefill_chunk: int = 256, min_copy: int = 16
    ):
        self._engine = engine
        self._max_queue = max_queue
        self._prefills_per_step = prefills_per_step
        self._prefill_chunk = prefill_chunk
        self._min_copy = min_copy
        self._queue: deque[Request] = deque()
        self._slots = [_Slot(i) for i in range(engine.num_slots)]
        self._filling: _Slot | None = None  # the one slot whose prompt is not written yet
        self._events: list[Event] = []
        self._uses = 0
        for slot in self._slots:
            engine.clear(slot.index, None)

    @property
    def has_work(self) -> bool:
        return bool(self._queue or self._events or any(s.request for s in self._slots))

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: it can never run; the sentence says why.
          QueueFull: `max_queue` requests wait already, beyond those that a free slot will take.
        """
        check(request, self._engine.max_length)
        if any(request.id == r.id for r in self._live()):
            raise ValueError(f"request id {request.id!r} is in use: give every request its own id")
        free = sum(slot.request is None for slot in self._slots)
        if len(self._queue) >= self._max_queue + free:
            raise QueueFull(f"{self._max_queue} requests are waiting already: try again later")
        self._queue.append(request)

    def cancel(self, id: str) -> None:
        """Ends a request where it stands; the next step reports it. One that has ended already is left alone."""
        for request in self._live():
            if request.id == id:
                self._drop(request)
                self._events.append(Finished(id, "cancelled"))
                return

    def step(self) -> list[Event]:
        """Prefills a little, decodes one token for every request whose prompt is written, and reports what happened."""
        self._prefill()
        self._decode()
        events, self._events = self._events, []
        return events

    def _live(self) -> list[Request]:
        return [s.request for s in self._slots if s.request] + list(self._queue)

    def _drop(self, request: Request) -> None:
        for slot in self._slots:
            if slot.request is request:
                self._release(slot)
                return
        self._queue.remove(request)

    def _release(self, slot: _Slot) -> None:
        slot.request = None
        self._uses += 1
        slot.last_used = self._uses
        if self._filling is slot:
            self._filling = None

    def _prefill(self) -> None:
        for _ in range(self._prefills_per_step):
            if self._filling is None and not self._admit():
                return
            self._fill_chunk()

    def _admit(self) -> bool:
        free = [slot for slot in self._slots if slot.request is None]
        if not self._queue or not free:
            return False
        request = self._queue.popleft()
        slot = self._place(request, min(free, key=_last_used))
        cached = len(slot.tokens)
        slot.request, slot.next_token, slot.generated = request, request.prompt[-1], 0
        self._filling = slot
        self._events.append(Started(request.id, cached))
        return True

    def _place(self, request: Request, victim: _Slot) -> _Slot:
        """Makes a free slot hold as much of the prompt as any slot does: itself, as a copy, or else only the cartridge.

        `victim` is the free slot that was used longest ago. Another free slot is taken instead when all it holds is the
        beginning of this prompt (a conversation goes on), since nothing is lost then.
        """
        key = request.prefix.key if request.prefix else None
        shared = {s.index: _shared(s, key, request.prompt) for s in self._slots}
        source = max(
            self._slots, key=lambda s: (shared[s.index], s.request is None and shared[s.index] == len(s.tokens))
        )
        length = shared[source.index]
        if source.request is None and 0 < length == len(source.tokens):
            return source
        if length - shared[victim.index] >= self._min_copy:
            self._engine.copy(source.index, victim.index)
            victim.key, victim.tokens = key, source.tokens[:length]
            return victim
        if victim.key != key:
            self._engine.clear(victim.index, request.prefix)
            victim.key = key
        del victim.tokens[shared[victim.index] :]
        return victim

    def _fill_chunk(self) -> None:
        """Writes the next part of the filling slot's prompt."""
        slot = self._filling
        assert slot is not None and slot.request is not None
        prompt = slot.request.prompt
        # The last prompt token is left for the first decode, which samples what follows it.
        chunk = prompt[len(slot.tokens) : -1][: self._prefill_chunk]
        if chunk:
            self._engine.prefill(slot.index, chunk, _position(slot))
            slot.tokens += chunk
        if len(slot.tokens) == len(prompt) - 1:
            self._filling = None

    def _decode(self) -> None:
        ready = [slot for slot in self._slots if slot.request and slot is not self._filling]
        if not ready:
            return
        for slot, sampled in zip(ready, self._engine.decode([_input(slot) for slot in ready]), strict=True):
            self._take(slot, sampled)

    def _take(self, slot: _Slot, sampled: Sampled) -> None:
        request = slot.request
        assert request is not None
        slot.tokens.append(slot.next_token)
        slot.next_token = sampled.token
        slot.generated += 1
        self._events.append(Token(request.id, _trim(sampled, request.top_logprobs)))
        if sampled.token in request.stop_ids and not request.ignore_eos:
            self._finish(slot, Finished(request.id, "stop"))
        elif slot.generated == request.max_tokens:
            self._finish(slot, Finished(request.id, "length"))

    def _finish(self, slot: _Slot, event: Finished) -> None:
        self._release(slot)
        self._events.append(event)


def check(request: Request, max_length: int) -> None:
    """Refuses a request that no slot of `max_length` positions can hold.

    Raises:
      ValueError: the sentence names every length that counts.
    """
    if not request.prompt:
        raise ValueError("the prompt is empty: give at least one token")
    if request.max_tokens < 1:
        raise ValueError(f"max_tokens is {request.max_tokens}, expected at least 1")
    slots = request.prefix.length if request.prefix else 0
    total = slots + len(request.prompt) + request.max_tokens
    if total > max_length:
        raise ValueError(
            f"the request needs {total} positions ({slots} of the cartridge + {len(request.prompt)} of the prompt + "
            f"{request.max_tokens} of the answer) and a slot has {max_length}: shorten the prompt or lower max_tokens"
        )


def _shared(slot: _Slot, key: str | None, prompt: tuple[int, ...]) -> int:
    """How many tokens of the prompt the slot holds already; never the last one, whose decode samples the answer."""
    if slot.key != key:
        return 0
    length = 0
    for held, wanted in zip(slot.tokens, prompt[:-1], strict=False):
        if held != wanted:
            break
        length += 1
    return length


def _last_used(slot: _Slot) -> int:
    return slot.last_used


def _position(slot: _Slot) -> int:
    assert slot.request is not None
    return len(slot.tokens) + (slot.request.prefix.length if slot.request.prefix else 0)


def _input(slot: _Slot) -> SlotInput:
    request = slot.request
    assert request is not None
    return SlotInput(
        slot=slot.index,
        token=slot.next_token,
        position=_position(slot),
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        seed=request.seed,
        step=slot.generated,
    )


def _trim(sampled: Sampled, count: int) -> Sampled:
    return Sampled(sampled.token, sampled.logprob, sampled.top_ids[:count], sampled.top_logprobs[:count])
