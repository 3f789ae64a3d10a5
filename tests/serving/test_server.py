"""The server over real HTTP, with the scheduler tests' engine and a tokenizer of bytes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scheduler import FakeEngine, next_token  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

from cartridges_jax import serve
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving.choices import StopStrings
from cartridges_jax.serving.scheduler import Chunk, Request, Sampled, SequenceInput
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore, UnknownCartridge

END = 256
HELLO = [{"role": "user", "content": "hello"}]


class ByteTokenizer:
    """A token is a byte; one more ends a turn."""

    vocab_size, bos_id, stop_ids = 257, None, frozenset({END})
    template_variables = frozenset({"messages", "add_generation_prompt", "enable_thinking"})
    settings: ClassVar = {"eos_token": "<end>", "chat_template": None}

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [*([END] if add_special_tokens else []), *text.encode()]

    def continued_ids(self, text: str) -> list[int]:
        return self.encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < END else b"<end>"

    def is_special(self, token_id: int) -> bool:
        return token_id == END

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        parts = (bytes([i]) if i < END else b"" if skip_special_tokens else b"<end>" for i in ids)
        return b"".join(parts).decode(errors="replace")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        if messages[0]["role"] == "tool":
            raise UserError("the template knows no role 'tool'")
        text = "".join(f"{m['role'][:1]}:{m['content']}\n" for m in messages)
        if variables and variables["continue_final_message"]:
            return text.removesuffix("\n")
        return text + ("a:" if add_generation_prompt else "") + "<think>" * thinking

    def chat_ids(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        return self.encode(self.render_chat(messages, **options))

    turn_ids = chat_ids  # this template writes no system message of its own


TOKENIZER = cast(Tokenizer, ByteTokenizer())


class ScriptEngine(FakeEngine):
    """Says `script`, whatever it is asked; each step takes `pause` seconds and waits while `gate` is closed."""

    def __init__(self, script: Sequence[int], max_num_seqs: int = 4, max_length: int = 400, pause: float = 0.0):
        super().__init__(max_num_seqs, max_length, vocab=257)
        self.script, self.pause, self.gate = script, pause, threading.Event()
        self.gate.set()
        self.steps = 0

    def decode(self, indices: Sequence[int]) -> list[Sampled]:
        assert self.gate.wait(60)
        time.sleep(self.pause)
        self.steps += 1
        return super().decode(indices)

    def score(self, chunk: Chunk, following: Sequence[int]) -> list[Sampled]:
        super().score(chunk, following)
        return [Sampled(token, -0.5, (0, 1, 2, 3), (-1.0,) * 4) for token in following]

    def _sample(self, sequence: SequenceInput, mask: set[int] | None = None) -> Sampled:
        super()._sample(sequence, mask)
        token, count = self.script[sequence.step % len(self.script)], sequence.top_logprobs
        return Sampled(token, -0.25, (token, 65, 66, 67)[:count], (-0.25, -2.0, -3.0, -4.0)[:count])


class FakeCartridge:
    def __init__(self, path: Path):
        self.content = path.read_text()
        if self.content == "bad":
            raise UserError("made for another model")
        self.num_slots = len(self.content)

    @classmethod
    def compose(cls, parts: Sequence[FakeCartridge]) -> FakeCartridge:
        made = cls.__new__(cls)
        made.content = parts[0].content + "".join(part.content[1:] for part in parts[1:])
        made.num_slots = len(made.content)
        return made


class Client:
    """Talks to one server; `post` and `get` give status and JSON."""

    def __init__(self, session: aiohttp.ClientSession, url: str):
        self.session, self.url = session, url
        self.headers: Mapping[str, str] = {}

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.get(self.url + path, **options) as response:
            self.headers = response.headers
            return response.status, await response.json()

    async def post(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.session.post(self.url + path, **options) as response:
            self.headers = response.headers
            return response.status, await response.json()

    async def chat(self, **fields: Any) -> tuple[int, Any]:
        return await self.post("/v1/chat/completions", json={"messages": HELLO, **fields})

    async def stream(self, **fields: Any) -> list[Any]:
        body = {"messages": HELLO, "stream": True, **fields}
        async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
            assert response.status == 200 and response.content_type == "text/event-stream"
            events = (await response.text()).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""] and all(e.startswith("data: ") for e in events[:-1])
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def serving(
    engine: Any,
    test: Callable[[Client], Awaitable[None]],
    folder: Path | None = None,
    fetch: Callable[[str], Path] | None = None,
    **options: Any,
) -> None:
    """Runs `test` against a server that is started and stopped around it."""

    async def body() -> None:
        store = CartridgeStore(
            folder or Path("no-such-folder"), FakeCartridge, fetch=fetch, compose=FakeCartridge.compose
        )
        sock = serve.bind("127.0.0.1", 0)
        server = Server(engine, TOKENIZER, store, "tiny", rng=random.Random(0), **options)
        runner = await server.start(sock)
        try:
            async with aiohttp.ClientSession() as session:
                await asyncio.wait_for(test(Client(session, f"http://127.0.0.1:{sock.getsockname()[1]}")), 60)
        finally:
            if isinstance(engine, ScriptEngine):
                engine.gate.set()
            await runner.cleanup()
        assert not any(thread.name == "engine" for thread in threading.enumerate())

    asyncio.run(body())


def deltas(chunks: Sequence[Any], index: int = 0) -> list[Any]:
    return [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]


def content(chunks: Sequence[Any], index: int = 0) -> str:
    return "".join(choice["delta"].get("content", "") for choice in deltas(chunks, index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cartridges"
    (folder / "nested").mkdir(parents=True)
    (folder / "manual.safetensors").write_text("five!")
    (folder / "nested" / "cartridge.safetensors").write_text("nine slot")
    (folder / "wrong.safetensors").write_text("bad")
    (folder / "notes.txt").write_text("no")
    (tmp_path / "secret.safetensors").write_text("secret")
    (folder / "escape.safetensors").symlink_to(tmp_path / "secret.safetensors")
    return folder


SAID = [*"Grüße!".encode(), END]


def test_a_whole_answer():
    async def test(client: Client) -> None:
        status, reply = await client.chat(temperature=0, return_token_ids=True)
        prompt = TOKENIZER.chat_ids(HELLO, add_generation_prompt=True)
        assert status == 200 and reply["object"] == "chat.completion" and reply["model"] == "tiny"
        assert reply["prompt_token_ids"] == prompt
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": "Grüße!"}
        assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
        assert choice["token_ids"] == SAID
        assert reply["usage"] == {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(SAID),
            "total_tokens": len(prompt) + len(SAID),
            "prompt_tokens_details": {"cached_tokens": 0, "cartridge_tokens": 0},
        }
        _, again = await client.chat()
        # all but the last token of the prompt, whose decoding begins the answer
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1
        assert "token_ids" not in again["choices"][0] and "prompt_token_ids" not in again

    serving(ScriptEngine(SAID, max_num_seqs=2), test)


def test_a_streamed_answer_is_the_whole_one():
    async def test(client: Client) -> None:
        fields = dict(n=2, return_token_ids=True, logprobs=True, top_logprobs=2, max_tokens=9)
        _, whole = await client.chat(**fields)
        chunks = await client.stream(**fields, stream_options={"include_usage": True})
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2 * len(SAID)
        for choice in whole["choices"]:
            index = choice["index"]
            mine = deltas(chunks, index)
            assert content(chunks, index) == choice["message"]["content"] == "Grüße!"
            assert [i for d in mine for i in d["token_ids"]] == choice["token_ids"]
            entries = [e for d in mine if d["logprobs"] for e in d["logprobs"]["content"]]
            assert entries == choice["logprobs"]["content"]
            assert [d["finish_reason"] for d in mine if d["finish_reason"]] == ["stop"]

    serving(ScriptEngine(SAID), test)


def test_logprobs_have_ids_and_the_stop_token():
    async def test(client: Client) -> None:
        _, reply = await client.chat(logprobs=True, top_logprobs=3)
        entries = reply["choices"][0]["logprobs"]["content"]
        assert [e["token_id"] for e in entries] == SAID
        assert entries[0] == {
            "token": "G",
            "token_id": 71,
            "logprob": -0.25,
            "bytes": [71],
            "top_logprobs": [
                {"token": "G", "token_id": 71, "logprob": -0.25, "bytes": [71]},
                {"token": "A", "token_id": 65, "logprob": -2.0, "bytes": [65]},
                {"token": "B", "token_id": 66, "logprob": -3.0, "bytes": [66]},
            ],
        }
        assert entries[-1]["token"] == "<end>"
        _, reply = await client.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)
        last = reply["choices"][0]["logprobs"]["content"][-1]
        assert last["token"] == last["top_logprobs"][0]["token"] == "token_id:256"
        _, reply = await client.chat(logprobs=True)
        assert reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    serving(ScriptEngine(SAID), test)


def test_length_and_ignored_ends():
    async def test(client: Client) -> None:
        _, reply = await client.chat(max_tokens=3)
        assert reply["choices"][0]["finish_reason"] == "length"
        assert reply["choices"][0]["message"]["content"] == "Gr\ufffd", "half of ü"
        _, reply = await client.chat(max_completion_tokens=13, ignore_eos=True, return_token_ids=True)
        assert reply["choices"][0]["token_ids"] == (SAID * 2)[:13]
        assert reply["choices"][0]["message"]["content"] == "Grüße!Grü"
        _, reply = await client.chat(ignore_eos=True)
        assert reply["usage"]["total_tokens"] == 100, "without max_tokens an answer may be as long as a request"

    serving(ScriptEngine(SAID, max_length=100), test)


def test_an_answer_ends_where_the_model_s_window_does():
    engine = ScriptEngine(SAID, max_length=400)
    engine.max_position_embeddings = 100

    async def test(client: Client) -> None:
        _, reply = await client.chat(ignore_eos=True)
        assert reply["usage"]["total_tokens"] == 100
        _, reply = await client.post("/tokenize", json={"prompt": "hi"})
        assert reply["max_model_len"] == 100

    serving(engine, test)


@pytest.mark.parametrize(
    ("stop", "left"),
    [("def", "abc"), (["xyz", "gh"], "abcdef"), (["cdefgh", "efx"], "ab"), ("fgx", "abcdefghabcdefg"), ("a", "")],
)
def test_no_part_of_a_stop_string_is_shown(stop, left):
    async def test(client: Client) -> None:
        fields = dict(stop=stop, max_tokens=15, logprobs=True, return_token_ids=True)
        _, reply = await client.chat(**fields)
        choice = reply["choices"][0]
        assert choice["message"]["content"] == left == content(await client.stream(**fields))
        assert choice["finish_reason"] == ("length" if left.endswith("g") else "stop")
        assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == reply["usage"]["completion_tokens"]

    serving(ScriptEngine(list(b"abcdefgh")), test)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=4), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_over_any_pieces(pieces, stops):
    held, shown, stopped = StopStrings(tuple(stops)), "", False
    for piece in "".join(pieces):  # one at a time, an answer ends at the first stop string that is complete
        text, stopped = held.push(piece)
        shown += text
        assert not any(stop in shown for stop in stops)
        if stopped:
            break
    said = "".join(pieces)
    ends = [said.find(stop) + len(stop) for stop in stops if stop in said]
    if not ends:
        assert not stopped and shown + held.flush() == said
    else:
        complete = said[: min(ends)]
        assert stopped and shown == min((complete[: -len(s)] for s in stops if complete.endswith(s)), key=len)


def test_seeds():
    async def test(client: Client) -> None:
        fields = dict(temperature=1, max_tokens=20, return_token_ids=True)
        _, reply = await client.chat(n=3, seed=7, **fields)
        answers = [c["token_ids"] for c in reply["choices"]]
        prompt = tuple(reply["prompt_token_ids"])
        wanted = [Request("", prompt, max_tokens=20, seed=7 + i, stop_ids=frozenset({END})) for i in range(3)]
        assert answers == [alone_in_bytes(request) for request in wanted]
        _, one = await client.chat(seed=8, **fields)
        assert one["choices"][0]["token_ids"] == answers[1]
        unseeded = [(await client.chat(**fields))[1]["choices"][0]["token_ids"] for _ in range(2)]
        assert unseeded[0] != unseeded[1]

    serving(FakeEngine(2, max_length=100, vocab=257), test)


def test_several_prompts_are_each_answered_as_alone():
    async def test(client: Client) -> None:
        fields = dict(max_tokens=9, seed=5, return_token_ids=True, ignore_eos=True)
        prompts = ["one", "two", [104, 105]]
        _, reply = await client.post("/v1/completions", json={"prompt": prompts, "n": 2, **fields})
        for i, prompt in enumerate(reply["prompt_token_ids"]):
            for j in range(2):
                wanted = Request("", tuple(prompt), max_tokens=9, seed=5 + j)
                assert reply["choices"][2 * i + j]["token_ids"] == alone_in_bytes(wanted)[:9]
        assert reply["usage"]["prompt_tokens"] == 4 + 4 + 2 and reply["usage"]["completion_tokens"] == 54

    serving(FakeEngine(3, max_length=100, vocab=256), test)


def alone_in_bytes(request: Request) -> list[int]:
    answer: list[int] = []
    while len(answer) < request.max_tokens and END not in answer:
        answer.append(next_token([*request.prompt, *answer], request.seed, len(answer), vocab=257).token)
    return answer


def test_cartridges_by_body_and_by_model(folder):
    async def test(client: Client) -> None:
        _, cartridges = await client.get("/v1/cartridges")
        assert [c["id"] for c in cartridges["data"]] == ["manual", "nested", "wrong"]
        fields = dict(seed=1, max_tokens=8, return_token_ids=True)
        _, plain = await client.chat(**fields)
        _, by_body = await client.chat(cartridges=[{"id": "manual", "source": "local"}], **fields)
        _, by_name = await client.chat(model="tiny:manual", **fields)
        _, both = await client.chat(model="tiny:manual", cartridges=[{"id": "manual"}], **fields)
        _, nested = await client.chat(model="tiny:nested", **fields)
        usages = [
            r["usage"]["prompt_tokens_details"]["cartridge_tokens"] for r in (plain, by_body, by_name, both, nested)
        ]
        assert usages == [0, 5, 5, 5, 9]
        answers = [r["choices"][0]["token_ids"] for r in (plain, by_body, by_name, both, nested)]
        assert answers[1] == answers[2] == answers[3] and len({tuple(a) for a in answers}) == 3
        assert by_name["model"] == "tiny:manual" and by_body["model"] == "tiny"
        (folder / "manual.safetensors").write_text("longer now")
        _, changed = await client.chat(model="tiny:manual", **fields)
        assert (
            changed["usage"]["prompt_tokens_details"]["cartridge_tokens"] == 10
            and changed["choices"][0]["token_ids"] != answers[1]
        )

    serving(FakeEngine(3, max_length=100, vocab=257), test, folder)


@pytest.mark.parametrize(
    ("fields", "status", "param", "words"),
    [
        ({"messages": []}, 400, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "a text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages[0].content", "surrogates"),
        ({"messages": [{"role": "martian", "content": "x"}]}, 400, "messages[0].role", "one of system, developer"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content[0]", "text"),
        (
            {"messages": [{"role": "user", "content": "x" * 500}]},
            400,
            "messages",
            "length is 395 tokens behind 5 slots of",
        ),
        ({"max_tokens": 390}, 400, "messages", "you requested 400 tokens .10 in the messages, 390 in"),
        ({"max_tokens": 0}, 400, "max_tokens", "integer from 1"),
        ({"max_tokens": True}, 400, "max_tokens", "integer"),
        ({"temperature": -1}, 400, "temperature", "from 0.0 to 2.0"),
        ({"temperature": float("nan")}, 400, "temperature", "number"),
        ({"temperature": "hot"}, 400, "temperature", "'hot'"),
        ({"top_p": 1.5}, 400, "top_p", "number"),
        ({"top_k": 2.5}, 400, "top_k", "integer"),
        ({"seed": "x"}, 400, "seed", "integer"),
        ({"n": 0}, 400, "n", "integer from 1 to 12"),
        ({"stop": ""}, 400, "stop", "not empty"),
        ({"stop": [1]}, 400, "stop", "a text"),
        ({"logprobs": True, "top_logprobs": 5}, 400, "top_logprobs", "from 0 to 4"),
        ({"top_logprobs": 1}, 400, "top_logprobs", "logprobs"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "send them as tools"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty", "from -2.0 to 2.0"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "token ids"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias", "number"),
        ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens", "at most max_tokens"),
        ({"stop_token_ids": [257]}, 400, "stop_token_ids", "from 0 to 256"),
        ({"temprature": 1}, 400, "temprature", "did you mean temperature"),
        ({"suffix": "x"}, 400, "suffix", "no such field"),
        ({"continue_final_message": True}, 400, "continue_final_message", "the assistant's message last"),
        ({"chat_template_kwargs": {"mood": 1}}, 400, "chat_template_kwargs.mood", "does not read it"),
        ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "own template"),
        ({"model": "gpt-4"}, 404, "model", "'tiny'"),
        ({"model": "tiny:none"}, 404, "model", "does not exist"),
        ({"model": "tiny:manual", "cartridges": [{"id": "nested"}]}, 400, "cartridges", "'manual'"),
        ({"cartridges": [{"id": "none"}]}, 404, "cartridges", "does not exist"),
        ({"cartridges": [{"id": "manual", "source": "wandb"}]}, 400, "cartridges", "switched off"),
        ({"cartridges": [{"id": "manual", "source": "ftp"}]}, 400, "cartridges[0].source", "one of local, huggingface"),
        ({"cartridges": [{"id": "manual", "source": {}}]}, 400, "cartridges[0].source", "one of local, huggingface"),
        ({"cartridges": [{"id": "manual"}, {"id": "manual"}]}, 400, "cartridges", "not all different"),
        ({"cartridges": [{"id": "manual"}, {"id": "wrong"}]}, 400, "cartridges", "another model"),
        ({"cartridges": [{"id": "manual"}] * 9}, 400, "cartridges", "at most 8"),
        ({"cartridges": [{}]}, 400, "cartridges[0].id", "a text"),
        ({"cartridges": [{"id": "wrong"}]}, 400, "cartridges", "another model"),
        ({"cartridges": "manual"}, 400, "cartridges", "a list"),
    ],
)
def test_what_is_wrong_is_said(folder, fields, status, param, words):
    async def test(client: Client) -> None:
        default = {} if fields.keys() & {"model", "cartridges"} else {"model": "tiny:manual"}
        got, reply = await client.chat(**default, **fields)
        error = reply["error"]
        assert (got, error["param"], error["type"]) == (status, param, "invalid_request_error")
        assert error.keys() == {"message", "type", "param", "code"}
        assert re.search(words, error["message"]), error["message"]
        assert (await client.chat())[0] == 200, "the next one is served"

    serving(ScriptEngine(SAID), test, folder, max_queue=8)


@pytest.mark.parametrize(
    "id",
    [
        "../secret",
        "..",
        ".",
        "",
        "a/b",
        "nested/cartridge",
        "/etc/passwd",
        "a\\b",
        "x\x00",
        ".hidden",
        "escape",
        "x" * 300,
    ],
)
def test_an_id_is_never_a_path(folder, id):
    async def test(client: Client) -> None:
        for fields in ({"cartridges": [{"id": id}]}, {"model": f"tiny:{id}"}):
            status, reply = await client.chat(**fields)
            assert status in (400, 404) and "secret" not in reply["error"]["message"].replace("../secret", "")

    serving(ScriptEngine(SAID), test, folder)


def test_the_store_keeps_few_and_follows_links_inside(folder):
    loaded = []

    def load(path: Path) -> FakeCartridge:
        loaded.append(path.parent.name if path.stem == "cartridge" else path.stem)
        return FakeCartridge(path)

    (folder / "alias.safetensors").symlink_to("manual.safetensors")
    store = CartridgeStore(folder, load, capacity=2)
    for id in ("manual", "nested", "manual", "alias", "manual", "nested"):
        store.get(id)
    assert loaded == ["manual", "nested", "manual", "nested"], "alias is loaded on its own, nested was dropped for it"
    assert store.get("manual").key != store.get("alias").key
    os.replace(folder / "manual.safetensors", folder / "gone.safetensors")
    with pytest.raises(UnknownCartridge):
        store.get("manual")


def test_bodies_and_routes():
    async def test(client: Client) -> None:
        for data in (b"{", b"[]", b"\xff", b"[" * 20000):
            status, reply = await client.post("/v1/chat/completions", data=data)
            assert status == 400 and reply["error"]["type"] == "invalid_request_error"
        status, reply = await client.post("/v1/chat/completions", data=b"x" * 50000)
        assert status == 413 and reply["error"]["code"] == "body_too_large"
        status, reply = await client.get("/v1/nothing")
        assert status == 404 and "Not Found" in reply["error"]["message"]
        assert (await client.get("/v1/chat/completions"))[0] == 405
        assert await client.get("/health") == (200, {"status": "ok"})

    serving(ScriptEngine(SAID), test, max_body=40000)


@pytest.mark.parametrize(
    ("path", "body", "param", "near"),
    [
        ("/detokenize", {"tokens": [104], "skip_special_tokens": True}, "skip_special_tokens", "openapi"),
        ("/v1/cartridges/load", {"id": "manual", "force_redownlaod": True}, "force_redownlaod", "force_redownload"),
        ("/v1/chat/completions", {"messages": HELLO, "cartridges": [{"id": "a", "sorce": "local"}]}, "sorce", "source"),
        ("/custom/synchronous-batch-completions", {"requests": [], "request": []}, "request", "requests"),
    ],
)
def test_a_name_that_nobody_reads_is_refused_everywhere(path: str, body: dict[str, Any], param: str, near: str):
    async def test(client: Client) -> None:
        status, reply = await client.post(path, json=body)
        assert status == 400 and reply["error"]["param"] == param
        assert "no such field" in reply["error"]["message"] and near in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


def test_tokenize_and_detokenize():
    async def test(client: Client) -> None:
        _, reply = await client.post("/tokenize", json={"prompt": "hi"})
        assert reply == {"count": 3, "max_model_len": 400, "tokens": [END, 104, 105], "token_strs": None}
        _, reply = await client.post("/tokenize", json={"prompt": "hi", "add_special_tokens": False})
        assert reply["tokens"] == [104, 105]
        _, reply = await client.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False})
        assert bytes(reply["tokens"]) == b"u:hello\n"
        assert await client.post("/detokenize", json={"tokens": [104, 105, END]}) == (200, {"prompt": "hi<end>"})
        for tokens in ([257], [-1], ["a"], [True], None):
            assert (await client.post("/detokenize", json={"tokens": tokens}))[0] == 400

    serving(ScriptEngine(SAID), test)


def test_api_key():
    async def test(client: Client) -> None:
        assert (await client.get("/health"))[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "kéy"}, {"Authorization": "Bearer "}):
            status, reply = await client.get("/v1/models", headers=headers)
            assert status == 401 and reply["error"]["code"] == "invalid_api_key"
        assert (await client.get("/v1/models", headers={"Authorization": "Bearer kéy"}))[0] == 200

    serving(ScriptEngine(SAID), test, api_key="kéy")


async def until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(stream):
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.02)

    async def test(client: Client) -> None:
        asked = asyncio.create_task(client.chat(stream=stream))
        await until(lambda: engine.steps > 5)
        asked.cancel()
        assert (await client.chat(max_tokens=2))[1]["choices"][0]["message"]["content"] == "ab"
        assert engine.steps < 200, "the abandoned answer would have taken 386"
        steps = engine.steps
        await asyncio.sleep(0.05)
        assert engine.steps == steps

    serving(engine, test)


def test_a_stop_string_frees_the_slot():
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.002)

    async def test(client: Client) -> None:
        assert (await client.chat(stop="cab"))[1]["usage"]["completion_tokens"] == 5
        await client.chat(max_tokens=1)
        assert engine.steps < 100

    serving(engine, test)


def test_a_full_queue_is_said():
    engine = ScriptEngine(SAID, max_num_seqs=1)
    engine.gate.clear()

    async def test(client: Client) -> None:
        first = asyncio.create_task(client.chat())
        await until(lambda: engine.prefilled > 0)  # it runs, and the engine is in its first step
        others = [asyncio.create_task(client.chat()) for _ in range(6)]
        await until(lambda: any(task.done() for task in others))
        status, reply = next(task for task in others if task.done()).result()
        assert status == 429 and reply["error"]["code"] == "queue_full" and reply["error"]["type"] == "rate_limit_error"
        assert client.headers["Retry-After"] == "1"
        engine.gate.set()
        results = [await task for task in (first, *others)]
        assert {status for status, _ in results} == {200, 429} and results[0][0] == 200
        # All choices of a request or none.
        assert (await client.chat(n=4))[0] == 400
        assert (await client.chat(n=3))[0] == 200
        assert (await client.chat())[0] == 200

    serving(engine, test, max_queue=2)


def test_all_choices_or_none():
    engine = ScriptEngine(SAID, max_num_seqs=2, pause=0.05)

    async def test(client: Client) -> None:
        busy = asyncio.create_task(client.chat(n=2))
        await until(lambda: engine.steps > 0)
        assert (await client.chat(n=3))[0] == 429
        assert (await client.chat(n=2))[0] == 200, "nothing is left of the one that was refused"
        assert (await busy)[0] == 200

    serving(engine, test, max_queue=2)


def test_stopping_ends_what_runs():
    engine = ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01)

    async def body() -> None:
        sock = serve.bind("127.0.0.1", 0)
        server = Server(engine, TOKENIZER, CartridgeStore(Path("none"), FakeCartridge), "tiny")
        runner = await server.start(sock)
        async with aiohttp.ClientSession() as session:
            client = Client(session, f"http://127.0.0.1:{sock.getsockname()[1]}")
            tasks = [asyncio.create_task(client.chat()), asyncio.create_task(client.stream())]
            await until(lambda: engine.steps > 2)
            await runner.cleanup()
            status, reply = await tasks[0]
            assert status == 503 and reply["error"]["code"] == "stopping"
            chunks = await tasks[1]
            assert not chunks or chunks[-1]["error"]["code"] == "stopping"

    # Either may still wait for the other one; a stream that waits is refused with a status.
    engine.max_num_seqs = 2
    engine.__post_init__()
    asyncio.run(body())


def test_a_failed_engine_is_said():
    engine = ScriptEngine(SAID)

    def fail(indices: Sequence[int]) -> list[Sampled]:
        raise RuntimeError("out of memory")

    engine.decode = fail

    async def test(client: Client) -> None:
        status, reply = await client.chat()
        assert status == 500 and reply["error"]["code"] == "engine_failed" and "memory" not in str(reply)
        assert (await client.chat())[0] == 500
        assert await client.get("/health") == (503, {"status": "failed"})

    serving(engine, test)


def test_a_port_in_use_is_said():
    with serve.bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use"):
            serve.bind("127.0.0.1", port)
    with pytest.raises(OSError, match="not an address"):
        serve.bind("no.such.host.invalid", 0)


PROGRAM = """
import asyncio, random
from pathlib import Path
from cartridges_jax import serve
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore
from test_server import SAID, TOKENIZER, FakeCartridge, ScriptEngine
server = Server(ScriptEngine(SAID), TOKENIZER, CartridgeStore(Path("none"), FakeCartridge), "tiny")
with serve.bind("127.0.0.1", 0) as sock:
    raise SystemExit(asyncio.run(serve.run(server, sock, f"ready: {sock.getsockname()[1]}")))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server(number):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline().startswith("ready: ")
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0 and errors == "stopped\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--cartridges=no-such-folder"], "not a folder"),
        (["--max-num-seqs=0"], "--max-num-seqs is 0"),
        (["--port=70000"], "--port is 70000"),
        (["--max-length=1"], "--max-length is 1"),
    ],
)
def test_wrong_options_of_serve(options, words):
    with pytest.raises(UserError, match=words):
        serve.main(options)


def test_an_empty_key_file_is_refused(tmp_path):
    (tmp_path / "key").write_text("\n")
    with pytest.raises(UserError, match="empty"):
        serve.main([f"--api-key-file={tmp_path / 'key'}"])


def test_prompt_logprobs_are_vllms():
    async def test(client: Client) -> None:
        status, reply = await client.chat(
            max_tokens=1, prompt_logprobs=2, return_token_ids=True, add_generation_prompt=False
        )
        first, *others = reply["prompt_logprobs"]
        assert status == 200 and first is None
        assert reply["prompt_token_ids"] == list(b"u:hello\n")
        for token, entry in zip(b":hello\n", others, strict=True):
            assert entry[str(token)] == {"logprob": -0.5, "rank": 3, "decoded_token": chr(token)}
            assert [entry[best]["rank"] for best in ("0", "1")] == [1, 2] and len(entry) == 3
        assert "prompt_logprobs" not in (await client.chat(max_tokens=1))[1]
        for fields, name in (({"prompt_logprobs": 99}, "from 0 to"), ({"stream": True}, "stream to be false")):
            status, reply = await client.chat(**{"prompt_logprobs": 1, "max_tokens": 1, **fields})
            assert status == 400 and name in reply["error"]["message"]

    serving(ScriptEngine(b"hi"), test)
