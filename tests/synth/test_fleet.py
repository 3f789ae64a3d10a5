"""Several servers as one: where calls go, how they are tried again, and when they end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from stub_server import MODEL, StubServer

from synth import endpoint
from synth.clients.base import Completion, Refused, Unavailable
from synth.config import ClientConfig, SamplingConfig
from synth.fleet import Fleet, Route


def use(servers: list[StubServer], action: Callable[[Fleet], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        urls = tuple(server.url for server in servers)
        defaults = {"timeout_seconds": 1.0, "max_retries": 3}
        async with Fleet(ClientConfig(urls, **{"model": MODEL} | defaults | settings)) as fleet:
            return await action(fleet)

    return asyncio.run(run())


async def ask(route: Route, number: int = 0) -> Completion:
    return await route.complete([{"role": "user", "content": f"hello {number}"}], SamplingConfig(), number)


async def ask_many(fleet: Fleet, routes: int, calls: int) -> list[Completion]:
    made = [fleet.route() for _ in range(routes)]
    return await asyncio.gather(*(ask(route, i) for i in range(calls) for route in made))


def numbers(server: StubServer) -> set[str]:
    return {body["messages"][0]["content"] for body in server.requests}


@pytest.mark.parametrize("fault", [408, 429, 500, 503, "drop", "hang", "broken", "short", "empty"])
def test_passing_faults_are_tried_again_counted_and_logged(
    server: StubServer, fault: Any, caplog: pytest.LogCaptureFixture
):
    server.faults.extend([fault, fault])

    async def action(fleet: Fleet) -> int:
        assert (await ask(fleet.route())).text
        return sum(fleet.errors.values())

    assert use([server], action, timeout_seconds=0.3 if fault == "hang" else 10.0) == 2
    assert len(server.requests) == 3
    assert "retry 1 of 3" in caplog.text


def test_a_thousand_failures_are_a_few_lines(
    servers: list[StubServer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "OPEN_AFTER", 10_000)
    for server in servers:
        server.next_fault = lambda: 500

    async def action(fleet: Fleet) -> list[Any]:
        return await asyncio.gather(*(ask(fleet.route(), i) for i in range(100)), return_exceptions=True)

    assert all(
        isinstance(failure, Unavailable) for failure in use(servers, action, max_retries=2, timeout_seconds=60.0)
    )
    assert sum("retry" in record.message for record in caplog.records) <= len(servers)


def test_retries_end(server: StubServer):
    server.faults.extend([500] * 10)
    with pytest.raises(Unavailable, match=r"HTTP 500: no thanks; that was attempt 3, the last") as caught:
        use([server], lambda fleet: ask(fleet.route()), max_retries=2)
    assert caught.value.kind == "http 500"
    assert len(server.requests) == 3


def test_a_refusal_is_raised_at_once(server: StubServer):
    server.faults.append(400)
    with pytest.raises(Refused, match="HTTP 400: no thanks"):
        use([server], lambda fleet: ask(fleet.route()))
    assert len(server.requests) == 1


def test_retry_after_is_honoured(server: StubServer):
    server.faults.append((429, {"Retry-After": "1"}))
    times: list[float] = []
    server.next_fault = lambda: times.append(time.monotonic()) or (server.faults.popleft() if server.faults else None)

    async def action(fleet: Fleet) -> None:
        route = fleet.route()
        await ask(route)
        assert await ask(route)

    use([server], action)
    assert times[1] - times[0] >= 0.98


def test_work_goes_to_another_server_while_one_asks_for_a_pause(servers: list[StubServer]):
    paused = servers[0]
    paused.next_fault = lambda: (503, {"Retry-After": "60"})
    start = time.monotonic()
    made = use(servers, lambda fleet: ask_many(fleet, 6, 4))
    assert len(made) == 24 and time.monotonic() - start < 30
    assert len(paused.requests) <= 8


def test_the_deadline_is_for_all_attempts_together(server: StubServer):
    server.next_fault = lambda: "hang"
    start = time.monotonic()
    with pytest.raises(Unavailable):
        use([server], lambda fleet: ask(fleet.route()), timeout_seconds=0.3, max_retries=99, deadline_seconds=3.0)
    assert 2.5 < time.monotonic() - start < 10
    assert len(server.requests) >= 2
    with pytest.raises(Unavailable, match=r"gave no answer in 0\.2 s, all attempts together"):
        use([server], lambda fleet: ask(fleet.route()), deadline_seconds=0.2)


def test_a_fleet_that_is_gone_is_waited_for_until_the_deadline(
    servers: list[StubServer], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(endpoint, "FIRST_OPEN_SECONDS", 60.0)
    monkeypatch.setattr(endpoint, "LONGEST_OPEN_SECONDS", 60.0)
    for server in servers:
        server.next_fault = lambda: "drop"

    async def action(fleet: Fleet) -> list[Any]:
        made = (ask(fleet.route(), i) for i in range(40))
        return await asyncio.gather(*made, return_exceptions=True)

    start = time.monotonic()
    failures = use(servers, action, max_retries=99, deadline_seconds=1.0)
    assert time.monotonic() - start < 10
    assert all(isinstance(failure, Unavailable) for failure in failures)
    assert any("was there for 1 s" in str(failure) for failure in failures)


def test_a_route_keeps_to_one_server_and_routes_spread(servers: list[StubServer]):
    for server in servers:
        server.latency = 0.01

    async def action(fleet: Fleet) -> None:
        async def chunk(number: int) -> None:
            route = fleet.route()
            await asyncio.gather(*(ask(route, number) for _ in range(8)))
            await asyncio.gather(*(ask(route, number) for _ in range(8)))

        await asyncio.gather(*(chunk(i) for i in range(12)))

    use(servers, action, timeout_seconds=60.0)
    seen = [numbers(server) for server in servers]
    assert sum(map(len, seen)) == 12, "no chunk is at two servers"
    assert min(map(len, seen)) >= 2


def test_work_moves_off_a_dead_server_and_back(servers: list[StubServer], caplog: pytest.LogCaptureFixture):
    dead = servers[1]
    dead.next_fault = lambda: "drop"

    async def action(fleet: Fleet) -> None:
        await ask_many(fleet, 12, 10)
        assert len(dead.requests) < 60, "tried now and then, no more"
        dead.next_fault = lambda: None
        while not caplog.text.count("answers again"):
            await ask(fleet.route())
            await asyncio.sleep(0.01)
        before = len(dead.requests)
        await ask_many(fleet, 12, 10)
        assert len(dead.requests) - before > 20

    with caplog.at_level(logging.WARNING):
        use(servers, action)


def test_a_busy_server_gets_less_at_once(server: StubServer):
    server.latency = 0.01
    # it takes four calls at once and refuses a fifth
    server.next_fault = lambda: 429 if server.in_flight > 4 else None

    async def action(fleet: Fleet) -> list[Completion]:
        made = await ask_many(fleet, 8, 12)
        server.most_in_flight = 0
        await ask_many(fleet, 8, 2)
        return made

    assert len(use([server], action, max_retries=50)) == 96
    assert server.most_in_flight <= 8


def test_check(servers: list[StubServer], caplog: pytest.LogCaptureFixture):
    async def check(fleet: Fleet) -> None:
        await fleet.check()
        assert (await ask(fleet.route())).text

    use(servers, check)
    with pytest.raises(Refused, match="does not serve 'gpt'"):
        use(servers, check, model="gpt")
    gone = StubServer().start()
    gone.stop()
    use([gone, servers[0]], check)
    assert f"no inference server answers at {gone.url}" in caplog.text
    with pytest.raises(Unavailable, match="no inference server answers"):
        use([gone], check)
