"""Concurrency that adapts, and a circuit breaker that opens and tries again, in time that the test tells."""

from __future__ import annotations

import asyncio
import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth.endpoint import FIRST_LIMIT, LONGEST_OPEN_SECONDS, OPEN_AFTER, Endpoint

STEPS = ("begin", "ok", "busy", "silence", "fault", "left", "later")


def endpoint() -> Endpoint:
    return Endpoint("http://stub", random.Random(0))


def simulate(one: Endpoint, capacity: int, demand: int, calls: int, refuse_above: int = 10**9) -> list[int]:
    """A server that does `capacity` calls at once as fast as one; how many were in flight as each call began."""
    now, left, history = 1.0, calls, []
    ends: list[tuple[float, int, object]] = []
    while left or ends:
        while left and one.in_flight < demand and one.has_room(now, called=True):
            permit = one.acquire(now)
            is_refused = one.in_flight > refuse_above
            seconds = 0.01 if is_refused else max(1.0, one.in_flight / capacity)
            heapq.heappush(ends, (now + seconds, left, (permit, is_refused)))
            left -= 1
            history.append(one.in_flight)
        now, _, (permit, is_refused) = heapq.heappop(ends)
        if is_refused:
            one.failed(permit, now, "busy")
        else:
            one.succeeded(permit, now, tokens=10)
        if not one.is_ready(now) and not ends:
            now = one.half_open_at
    return history


def test_it_grows_while_latency_holds_and_then_stays():
    history = simulate(endpoint(), capacity=100, demand=10_000, calls=8000)
    assert history[: int(FIRST_LIMIT)] == list(range(1, int(FIRST_LIMIT) + 1))
    assert 100 <= max(history[-1000:]) <= 300, "room for all that run at once, not for a long queue"


def test_it_does_not_grow_beyond_what_is_asked():
    one = endpoint()
    simulate(one, capacity=1000, demand=20, calls=5000)
    assert one.limit <= 2 * FIRST_LIMIT


def test_it_keeps_below_what_the_server_refuses():
    one = endpoint()
    history = simulate(one, capacity=10_000, demand=10_000, calls=20_000, refuse_above=50)
    late = history[-5000:]
    assert 20 < sum(late) / len(late) <= 51
    assert sum(n > 50 for n in late) < 0.05 * len(late)


def test_many_failures_of_one_moment_halve_once():
    one = endpoint()
    permits = [one.acquire(1.0) for _ in range(16)]
    for i, permit in enumerate(permits[:4]):
        one.failed(permit, 2.0 + i / 10, "busy")
    assert one.limit == FIRST_LIMIT / 2
    one.failed(one.acquire(3.0), 3.1, "busy")
    assert one.limit == FIRST_LIMIT / 4
    for i in range(20):
        one.succeeded(one.acquire(4.0), 4.1, tokens=1)
        one.failed(one.acquire(5.0 + i), 5.0 + i, "silence")
    assert one.limit == 1 and one.has_room(100.0, called=False) is (one.in_flight == 0)


def test_retry_after_pauses_it():
    one = endpoint()
    one.failed(one.acquire(1.0), 2.0, "busy", retry_after=7.0)
    assert not one.is_ready(8.9) and not one.is_half_open(9.1) and one.is_ready(9.1)


def test_a_dead_server_gets_no_calls_and_is_tried_by_one_call_at_a_time():
    one = endpoint()
    now, waits = 1.0, []
    for _ in range(OPEN_AFTER):
        assert one.is_ready(now)
        one.failed(one.acquire(now), now, "fault")
    for _ in range(8):
        assert not one.is_ready(now) and not one.is_half_open(now)
        waits.append(one.half_open_at - now)
        now = one.half_open_at
        assert one.is_half_open(now)
        trial = one.acquire(now)
        assert one.is_trying and not one.is_half_open(now) and not one.has_room(now, called=True)
        one.failed(trial, now, "fault")
    assert waits[3] > 2 * waits[0] and max(waits) <= LONGEST_OPEN_SECONDS
    now = one.half_open_at
    one.succeeded(one.acquire(now), now, tokens=0)
    assert one.is_ready(now) and not one.is_trying and one.in_flight == 0


def test_what_began_before_it_opened_does_not_open_it_longer():
    one = endpoint()
    for permit in [one.acquire(1.0) for _ in range(16)]:
        one.failed(permit, 2.0, "fault")
    assert one.half_open_at - 2.0 <= 1.0


@given(st.lists(st.sampled_from(STEPS), max_size=200), st.randoms())
def test_counts_hold_whatever_happens(steps: list[str], rng: random.Random):
    one, now, out = endpoint(), 1.0, []
    for step in steps:
        now += 0.3
        if step == "later":
            now += 40
        elif step == "begin":
            if one.has_room(now, called=True):
                out.append(one.acquire(now))
        elif out:
            permit = out.pop(rng.randrange(len(out)))
            if step == "ok":
                one.succeeded(permit, now, rng.randrange(3))
            elif step == "left":
                one.release(permit)
            else:
                one.failed(permit, now, step, retry_after=rng.choice((0.0, 5.0)))
        assert one.in_flight == len(out) and one.limit >= 1
        assert one.is_trying == any(permit.is_trial for permit in out)
    # whatever happened, it can always be used again
    for permit in out:
        one.release(permit)
    now = max(now, one.half_open_at)
    assert one.has_room(now, called=True)
    one.succeeded(one.acquire(now), now, 1)
    assert one.is_ready(now)


def test_the_line_moves_in_order_and_a_turn_that_nobody_takes_goes_on():
    async def run() -> list[int]:
        one, served = endpoint(), []
        permits = [one.acquire(0.0) for _ in range(int(FIRST_LIMIT))]
        assert not one.has_room(0.0, called=False)

        async def stand(number: int) -> None:
            await one.wait()
            served.append(number)
            permits.append(one.acquire(0.0))

        waiting = [asyncio.create_task(stand(i)) for i in range(6)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.sleep(0)
        one.release(permits.pop())
        waiting[0].cancel()  # it was called at this moment
        for _ in range(4):
            await asyncio.sleep(0)
        assert served == [2]
        one.release(permits.pop())
        await asyncio.sleep(0)
        for task in waiting[4:]:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return served

    assert asyncio.run(run()) == [2, 3]


def test_those_in_line_look_elsewhere_when_it_opens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("synth.endpoint.FIRST_OPEN_SECONDS", 30.0)

    async def run() -> None:
        one = endpoint()
        permits = [one.acquire(0.0) for _ in range(int(FIRST_LIMIT))]
        waiting = [asyncio.create_task(one.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        for permit in permits[:OPEN_AFTER]:
            one.failed(permit, 1.0, "fault")
        await asyncio.wait_for(asyncio.gather(*waiting), 20)

    asyncio.run(run())


@pytest.mark.parametrize("called", [False, True])
def test_nobody_overtakes_those_in_line(called: bool):
    async def run() -> bool:
        one = endpoint()
        permits = [one.acquire(0.0) for _ in range(int(FIRST_LIMIT))]
        waiting = [asyncio.create_task(one.wait()) for _ in range(2)]
        await asyncio.sleep(0)
        one.release(permits.pop())
        room = one.has_room(0.0, called)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return room

    assert asyncio.run(run()) is called
