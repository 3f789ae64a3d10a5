"""The scheduler against an engine whose answers show what its memory really holds."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.cache import Allocation, PageCache
from cartridges_jax.serving.scheduler import (
    BlockTable,
    Chunk,
    Event,
    Finished,
    Prefix,
    PromptScored,
    QueueFull,
    Request,
    Sampled,
    Scheduler,
    Scored,
    SequenceInput,
    Started,
    Token,
)

VOCAB = 8
STOP = VOCAB - 1
PREFIXES = (None, Prefix("a", 3, object()), Prefix("b", 5, object()))


def next_token(context: Sequence[object], seed: int, step: int, vocab: int = VOCAB) -> Sampled:
    """The "language model": any other context, order, seed or step gives another token."""
    digest = hashlib.sha256(repr((list(context), seed, step)).encode()).digest()
    ids = tuple((digest[0] + i) % vocab for i in range(4))
    return Sampled(ids[digest[1] % 2], -float(digest[1] % 2), ids, tuple(-float(i) for i in range(4)))


def slots_of(prefix: Prefix | None) -> list[object]:
    """Those of all heads; the last of them has one slot less than the others."""
    return [(prefix.key, i) for i in range(prefix.length * FakeEngine.heads_per_page - 1)] if prefix else []


@dataclass
class FakeEngine:
    """Cells instead of keys and values; nothing is ever wiped, so whatever reads a stale cell answers wrongly.

    Every head page has its cells; a token stands in all of its page's.
    """

    max_num_seqs: int = 2
    max_length: int = 40
    max_top_logprobs: int = 4
    vocab: int = VOCAB
    page_size: int = 4
    heads_per_page: ClassVar[int] = 3
    max_position_embeddings: int = 1 << 20
    max_num_batched_tokens: int = 1 << 10
    num_pages: int = 0  # 0: enough for as many requests as run together
    prefilled: int = 0
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_pages = self.num_pages or self.max_num_seqs * (math.ceil(self.max_length / self.page_size) + 1)
        num_head_pages = self.num_pages * self.heads_per_page
        self.cells: list[list[object]] = [["garbage"] * self.page_size for _ in range(num_head_pages)]
        self.loaded: dict[int, int] = {}  # how many slots lie in the head pages whose first one this is
        self.sequences: dict[int, SequenceInput] = {}

    def head_pages(self, prefix: Prefix) -> int:
        return math.ceil(len(slots_of(prefix)) / self.page_size)

    def load(self, prefix: Prefix, slots: Sequence[int]) -> None:
        self.log.append("load")
        held = slots_of(prefix)
        assert len(slots) == math.ceil(self.head_pages(prefix) / self.heads_per_page)
        self.loaded[slots[0]] = len(held)
        for i, slot in enumerate(held):
            head_page, cell = self._slot(slots, i)
            self.cells[head_page][cell] = slot

    def copy(self, source: int, target: int, count: int) -> None:
        assert source != target and 0 < count < self.page_size
        self.log.append("copy")
        for cell in range(count):
            self._write((target, cell), self._token((source, cell)))

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        assert 0 < sum(len(chunk.tokens) for chunk in chunks) <= self.max_num_batched_tokens
        assert all(chunk.tokens for chunk in chunks)
        self.log.append("prefill")
        for chunk in chunks:
            self._fill(chunk)
        for chunk in chunks:  # all at once: none may write what another has written
            for i, token in enumerate(chunk.tokens, start=chunk.position):
                assert self._token(self._where(chunk.block_table, i)) == token

    def _fill(self, chunk: Chunk) -> None:
        assert chunk.position + len(chunk.tokens) <= self.max_length
        self.prefilled += len(chunk.tokens)
        for i, token in enumerate(chunk.tokens, start=chunk.position):
            self._write(self._where(chunk.block_table, i), token)

    def score(self, chunk: Chunk, following: Sequence[int]) -> list[Sampled]:
        """The score of a token says what comes before it."""
        assert len(following) == len(chunk.tokens) <= self.max_num_batched_tokens
        self.log.append("score")
        self._fill(chunk)
        found = []
        for i, token in enumerate(following, start=chunk.position):
            said = next_token(self._read(chunk.block_table, i), 0, 0, self.vocab)
            found.append(said._replace(token=token))
        return found

    def scored(self, result: list[Sampled], num_top: int) -> list[Scored]:
        self.log.append("scored")
        return [
            Scored(one._replace(top_ids=one.top_ids[:num_top], top_logprobs=one.top_logprobs[:num_top]), num_top + 1)
            for one in result
        ]

    def begin(self, sequence: SequenceInput) -> None:
        pages = list(sequence.block_table.pages)
        self.sequences[sequence.index] = replace(sequence, block_table=sequence.block_table._replace(pages=pages))

    def extend(self, index: int, page: int) -> None:
        self.sequences[index].block_table.pages.append(page)  # type: ignore[attr-defined]

    def forward(self, indices: Sequence[int]) -> list[SequenceInput]:
        assert indices and len(set(indices)) == len(indices)
        self.log.append("forward")
        inputs = [self.sequences[i] for i in indices]
        for i in inputs:
            assert i.position < self.max_length
            self._write(self._where(i.block_table, i.position), i.token)
            self.sequences[i.index] = replace(i, position=i.position + 1, step=i.step + 1)
        return inputs

    def sample(self, logits: list[SequenceInput], masks: Sequence[set[int] | None]) -> list[Sampled]:
        self.log.append("sample")
        return [self._sample(i, mask) for i, mask in zip(logits, masks, strict=True)]

    def decode(self, indices: Sequence[int]) -> list[Sampled]:
        inputs = self.forward(indices)
        self.log[-1] = "decode"
        return [self._sample(i) for i in inputs]

    def _sample(self, i: SequenceInput, mask: set[int] | None = None) -> Sampled:
        said = next_token(self._read(i.block_table, i.position), i.seed, i.step, self.vocab)
        if mask is not None and said.token not in mask:
            said = said._replace(token=min(mask))
        self.sequences[i.index] = replace(self.sequences[i.index], token=said.token)
        return said._replace(top_ids=said.top_ids[: i.top_logprobs], top_logprobs=said.top_logprobs[: i.top_logprobs])

    def harvest(self, decoded: list[Sampled]) -> list[Sampled]:
        self.log.append("harvest")
        return decoded

    def _where(self, block_table: BlockTable, position: int) -> tuple[int, int]:
        page, cell = divmod(position, self.page_size)
        return block_table.pages[page], cell

    def _slot(self, slots: Sequence[int], i: int) -> tuple[int, int]:
        number, cell = divmod(i, self.page_size)
        return slots[number // self.heads_per_page] + number % self.heads_per_page, cell

    def _write(self, where: tuple[int, int], token: object) -> None:
        page, cell = where
        for head in range(self.heads_per_page):
            self.cells[page * self.heads_per_page + head][cell] = token

    def _token(self, where: tuple[int, int]) -> object:
        page, cell = where
        found = {self.cells[page * self.heads_per_page + head][cell] for head in range(self.heads_per_page)}
        return found.pop() if len(found) == 1 else "torn"

    def _read(self, block_table: BlockTable, position: int) -> list[object]:
        count = self.loaded[block_table.slots[0]] if block_table.slots else 0
        places = [self._slot(block_table.slots, i) for i in range(count)]
        slots = [self.cells[head_page][cell] for head_page, cell in places]
        return [*slots, *(self._token(self._where(block_table, i)) for i in range(position + 1))]


class NoRepeats:
    """A constraint that depends on all tokens before: none may come a third time."""

    is_broken = False

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> set[int]:
        return {token for token in range(VOCAB) if self.taken.count(token) < 2} | {STOP}

    def take(self, token: int) -> None:
        assert token in self.mask()
        self.taken.append(token)


def alone(request: Request) -> list[int]:
    """What the request would answer if there were no scheduler at all."""
    context, answer = [*slots_of(request.prefix), *request.prompt], []
    constraint = request.constraint() if request.constraint else None
    while len(answer) < request.max_tokens:
        token = next_token(context, request.seed, len(answer)).token
        if constraint:
            token = token if token in constraint.mask() else min(constraint.mask())
            constraint.take(token)
        answer.append(token)
        context.append(token)
        if token in request.stop_ids:
            break
    return answer


def score_alone(request: Request) -> list[Scored]:
    count, before = request.prompt_logprobs, [*slots_of(request.prefix)]
    found = []
    for i, token in enumerate(request.prompt[1:], start=1):
        said = next_token([*before, *request.prompt[:i]], 0, 0)
        best = {"top_ids": said.top_ids[:count], "top_logprobs": said.top_logprobs[:count]}
        found.append(Scored(said._replace(token=token, **best), count + 1))
    return found


def finish(scheduler: Scheduler) -> list[Event]:
    events = []
    for _ in range(2000):
        if not scheduler.has_work:
            return events
        events += scheduler.step()
    raise AssertionError("the scheduler makes no progress")


def answers(events: Sequence[Event]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for event in events:
        if isinstance(event, Token):
            found.setdefault(event.id, []).append(event.sampled.token)
    return found


def cached(events: Sequence[Event]) -> dict[str, int]:
    return {event.id: event.cached_tokens for event in events if isinstance(event, Started)}


# Two letters make shared beginnings likely.
requests = st.builds(
    Request,
    id=st.just(""),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple),
    prefix=st.sampled_from(PREFIXES),
    max_tokens=st.integers(0, 12),
    seed=st.integers(0, 2),
    stop_ids=st.sampled_from([frozenset(), frozenset({STOP})]),
    top_logprobs=st.integers(0, 4),
    prompt_logprobs=st.sampled_from([None, None, 0, 3]),
    constraint=st.sampled_from([None, None, NoRepeats]),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), requests),
        st.tuples(st.just("follow"), requests),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(1, 4)),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(
    operations,
    st.integers(1, 4),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4, 7]),
    st.sampled_from([0, 1.0, 1.4, 2.5]),
)
def test_any_traffic_gives_what_each_request_gets_alone(operations, max_num_seqs, most, page_size, memory):
    """With memory for so many requests of the greatest length; 0 means as many as run together."""
    num_pages = math.ceil(memory * (40 / page_size + 1))
    engine = FakeEngine(max_num_seqs, page_size=page_size, num_pages=num_pages, max_num_batched_tokens=most)
    scheduler = Scheduler(engine, 5)
    submitted: dict[str, Request] = {}
    cancelled: set[str] = set()
    events: list[Event] = []

    def step() -> None:
        engine.log.clear()
        before = {e.id for e in events if isinstance(e, Token)} - {e.id for e in events if isinstance(e, Finished)}
        prefilled = engine.prefilled
        new = scheduler.step()
        events.extend(new)
        assert engine.prefilled - prefilled <= most
        assert engine.log.count("decode") + engine.log.count("forward") <= 1 and engine.log.count("load") <= 1
        going = before - {e.id for e in new if isinstance(e, Finished) and e.reason == "cancelled"}
        counts = {id: len(tokens) for id, tokens in answers(new).items()}
        assert memory or all(counts.get(id) == 1 for id in going), "a request that decodes gets one token every step"
        assert all(count == 1 for count in counts.values())
        ended = {e.id for e in events if isinstance(e, Finished)}
        assert scheduler.num_running + scheduler.num_waiting == len(submitted.keys() - ended)
        assert scheduler.num_running <= max_num_seqs and 0 <= scheduler.kv_usage <= 1
        assert (scheduler.kv_usage > 0) == (scheduler.num_running > 0), "what is only remembered is not in use"

    for kind, value in operations:
        if kind in ("submit", "follow"):
            request = replace(value, id=str(len(submitted)))
            if kind == "follow" and submitted:  # a second turn: the first request, its answer, and something more
                first = list(submitted.values())[len(value.prompt) % len(submitted)]
                said = answers(events).get(first.id, [])
                request = replace(request, prefix=first.prefix, prompt=(*first.prompt, *said, *value.prompt))
            lengths = (request.prefix.length if request.prefix else 0, len(request.prompt) + request.max_tokens)
            too_long = sum(lengths) > engine.max_length or request.max_tokens < (request.prompt_logprobs is None)
            too_long |= sum(math.ceil(length / page_size) for length in lengths) > engine.num_pages
            try:
                scheduler.submit(request)
                assert not too_long
                submitted[request.id] = request
            except ValueError:
                assert too_long
            except QueueFull:
                ended = {e.id for e in events if isinstance(e, Finished)} | cancelled
                assert len(submitted.keys() - ended) >= 5
        elif kind == "cancel":
            id = str(value)
            if id in submitted and not any(isinstance(e, Finished) and e.id == id for e in events):
                cancelled.add(id)
            scheduler.cancel(id)
        else:
            for _ in range(value):
                step()
    steps = 0
    while scheduler.has_work:
        step()
        steps += 1
        assert steps < 2000, "no progress"

    got = answers(events)
    ends = [e for e in events if isinstance(e, Finished)]
    assert sorted(e.id for e in ends) == sorted(submitted), "every request ends exactly once"
    for end in ends:
        request, answer = submitted[end.id], got.get(end.id, [])
        expected = alone(request)
        if end.id in cancelled:
            assert end.reason == "cancelled" and answer == expected[: len(answer)]
            continue
        assert answer == expected
        stopped = bool(answer) and answer[-1] in request.stop_ids
        assert end.reason == ("stop" if stopped else "length")
        scores = [e.scored for e in events if isinstance(e, PromptScored) and e.id == end.id]
        assert scores == ([] if request.prompt_logprobs is None else [score_alone(request)])
    for event in events:
        if isinstance(event, Token):
            count = submitted[event.id].top_logprobs
            assert len(event.sampled.top_ids) == len(event.sampled.top_logprobs) == count
        if isinstance(event, Started):
            assert 0 <= event.cached_tokens < len(submitted[event.id].prompt)
        if isinstance(event, PromptScored):
            assert event.id not in answers(events[: events.index(event)]), "a prompt's score comes before the answer"
    order = [int(e.id) for e in events if isinstance(e, Started)]
    assert order == sorted(order), "first come, first served"
    # No sequence has leaked: as many requests as before run at the same time.
    for i in range(max_num_seqs):
        scheduler.submit(Request(f"last{i}", (0,), max_tokens=3))
    events = scheduler.step()
    assert len(cached(events)) == max_num_seqs if not memory else cached(events)
    finish(scheduler)
    # No page has leaked: a request that needs them all runs.
    whole = Request("whole", (0,), max_tokens=min(engine.num_pages * page_size, engine.max_length) - 1)
    scheduler.submit(whole)
    assert answers(finish(scheduler)) == {"whole": alone(whole)}


def test_each_request_decodes_alone_as_together():
    rng = random.Random(0)
    wanted = [
        Request(str(i), tuple(rng.choices(range(3), k=rng.randint(1, 10))), PREFIXES[i % 3], max_tokens=8, seed=i)
        for i in range(30)
    ]
    scheduler = Scheduler(FakeEngine(4), 30)
    for request in wanted:
        scheduler.submit(request)
    assert answers(finish(scheduler)) == {request.id: alone(request) for request in wanted}


def test_a_conversation_that_goes_on_is_not_prefilled_again():
    engine = FakeEngine(3)
    scheduler = Scheduler(engine, 4)
    first = Request("first", (0, 1, 2, 3, 4, 5), PREFIXES[1], max_tokens=5)
    scheduler.submit(first)
    said = answers(finish(scheduler))["first"]
    assert engine.prefilled == 5
    engine.prefilled = 0
    engine.log.clear()
    second = replace(first, id="second", prompt=(*first.prompt, *said, 0, 1))
    scheduler.submit(second)
    events = finish(scheduler)
    # The last token of an answer is sampled but never written.
    assert cached(events) == {"second": 6 + 4}
    assert engine.prefilled == 2 and engine.log.count("copy") == 1 and "load" not in engine.log
    assert answers(events)["second"] == alone(second)


def test_requests_that_arrive_together_share_their_beginning():
    engine = FakeEngine(4, max_length=80)
    scheduler = Scheduler(engine, 4)
    shared = tuple(i % 3 for i in range(40))
    wanted = [Request(str(i), (*shared, i), PREFIXES[2], max_tokens=6) for i in range(4)]
    for request in wanted:
        scheduler.submit(request)
    events = finish(scheduler)
    assert engine.prefilled == 40 and engine.log.count("load") == 1
    assert cached(events) == {"0": 0, "1": 40, "2": 40, "3": 40}
    assert answers(events) == {request.id: alone(request) for request in wanted}


def test_a_page_that_another_has_written_meanwhile_is_nobody_else_s_in_the_same_prefill():
    """The last part of a prompt is written to a page that turns out to be there already, and is given to another."""
    engine = FakeEngine(3)
    scheduler = Scheduler(engine, 4, max_num_batched_tokens=6)
    first = Request("first", (0,), max_tokens=8)
    scheduler.submit(first)
    for _ in range(8):
        scheduler.step()
    second = Request("second", (0, *alone(first)[:7], 1), max_tokens=3)
    third = Request("third", (1, 1, 0, 0, 1), max_tokens=3)
    for request in (second, third):
        scheduler.submit(request)
    assert Finished("first", "length") in scheduler.step()
    engine.log.clear()
    events = scheduler.step()
    assert engine.log[:2] == ["prefill", "prefill"] and list(cached(events)) == ["third"]
    assert answers(finish(scheduler)) == {request.id: alone(request) for request in (second, third)}


def test_another_cartridge_shares_nothing():
    engine = FakeEngine(2)
    scheduler = Scheduler(engine, 4)
    for i, prefix in enumerate(PREFIXES):
        scheduler.submit(Request(str(i), tuple([0] * 20), prefix, max_tokens=2))
    assert set(cached(finish(scheduler)).values()) == {0}
    assert engine.prefilled == 3 * 19


def test_the_next_step_is_under_way_before_the_last_is_looked_at():
    engine = FakeEngine(2)
    scheduler = Scheduler(engine, 4)
    scheduler.submit(Request("x", (1,), max_tokens=4))
    finish(scheduler)
    assert engine.log == ["decode", "decode", "harvest", "decode", "harvest", "decode", "harvest", "harvest"]


def test_requests_wait_for_memory_in_their_order():
    """The second does not fit beside the first; the third would, and still comes after it."""
    engine = FakeEngine(3, page_size=4, num_pages=11)
    scheduler = Scheduler(engine, 4)
    for i, (id, count) in enumerate((("first", 19), ("second", 27), ("third", 3))):
        scheduler.submit(Request(id, (i,) * count, max_tokens=1))
    events = scheduler.step()
    assert list(cached(events)) == ["first"]
    events += finish(scheduler)
    assert list(cached(events)) == ["first", "second", "third"]
    assert events.index(Finished("first", "length")) < events.index(Started("second", 0))


def test_pages_are_taken_as_answers_grow_and_who_gives_them_back_loses_nothing():
    """Each needs 6 pages in the end, and there are 9: three begin, and the first is never held up."""
    engine = FakeEngine(3, page_size=4, num_pages=9)
    scheduler = Scheduler(engine, 4)
    constraints = None, None, NoRepeats
    wanted = [Request(str(i), (i,) * 4, max_tokens=20, constraint=constraints[i]) for i in range(3)]
    wanted.append(Request("3", (3,), max_tokens=2))
    for request in wanted:
        scheduler.submit(request)
    steps = [scheduler.step() for _ in range(23)]
    begun = [id for events in steps[:2] for id in cached(events)]
    assert begun == ["0", "1", "2"]
    assert all("0" in answers(events) for events in steps[1:21])
    events = [event for events in steps for event in events] + finish(scheduler)
    assert answers(events) == {request.id: alone(request) for request in wanted}
    assert [e.id for e in events if isinstance(e, Started)] == [*begun, "3"], "what goes on has begun once"
    assert engine.prefilled > 3 * 3, "and its tokens were written again"


def test_what_is_dropped_is_what_was_used_longest_ago_and_it_is_loaded_again():
    engine = FakeEngine(1, page_size=4, num_pages=12)
    scheduler = Scheduler(engine, 4)

    def ask(prefix: Prefix | None, length: int) -> list[str]:
        engine.log.clear()
        request = Request("x", tuple(range(length)), prefix, max_tokens=2)
        scheduler.submit(request)
        assert answers(finish(scheduler)) == {"x": alone(request)}
        return [call for call in engine.log if call == "load"]

    a, b = PREFIXES[1:]
    assert ask(a, 2) == ask(b, 2) == ["load"]  # 2 + 3 pages
    assert ask(a, 2) == ask(b, 2) == ask(a, 2) == []
    assert ask(None, 24) == []  # 7 more pages, which are there
    assert ask(a, 18) == []  # 4 more: those of b, used before a's
    assert ask(b, 2) == ["load"]


def test_the_ends_of_cartridges_share_pages_and_none_is_lost():
    """Of pages with 8 head pages, cartridges take 3, 5, 11 and 2: whole pages and parts of others."""
    counts = {"a": 3, "b": 5, "c": 11, "d": 2}
    cache = PageCache(6, 4, 8, lambda prefix: counts[prefix.key])

    def allocate(key: str) -> Allocation:
        found = cache.allocate(Prefix(key, 1, None), [0], 1)
        assert found is not None
        return found

    def head_pages(allocation: Allocation, key: str) -> set[int]:
        return {allocation.slots[i // 8] + i % 8 for i in range(counts[key])}

    held = {key: allocate(key) for key in "abc"}
    assert cache.num_used == 3 + 3, "pages of slots, and of tokens"
    a, b, c = (head_pages(held[key], key) for key in "abc")
    assert len(a | b | c) == 3 + 5 + 11
    assert {page // 8 for page in a} == {page // 8 for page in b}, "3 and 5 fill a page"
    assert len({page // 8 for page in a | b | c}) == 3
    assert cache.allocate(Prefix("d", 1, None), [0], 1) is None, "c's second page has room for it, and no page is left"
    cache.free(held["b"], [0])
    held["d"] = allocate("d")  # takes the page of b's token, and what is free beside c's end
    assert head_pages(held["d"], "d") < {8 * (held["c"].slots[-1] // 8) + i for i in range(8)}
    for key in "acd":
        cache.free(held[key], [0])
    assert cache.num_used == 0
    assert cache.allocate(None, range(24), 24) is not None, "everything that is idle makes room"


def test_a_deadline_ends_a_request_where_it_stands():
    scheduler = Scheduler(FakeEngine(1), 4)
    scheduler.submit(Request("runs", (1,), max_tokens=30, deadline=5.0))
    scheduler.submit(Request("waits", (1,), max_tokens=30, deadline=4.0))
    scheduler.submit(Request("has time", (1,), max_tokens=3))
    events = [event for now in range(5) for event in scheduler.step(now)]
    assert events[-1] != Finished("runs", "deadline") and Finished("waits", "deadline") in events
    assert len(answers(events)["runs"]) == 4
    assert Finished("runs", "deadline") in scheduler.step(5.0)
    assert answers(finish(scheduler)) == {"has time": alone(Request("", (1,), max_tokens=3))}


def test_a_long_prompt_does_not_stop_the_others():
    engine = FakeEngine(2, max_length=1100)
    scheduler = Scheduler(engine, 4, max_num_batched_tokens=20)
    scheduler.submit(Request("short", (1,), max_tokens=60))
    scheduler.step()
    scheduler.submit(Request("long", tuple(i % 5 for i in range(1001)), max_tokens=2))
    during = []
    while "long" not in answers(during):
        during += scheduler.step()
        assert len(during) < 1000
    assert len(answers(during)["short"]) == math.ceil(1000 / 20) + 1  # its first token is seen a step late


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ()}, "empty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": (1,) * 30, "max_tokens": 8, "prefix": PREFIXES[1]}, "41 positions .3 of the cartridge . 30"),
        ({"prompt": (1,) * 28, "max_tokens": 5, "prefix": PREFIXES[1]}, "10 pages of 4 positions and the engine has 9"),
    ],
)
def test_what_can_never_run_is_refused(change, words):
    scheduler = Scheduler(FakeEngine(num_pages=9), 4)
    with pytest.raises(UserError, match=words):
        scheduler.submit(replace(Request("x", (1, 2)), **change))
    assert not scheduler.has_work


def test_the_longest_request_that_fits_runs():
    engine = FakeEngine(1)
    scheduler = Scheduler(engine, 4)
    scheduler.submit(Request("x", (1,) * 30, PREFIXES[1], max_tokens=7))
    assert len(answers(finish(scheduler))["x"]) == 7


def test_the_queue_is_bounded_beyond_what_runs_at_once():
    scheduler = Scheduler(FakeEngine(2), 1)
    for i in range(3):
        scheduler.submit(Request(str(i), (1,)))
    with pytest.raises(QueueFull):
        scheduler.submit(Request("3", (1,)))
    scheduler.step()
    with pytest.raises(QueueFull):
        scheduler.submit(Request("3", (1,)))
    scheduler.cancel("0")
    scheduler.submit(Request("3", (1,)))


def test_an_id_is_used_once_at_a_time():
    scheduler = Scheduler(FakeEngine(), 4)
    scheduler.submit(Request("x", (1,)))
    with pytest.raises(UserError, match="in use"):
        scheduler.submit(Request("x", (1,)))
    finish(scheduler)
    scheduler.submit(Request("x", (1,)))


def test_cancelling_half_a_prompt_makes_room_and_keeps_what_is_written():
    engine = FakeEngine(1)
    scheduler = Scheduler(engine, 4, max_num_batched_tokens=4)
    request = Request("x", tuple(range(7)) * 3, max_tokens=2)
    scheduler.submit(request)
    scheduler.step()
    scheduler.cancel("x")
    assert scheduler.has_work, "the end has still to be told"
    assert scheduler.step() == [Finished("x", "cancelled")] and not scheduler.has_work
    scheduler.submit(replace(request, id="y"))
    events = finish(scheduler)
    assert cached(events) == {"y": 4} and answers(events)["y"] == alone(request)
