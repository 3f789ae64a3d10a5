from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any

import pytest
from stub_server import MODEL, WORDS, StubServer

from synth.clients.base import Busy, Completion, Refused, Unavailable
from synth.clients.openai import OpenAIClient
from synth.config import ClientConfig, SamplingConfig

MESSAGES = [{"role": "user", "content": "hello"}]


def use(url: str, action: Callable[[OpenAIClient], Awaitable[Any]], **settings: Any) -> Any:
    async def run() -> Any:
        config = ClientConfig(url, **{"model": MODEL, "timeout_seconds": 0.5} | settings)
        async with OpenAIClient(config, url) as client:
            return await action(client)

    return asyncio.run(run())


def ask(server: StubServer, top_logprobs: int = 3, **settings: Any) -> Completion:
    return use(server.url, lambda c: c.complete(MESSAGES, SamplingConfig(), 1, top_logprobs), **settings)


@pytest.mark.parametrize("ids", ["token_id:N", "id", "token_id"])
def test_token_ids_in_every_dialect(server: StubServer, ids: str):
    server.ids = ids
    completion = ask(server)
    assert completion.token_ids == tuple(WORDS + int(word[1:]) for word in completion.text.split())
    assert completion.top_logprobs is not None and len(completion.top_logprobs) == len(completion.token_ids)
    assert completion.top_logprobs[0][:2] == ((completion.token_ids[0], -0.5), (completion.token_ids[0] + 1, -1.5))
    assert (completion.finish_reason, completion.prompt_tokens) == ("stop", 7)


def test_end_of_turn_token_without_logprobs(server: StubServer):
    server.end_of_turn = True
    completion = ask(server)
    assert completion.token_ids is not None and completion.top_logprobs is not None
    assert len(completion.token_ids) == len(completion.top_logprobs) + 1


def test_a_server_without_token_ids_is_refused(server: StubServer):
    server.ids = "none"
    with pytest.raises(Refused, match="gives no token ids"):
        ask(server)


def test_questions_ask_for_no_logprobs(server: StubServer):
    assert ask(server, top_logprobs=0).top_logprobs is None
    assert "logprobs" not in server.requests[0]


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (408, "timeout"),
        (500, "http 500"),
        ("drop", "connection"),
        ("hang", "timeout"),
        ("broken", "broken reply"),
        ("short", "broken reply"),
        ("empty", "broken reply"),
    ],
)
def test_a_passing_fault_is_one_attempt_and_told_by_its_kind(server: StubServer, fault: Any, kind: str):
    server.faults.append(fault)
    with pytest.raises(Unavailable) as caught:
        ask(server)
    assert caught.value.kind == kind and not isinstance(caught.value, Busy)
    assert len(server.requests) == 1
    assert ask(server).text


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("header", "least", "most"),
    [({}, 0, 0), ({"Retry-After": "7.5"}, 7.5, 7.5), ({"Retry-After": "soon"}, 0, 0), ({"Retry-After": None}, 2, 5)],
)
def test_a_busy_server_says_when(server: StubServer, status: int, header: dict[str, Any], least: float, most: float):
    date = formatdate(time.time() + 4, usegmt=True)
    server.faults.append((status, {name: value or date for name, value in header.items()}))
    with pytest.raises(Busy, match=f"HTTP {status}: no thanks") as caught:
        ask(server)
    assert caught.value.kind == f"http {status}"
    assert least <= caught.value.retry_after <= most


def test_other_refusals_are_raised_at_once(server: StubServer):
    server.faults.append(400)
    with pytest.raises(Refused, match="HTTP 400: no thanks"):
        ask(server)
    assert len(server.requests) == 1


def test_check(server: StubServer):
    use(server.url, lambda c: c.check())
    with pytest.raises(Refused, match=r"does not serve 'gpt', it serves stub, other"):
        use(server.url, lambda c: c.check(), model="gpt")
    with pytest.raises(Refused, match="HTTP 404"):
        use(server.root, lambda c: c.check())
    with pytest.raises(Unavailable, match=r"no inference server answers at http://127\.0\.0\.1:9/v1: start one with"):
        use("http://127.0.0.1:9/v1", lambda c: c.check())


@pytest.mark.parametrize("llama_cpp", [False, True])
def test_tokenizer_of_the_server(server: StubServer, llama_cpp: bool):
    server.llama_cpp = llama_cpp

    async def there_and_back(client: OpenAIClient) -> str:
        return await client.detokenize(await client.tokenize("Grüße"))

    assert use(server.url, there_and_back) == "Grüße"


def test_a_server_without_a_tokenizer(server: StubServer):
    with pytest.raises(Refused, match=r"/v1/x/tokenize .*: set config\.chunker\.tokenizer"):
        use(f"{server.url}/x", lambda c: c.tokenize("a"))
