"""What a server may answer instead of an answer: too little, another model, another host, too much, or nonsense."""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import itertools
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import tiny
from aiohttp import web
from client_servers import SGLang, Tokasaurus, served
from stub_server import MODEL, StubServer

from cartridges_jax.command_line.addresses import basic_login, without_credentials
from cartridges_jax.command_line.errors import UserError
from synth import conversation, pipeline
from synth.clients import http
from synth.clients.base import Client, Completion, Refused, Unavailable, check_same_model
from synth.clients.factory import connect
from synth.clients.local import ChatTokenizer
from synth.config import ClientConfig, SamplingConfig, SynthConfig
from synth.conversation import Conversation, Message, flatten

MESSAGES = [{"role": "user", "content": "the cat"}]
GREEDY = SamplingConfig(temperature=0.0)
MakeConfig = Callable[..., SynthConfig]
Change = Callable[[dict[str, Any]], None]


def make(config: SynthConfig) -> list[Conversation]:
    return conversation.read(asyncio.run(pipeline.synthesize(config)))


def altered(server: StubServer, change: Change, when: Callable[[int], bool] = lambda number: True) -> None:
    """`change` is made to the reply to an answer's request, by its number."""
    answer, number = server._answer, -1

    def altered_answer(body: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        reply = answer(body)
        if body.get("logprobs"):
            number += 1
            if when(number):
                change(reply)
        return reply

    server._answer = altered_answer  # type: ignore[method-assign]


def entries(reply: dict[str, Any]) -> list[dict[str, Any]]:
    return reply["choices"][0]["logprobs"]["content"]


def fewer(count: int) -> Change:
    return lambda reply: [entry.update(top_logprobs=entry["top_logprobs"][:count]) for entry in entries(reply)] and None


LACKING: dict[str, tuple[Change, str]] = {
    "2 of 5": (
        fewer(2),
        r"gives 2 alternatives to a token and not the 5 .* --max-logprobs .* set config\.top_logprobs to 2",
    ),
    "none": (fewer(0), r"gives 0 alternatives to a token and not the 5 of config\.top_logprobs: start vLLM"),
    "no logprobs": (lambda reply: reply["choices"][0].pop("logprobs"), "the server gives no logprobs: vLLM"),
    "empty logprobs": (lambda reply: entries(reply).clear(), "the server gives no logprobs: vLLM"),
    "no ids": (
        lambda reply: [alternative.update(token="x") for e in entries(reply) for alternative in e["top_logprobs"]],
        "gives no token ids with its logprobs",
    ),
    "another model": (
        lambda reply: reply.update(model="big"),
        r"answers as 'big', but config\.client\.model is 'stub'",
    ),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_server_that_is_not_what_was_asked_for_stops_synthesis_at_once(
    server: StubServer, make_config: MakeConfig, case: str
):
    change, sentence = LACKING[case]
    altered(server, change)
    config = make_config(num_conversations=40, max_chunks_in_flight=1, conversations_per_chunk=1)
    with pytest.raises(Refused, match=sentence) as caught:
        make(config)
    assert "\n" not in str(caught.value)
    assert len(server.requests) <= 4, "a question, and an answer that was asked for twice at most"
    assert not list(Path(config.output_dir).glob("**/*.parquet"))


ODD: dict[str, Change] = {name: change for name, (change, _) in LACKING.items() if name != "another model"} | {
    "short rows": lambda reply: entries(reply)[0].update(top_logprobs=[]),
    "an id below 0": lambda reply: reply["choices"][0]["token_ids"].__setitem__(0, -1),
    "an id beyond int32": lambda reply: entries(reply)[0]["top_logprobs"][0].update(token=f"token_id:{2**31}"),
    "a huge id": lambda reply: entries(reply)[0]["top_logprobs"][0].update(token="token_id:" + "9" * 5000),
    "an id twice": lambda reply: entries(reply)[0]["top_logprobs"].__setitem__(1, entries(reply)[0]["top_logprobs"][0]),
    "a log-probability above 0": lambda reply: entries(reply)[0]["top_logprobs"][0].update(logprob=0.5),
    "an infinite one": lambda reply: entries(reply)[0]["top_logprobs"][0].update(logprob=float("inf")),
    "a text of parts": lambda reply: reply["choices"][0]["message"].update(content=[{"text": "a"}]),
    "a reason that is none": lambda reply: reply["choices"][0].update(finish_reason=["stop"]),
    "usage in words": lambda reply: reply.update(usage={"prompt_tokens": "many", "completion_tokens": "few"}),
    "usage that overflows": lambda reply: reply.update(usage={"prompt_tokens": 10**400}),
    "usage that is infinite": lambda reply: reply.update(usage={"prompt_tokens": float("inf")}),
}


@pytest.mark.parametrize("case", ODD)
def test_no_single_odd_reply_ends_a_run(
    server: StubServer, make_config: MakeConfig, case: str, caplog: pytest.LogCaptureFixture
):
    expected = make(make_config(output_dir=make_config().output_dir + "-clean"))
    for when in (0, 3):  # the first of all answers, and a later one
        altered(server, ODD[case], lambda number, when=when: number == when)
        with caplog.at_level(logging.WARNING):
            made = make(make_config(output_dir=make_config().output_dir + f"-{when}"))
        assert made == expected
        assert "retry 1 of 3" in caplog.text


def test_a_conversation_that_gets_odd_replies_only_is_counted_as_failed(server: StubServer, make_config: MakeConfig):
    victim = make(make_config(output_dir=make_config().output_dir + "-clean"))[4].messages[0].content
    answer = server._answer

    def odd(body: dict[str, Any]) -> dict[str, Any]:
        reply = answer(body)
        if body.get("logprobs") and body["messages"][-1]["content"] == victim:
            entries(reply).clear()
        return reply

    server._answer = odd  # type: ignore[method-assign]
    config = make_config(max_chunks_in_flight=1)
    with pytest.raises(Unavailable, match=r"1 of 10 conversations are missing, 1 failed .* gives no logprobs"):
        make(config)
    server._answer = answer  # type: ignore[method-assign]
    assert len(make(config)) == 10


def test_a_request_that_a_server_rejects_ends_no_run(server: StubServer, make_config: MakeConfig):
    """A prompt beyond the window, say, is one conversation's matter; a wrong key is everyone's."""
    config = make_config(max_chunks_in_flight=1, conversations_per_chunk=1)
    faults = iter([None] * 8 + [400] * 4)
    server.next_fault = lambda: next(faults, None)
    with pytest.raises(Unavailable, match=r"1 of 10 conversations are missing, 1 failed .*HTTP 400: no thanks"):
        make(config)
    faults = iter([401])
    with pytest.raises(Refused, match="HTTP 401: no thanks"):
        make(config)


@pytest.mark.parametrize("odd", [{}, {"prompt": None}, {"prompt": 7}, {"error": "restarting"}], ids=str)
def test_no_single_odd_reply_of_a_tokenizer_ends_a_run(
    server: StubServer, make_config: MakeConfig, odd: dict[str, Any]
):
    """It is asked for the text of every chunk, and whether ids spell an answer's."""
    for when in (1, 2, 5):
        expected = make(make_config(output_dir=make_config().output_dir + f"-clean-{when}"))
        numbers = itertools.count()
        server.spelt = lambda reply, when=when, numbers=numbers: odd if next(numbers) == when else reply
        assert make(make_config(output_dir=make_config().output_dir + f"-{when}")) == expected
        server.spelt = lambda reply: reply


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_no_single_refusal_of_a_server_that_has_served_ends_a_run(
    server: StubServer, make_config: MakeConfig, status: int
):
    """What stands before a server restarts, or takes a call for an attack."""
    one_by_one = {"max_chunks_in_flight": 1, "conversations_per_chunk": 1}
    expected = make(make_config(output_dir=make_config().output_dir + "-clean", **one_by_one))
    faults = iter([None] * 8 + [status])
    server.next_fault = lambda: next(faults, None)
    assert make(make_config(**one_by_one)) == expected


@pytest.mark.parametrize(
    ("named", "model", "same"),
    [
        (None, "m", True),
        ("", "m", True),
        (7, "m", True),
        ("Org/Tiny", "org/tiny", True),
        ("tiny", "org/Tiny", True),
        ("/models/org/Tiny", "org/tiny", True),
        ("smollm2-hf@main", "/x/smollm2-hf", True),
        ("./smollm2.gguf", "smollm2", True),
        ("gpt-4o-2024-08-06", "gpt-4o", True),
        ("llama3:latest", "llama3", True),
        ("tiny:manual", "tiny:manual", True),
        ("gpt-4o-mini", "gpt-4o", False),
        ("tiny", "tiny:manual", False),
        ("tiny:other", "tiny:manual", False),
        ("a/tiny", "b/tiny", False),
        ("Qwen3-8B", "Qwen3-4B", False),
    ],
)
def test_which_names_contradict_the_configs(named: Any, model: str, same: bool):
    if same:
        check_same_model(named, model)
    else:
        with pytest.raises(Refused, match="another model's answers would be mixed in"):
            check_same_model(named, model)


@pytest.mark.parametrize("root", ["/models/one", None])
def test_a_server_may_answer_with_the_first_of_its_names(root: str | None):
    """vLLM with several --served-model-name."""

    async def models(_: Any) -> web.Response:
        return web.json_response({"data": [{"id": "one", "root": root}, {"id": "two", "root": root}]})

    async def chat(_: Any) -> web.Response:
        choice = {"message": {"content": "Why?"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "model": "one"})

    routes = {"/v1/models": models, "/v1/chat/completions": chat}
    if root:
        assert ask(routes, model="two").text == "Why?"
    else:
        with pytest.raises(Refused, match="answers as 'one'"):
            ask(routes, model="two")


def test_ours_lists_the_model_and_serves_its_cartridges(server: StubServer):
    async def check(model: str) -> None:
        async with connect(ClientConfig(server.url, model), server.url) as client:
            await client.check()

    asyncio.run(check(f"{MODEL}:manual"))
    with pytest.raises(Refused, match="does not serve 'big:manual'"):
        asyncio.run(check("big:manual"))


def ask(routes: dict[str, Any], top_logprobs: int = 0, path: str = "/v1", **settings: Any) -> Completion:
    async def run() -> Any:
        async with served(routes) as root:
            config = ClientConfig(root + path, **{"model": MODEL, "timeout_seconds": 30.0} | settings)
            async with connect(config, config.urls[0]) as client:
                return await client.complete(MESSAGES, GREEDY, 1, top_logprobs)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["openai", "openai_api", "sglang", "tokasaurus"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_is_sent_to_where_a_server_leads(server: StubServer, kind: str, status: int):
    seen: list[web.Request] = []

    async def run() -> None:
        other = web.Application()

        async def listen(request: web.Request) -> web.Response:
            seen.append(request)
            return web.json_response({})

        other.router.add_route("*", "/{path:.*}", listen)
        runner = web.AppRunner(other)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        elsewhere = f"http://u:secret@127.0.0.1:{runner.addresses[0][1]}/v1"

        async def lead(_: Any) -> web.Response:
            return web.Response(status=status, headers={"Location": elsewhere})

        paths = ("/v1/models", "/v1/chat/completions", "/generate", "/custom/synchronous-batch-completions")
        async with served(dict.fromkeys(paths, lead)) as root:
            tokenizer = str(tiny.folder()) if kind == "sglang" else None
            config = ClientConfig(f"{root}/v1", MODEL, kind, api_key="k", tokenizer=tokenizer)  # pyrefly: ignore
            async with connect(config, config.urls[0]) as client:
                for call in (client.check(), client.complete(MESSAGES, GREEDY, 1)):
                    with pytest.raises(Refused, match=r"leads to http://127\.0\.0\.1:\d+/v1, where nothing was sent"):
                        await call
        await runner.cleanup()

    asyncio.run(run())
    assert not seen


@pytest.mark.parametrize("packed", [True, False])
def test_a_reply_has_a_largest_size_also_unpacked(packed: bool, monkeypatch: pytest.MonkeyPatch):
    if not packed:
        monkeypatch.setattr(http, "LARGEST_REPLY", 2**20)
    size = http.LARGEST_REPLY + 1
    data = b'{"choices": "' + bytes(size).replace(b"\0", b"x") + b'"}'
    body = gzip.compress(data, 1) if packed else data

    async def chat(_: Any) -> web.Response:
        return web.Response(body=body, headers={"Content-Encoding": "gzip"} if packed else {})

    with pytest.raises(Unavailable, match=r"gave a reply of more than \d+ bytes") as caught:
        ask({"/v1/chat/completions": chat})
    assert caught.value.kind == "broken reply"


@pytest.mark.parametrize(
    "reply",
    [
        *(b"[" * 100_000, b'{"choices": ' + b"[" * 900 + b"]" * 900 + b"}", b"\xff\xfe", b"NaN", b"9" * 5000),
        *(b'"a"', b"{}", b'{"choices": []}', b'{"choices": [1]}'),
        *(b'{"choices": [{"message": "x"}]}', b'{"choices": [{"message": {}}]}'),
    ],
)
@pytest.mark.parametrize("status", [200, 400, 429, 500])
def test_replies_that_are_nonsense(reply: bytes, status: int):
    async def chat(_: Any) -> web.Response:
        return web.Response(body=reply, status=status, headers={"Retry-After": "1e999"})

    try:
        assert ask({"/v1/chat/completions": chat}).text == ""
    except (Unavailable, Refused) as error:
        assert len(str(error)) < 700
        assert getattr(error, "retry_after", 0.0) <= 600


def test_an_error_page_is_told_in_a_few_words():
    async def chat(_: Any) -> web.Response:
        return web.json_response({"error": {"message": "no " * 100_000}}, status=400)

    with pytest.raises(Refused) as caught:
        ask({"/v1/chat/completions": chat})
    assert len(str(caught.value)) < 500


STRANGE = [
    None,
    True,
    -1,
    0.5,
    10**30,
    2**31,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\x00",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
]


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy with one to three parts anywhere replaced, removed, doubled or exchanged."""
    made = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        node: Any = made
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            what = rng.randrange(4)
            if what == 0:
                node.pop(key)
            elif what == 1 and isinstance(node, list):
                node.append(copy.deepcopy(node[key]))
            elif what == 2 and isinstance(node[key], str):
                node[key] = node[key] + rng.choice(STRANGE[8:11])
            else:
                node[key] = copy.deepcopy(rng.choice(STRANGE))
            break
    return made


@pytest.mark.parametrize("kind", ["openai", "openai_api", "sglang", "tokasaurus"])
def test_whatever_is_wrong_in_a_reply_only_two_kinds_of_errors_leave_a_client(kind: str, tmp_path: Path):
    """And what passes can be written to a dataset and read back."""
    tokenizer, rng = ChatTokenizer(str(tiny.folder())), random.Random(0)
    passed: list[Completion] = []
    failed: list[Exception] = []

    async def attempts(client: Client) -> None:
        top_logprobs = 0 if kind == "openai_api" else 3
        calls: list[Callable[[], Any]] = [lambda: client.complete(MESSAGES, GREEDY, 1, top_logprobs)] * 3
        given = [*MESSAGES, {"role": "assistant", "content": "box 7"}]
        calls += [lambda: client.score(given, 3), client.check, lambda: client.tokenize("a b")]
        calls += [lambda: client.detokenize([1, 2])]
        for _ in range(60):
            for call in calls:
                try:
                    found = await call()
                except (Refused, Unavailable) as error:
                    failed.append(error)
                else:
                    passed.extend([found] if isinstance(found, Completion) else [])

    def wrong(handler: Any) -> Any:
        async def answer(body: Any) -> web.Response:
            response = await handler(body)
            reply = json.loads(response.body)
            return web.json_response(mutated(reply, rng) if rng.random() < 0.8 else reply)

        return answer

    async def run() -> None:
        stub = StubServer()
        speaker = SGLang(tokenizer) if kind == "sglang" else Tokasaurus(tokenizer)
        routes: dict[str, Any] = dict(speaker.routes)
        if kind.startswith("openai"):

            async def chat(body: Any) -> web.Response:
                return web.json_response(_vllm(stub, body))

            async def models(_: Any) -> web.Response:
                return web.json_response({"data": [{"id": MODEL, "root": "/m"}]})

            async def tokenize(body: Any) -> web.Response:
                return web.json_response({"tokens": [1, 2, 3, 9][: 4 if "messages" not in body else 3]})

            async def detokenize(body: Any) -> web.Response:
                return web.json_response({"prompt": "".join(f" w{i - 256}" for i in body["tokens"])})

            routes = {"/v1/models": models, "/v1/chat/completions": chat, "/tokenize": tokenize}
            routes |= {"/detokenize": detokenize}
        async with served({path: wrong(handler) for path, handler in routes.items()}) as root:
            settings = {"sglang": ("tiny", str(tiny.folder())), "tokasaurus": ("org/tiny", str(tiny.folder()))}
            model, source = settings.get(kind, (MODEL, None))
            config = ClientConfig(f"{root}/v1", model, kind, tokenizer=source, timeout_seconds=20)  # pyrefly: ignore
            async with connect(config, config.urls[0]) as client:
                await attempts(client)

    asyncio.run(run())
    assert len(passed) > 10 and len(failed) > 10
    made = [
        Conversation((Message(one.text, "assistant", one.token_ids, flatten(one.top_logprobs or (), 0.99)),), "", {})
        for one in passed
        if one.token_ids is not None
    ]
    conversation.write(tmp_path / "d.parquet", made)
    assert conversation.read(tmp_path / "d.parquet") == made


def _vllm(stub: StubServer, body: dict[str, Any]) -> dict[str, Any]:
    if "prompt_logprobs" in body:
        row = {str(i): {"logprob": -0.5 - i, "rank": i} for i in range(3)}
        return {
            "prompt_token_ids": [1, 2, 5, 9],
            "prompt_logprobs": [None, row, row, row],
            "usage": {"prompt_tokens": 4},
        }
    return stub._answer(body) | {"model": MODEL}


SECRETS = ["secret", "s%40cr%2Fet", "se@cret", "s:e:cret", "%73ecret"]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_password_opens_the_server_and_is_nowhere_else(
    server: StubServer, make_config: MakeConfig, secret: str, caplog: pytest.LogCaptureFixture, capfd: Any
):
    logins: list[str | None] = []
    inner = server._chat

    async def guarded(request: web.Request) -> web.StreamResponse:
        logins.append(request.headers.get("Authorization"))
        return await inner(request)

    server._chat = guarded  # type: ignore[method-assign]
    guarded_server = StubServer()
    guarded_server._chat = guarded  # type: ignore[method-assign]
    guarded_server.faults = server.faults
    guarded_server.start()
    url = guarded_server.url.replace("http://", f"http://ada:{secret}@")
    config = make_config(client=ClientConfig(url, MODEL, timeout_seconds=20.0, max_retries=3))
    server.faults.extend([500, "drop", 429])
    with caplog.at_level(logging.DEBUG):
        assert len(make(config)) == 10
    server.faults.extend([401])
    wider = make_config(client=config.client, num_conversations=12)
    with pytest.raises(Refused) as caught:
        make(wider)
    guarded_server.stop()
    with pytest.raises(Unavailable) as gone:
        make(wider)
    expected = base64.b64encode(f"ada:{unquote(secret)}".encode()).decode()
    assert set(logins) == {f"Basic {expected}"}
    told = f"{caplog.text}{capfd.readouterr()}{caught.value}{gone.value}{config!r}"
    for path in Path(config.output_dir).rglob("*"):
        told += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert guarded_server.url in told
    for piece in (secret, unquote(secret), "ada:", expected):
        assert piece not in told


def test_addresses_and_what_is_in_them():
    assert without_credentials('{"a": "http://u:p@h:1/v1", "b": "https://t@h"}') == (
        '{"a": "http://h:1/v1", "b": "https://h"}'
    )
    assert without_credentials("write to a@b.c or see http://h/@x") == "write to a@b.c or see http://h/@x"
    assert basic_login("http://u:p%40@h/v1") == "Basic dTpwQA==" and basic_login("http://h/v1") is None


@pytest.mark.parametrize(
    "url",
    [
        "u:secret@h/v1",
        "htp://u:secret@h/v1",
        "http://u:sec#ret-secret@h/v1",
        "http://u:a/secret@h",
        "http://u:secret@h:x/v1",
    ],
)
def test_addresses_that_are_none_are_refused_without_what_they_hold(url: str):
    with pytest.raises(UserError, match=r"config\.client\.base_url") as caught:
        ClientConfig(url, "m")
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="an api_key, and a password in its base_url: set one of them"):
        ClientConfig("http://u:p@h/v1", "m", api_key="k")
