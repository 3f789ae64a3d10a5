"""SGLang, Tokasaurus and hosted APIs, against servers written from their protocols; and what a pickle may not do."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import tiny
from aiohttp import web
from client_servers import SGLang, Tokasaurus, alternatives, served

from cartridges_jax.command_line.errors import UserError
from synth.clients import pickles
from synth.clients.alignment import is_spelt
from synth.clients.base import Client, Refused, Rejected, Unavailable, answer_span
from synth.clients.factory import connect
from synth.clients.local import ChatTokenizer
from synth.config import ClientConfig, ResourceConfig, SamplingConfig, SynthConfig

GREEDY = SamplingConfig(temperature=0.0)
QUESTION = [{"role": "system", "content": "chunk"}, {"role": "user", "content": "the cat number 5"}]
ANSWER = "the cat number 5"[::-1]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(str(tiny.folder()))


def use(server: Any, action: Callable[[Client], Awaitable[Any]], **settings: Any) -> Any:
    routes = server if isinstance(server, dict) else server.routes

    async def run() -> Any:
        async with served(routes) as root:
            config = ClientConfig(root + "/v1", **{"timeout_seconds": 5.0} | settings)
            async with connect(config, config.urls[0]) as client:
                return await action(client)

    return asyncio.run(run())


def sglang(server: SGLang, action: Callable[[Client], Awaitable[Any]], **settings: Any) -> Any:
    return use(server, action, **{"kind": "sglang", "model": "tiny", "tokenizer": str(tiny.folder())} | settings)


def tokasaurus(server: Tokasaurus, action: Callable[[Client], Awaitable[Any]], **settings: Any) -> Any:
    return use(server, action, **{"kind": "tokasaurus", "model": "org/tiny"} | settings)


def expected_rows(ids: list[int], count: int) -> tuple[Any, ...]:
    rows = (alternatives(token, place, count) for place, token in enumerate(ids))
    return tuple(tuple((i, lp) for lp, i in row) for row in rows)


def test_sglang_answers_in_ids(tokenizer: ChatTokenizer):
    server = SGLang(tokenizer)
    made = sglang(server, lambda c: c.complete(QUESTION, SamplingConfig(0.5, 0.9, 99, ("\n",)), 1, 3))
    ids = tokenizer.encode(ANSWER + "<|im_end|>")
    assert (made.text, made.token_ids, made.top_logprobs) == (ANSWER, tuple(ids), expected_rows(ids, 3))
    assert (made.finish_reason, made.completion_tokens, made.cached_tokens) == ("stop", len(ids), 3)
    body = server.requests[0]
    assert body["input_ids"] == tokenizer.chat_ids(QUESTION, add_generation_prompt=True)
    assert body["sampling_params"] == {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 99, "stop": ["\n"]}
    asked = sglang(server, lambda c: c.complete(QUESTION, SamplingConfig(max_tokens=3), 1))
    assert asked.top_logprobs is None and asked.token_ids == tuple(ids[:3]) and asked.finish_reason == "length"
    assert "return_logprob" not in server.requests[1]
    sglang(server, lambda c: c.check())
    with pytest.raises(Refused, match="does not serve 'big', it serves tiny"):
        sglang(server, lambda c: c.check(), model="big")


def test_sglang_scores_an_answer(tokenizer: ChatTokenizer):
    server = SGLang(tokenizer)
    given = [*QUESTION, {"role": "assistant", "content": "box 7"}]
    made = sglang(server, lambda c: c.score(given, 2))
    ids = tokenizer.encode("box 7<|im_end|>")
    assert made.token_ids == tuple(ids)
    assert made.top_logprobs == tuple(expected_rows([token], 2)[0] for token in ids)
    opening = tokenizer.chat_ids(QUESTION, add_generation_prompt=True)
    assert server.requests[0]["input_ids"] == opening + ids and server.requests[0]["sampling_params"]["max_new_tokens"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda reply: reply["meta_info"]["output_token_logprobs"].pop(), "wrong tokens"),
        (lambda reply: reply["meta_info"].update(completion_tokens=1), "wrong tokens"),
        (lambda reply: reply.update(text="something else"), "wrong tokens"),
        (lambda reply: reply.pop("text"), "broken reply"),
        (lambda reply: reply.pop("meta_info"), "broken reply"),
        (lambda reply: reply["meta_info"]["output_top_logprobs"][0].append([float("nan"), 1, None]), "broken reply"),
        (lambda reply: reply["meta_info"].update(finish_reason={"type": "abort", "message": "x"}), "aborted"),
    ],
)
def test_sglang_gone_wrong(tokenizer: ChatTokenizer, change: Callable[[dict[str, Any]], None], kind: str):
    server = SGLang(tokenizer)
    server.change = change
    with pytest.raises(Unavailable) as caught:
        sglang(server, lambda c: c.complete(QUESTION, GREEDY, 1, 2))
    assert caught.value.kind == kind


@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokasaurus(tokenizer: ChatTokenizer, batch_size: int):
    server = Tokasaurus(tokenizer)
    texts = [f"the owl number {i}" for i in range(6)]

    async def ask(client: Client) -> Any:
        await client.check()
        asked = [client.complete([{"role": "user", "content": text}], GREEDY, 1, 3) for text in texts]
        return await asyncio.gather(*asked)

    made = tokasaurus(server, ask, batch_size=batch_size, tokenizer=str(tiny.folder()))
    for text, one in zip(texts, made, strict=True):
        ids = tokenizer.encode(text[::-1] + "<|im_end|>")
        assert (one.text, one.token_ids, one.top_logprobs) == (text[::-1], tuple(ids), expected_rows(ids, 3))
        assert (one.finish_reason, one.prompt_tokens, one.completion_tokens) == ("stop", 9, len(ids))
    assert sorted(server.batches) == ([] if batch_size == 1 else [2, 4])
    assert server.requests[0]["logprobs_in_fingerprint"] is True


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("as_dict", [False, True])
def test_the_pickled_reply_is_read_in_every_protocol(tokenizer: ChatTokenizer, protocol: int, as_dict: bool):
    """The cartridge route pickles dictionaries, the plain one OpenAI's types."""
    server = Tokasaurus(tokenizer)
    server.pickled = lambda replies: pickle.dumps(
        [reply.model_dump() for reply in replies] if as_dict else replies, protocol
    )
    made = tokasaurus(server, lambda c: c.complete(QUESTION, GREEDY, 1, 2), batch_size=2)
    assert made.text == ANSWER and made.top_logprobs


class Hostile:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/owned-by-a-pickle",)


@pytest.mark.parametrize(
    "data",
    [
        pickle.dumps([Hostile()]),
        b"cos\nsystem\n(S'true'\ntR.",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cbuiltins\ngetattr\n.",
        b"copenai.types.chat\nx.__class__\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93.",
        b"\x80\x02c_codecs\nencode\n.",
    ],
)
def test_a_hostile_pickle_runs_nothing(data: bytes):
    with pytest.raises(Refused, match=r"the reply is a pickle that names .*: it was not run"):
        pickles.read(data)
    assert not os.path.exists("/tmp/owned-by-a-pickle")


@pytest.mark.parametrize(
    "data", [b"", b"{}", pickle.dumps([1, 2])[:-1], b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x00.", b"Pid\n.", b"R."]
)
def test_a_damaged_pickle_is_one_sentence(data: bytes):
    with pytest.raises(Unavailable, match="the reply is no whole pickle"):
        pickles.read(data)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (lambda f: f["completion_ids"][0].append(1), Unavailable, "token ids, .* alternatives"),
        (lambda f: f.update(packed_topk_indices=["!"]), Unavailable, "part missing or wrong"),
        (lambda f: f.pop("completion_ids"), Unavailable, "part missing or wrong"),
        (lambda f: f.update(packed_topk_indices=None), Refused, "start Tokasaurus with max_topk_logprobs"),
    ],
)
def test_tokasaurus_gone_wrong(tokenizer: ChatTokenizer, change: Any, error: type[Exception], sentence: str):
    server = Tokasaurus(tokenizer)
    server.change = change
    with pytest.raises(error, match=sentence):
        tokasaurus(server, lambda c: c.complete(QUESTION, GREEDY, 1, 7))


def test_a_batch_that_fails_fails_every_call_of_it(tokenizer: ChatTokenizer):
    server = Tokasaurus(tokenizer)
    server.pickled = lambda replies: pickle.dumps([Hostile()])

    async def ask(client: Client) -> Any:
        return await asyncio.gather(*(client.complete(QUESTION, GREEDY, 1) for _ in range(3)), return_exceptions=True)

    assert [type(error) for error in tokasaurus(server, ask, batch_size=3)] == [Refused] * 3


@pytest.mark.parametrize(("kind", "field"), [("openai_api", "max_completion_tokens"), ("together", "max_tokens")])
def test_hosts_know_openais_fields_only(kind: str, field: str):
    bodies: list[dict[str, Any]] = []

    async def models(_: Any) -> web.Response:
        listed = [{"id": "large"}]
        return web.json_response(listed if kind == "together" else {"data": listed})

    async def chat(body: dict[str, Any]) -> web.Response:
        bodies.append(body)
        choice = {"message": {"role": "assistant", "content": "Why?"}, "finish_reason": "stop"}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})

    async def ask(client: Client) -> Any:
        await client.check()
        await client.complete(QUESTION, SamplingConfig(temperature=1.0, max_tokens=7), 3)
        for refused in (client.complete(QUESTION, GREEDY, 3, 5), client.tokenize("a"), client.score(QUESTION, 5)):
            with pytest.raises(Refused, match=f"kind '{kind}' gives no"):
                await refused
        return await client.complete(QUESTION, SamplingConfig(0.5, 0.9, 7, ("x",)), 3)

    routes = {"/v1/models": models, "/v1/chat/completions": chat}
    made = use(routes, ask, kind=kind, model="large")
    assert (made.text, made.token_ids, made.completion_tokens) == ("Why?", None, 2)
    plain = {"model": "large", "messages": QUESTION, field: 7, "seed": 3}
    assert bodies == [plain, plain | {"temperature": 0.5, "top_p": 0.9, "stop": ["x"]}]


@pytest.mark.parametrize(
    ("text", "spelt", "stopped", "same"),
    [
        ("A cat.", "A cat.<|im_end|>", False, True),
        ("A cat.", " A cat.</s>", False, True),
        ("A cat", "A cat \ufffd", False, True),
        ("A <|im_start|>cat", "A cat", False, True),
        ("A cat.", "A hat.<|im_end|>", False, False),
        ("A cat.", "A cat. And a dog.", False, False),
        ("A cat.", "A cat. And a dog.", True, True),
        ("cat.", "A cat.", True, False),
    ],
)
def test_whether_ids_spell_a_text(text: str, spelt: str, stopped: bool, same: bool):
    assert is_spelt(text, spelt, stopped=stopped) is same


def test_where_an_answer_stands():
    assert answer_span([1, 2], [1, 2, 8, 9], [1, 2, 5, 6, 8, 9]) == slice(2, 5)
    for opened, empty, whole in [
        ([1, 2], [1, 2], [1, 2, 5]),  # nothing ends a turn
        ([1, 2], [1, 2, 8], [1, 2, 8]),  # no answer
        ([1, 2], [1, 2, 8], [1, 3, 5, 8]),  # an opening that changes
        ([1, 2], [1, 3, 8], [1, 2, 5, 8]),
        ([1, 2], [1, 2, 8], [1, 2, 5, 7]),  # an end that changes
    ]:
        with pytest.raises(Rejected, match="alters what stands around an answer"):  # of one conversation, perhaps
            answer_span(opened, empty, whole)


def make_config(client: ClientConfig, **changes: Any) -> SynthConfig:
    return SynthConfig("out", 1, ResourceConfig("x.txt"), client, **changes)


@pytest.mark.parametrize("kind", ["sglang", "tokasaurus", "openai"])
@pytest.mark.parametrize("raw", [None, True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_after_temperature_are_no_lesson(kind: Any, raw: bool | None, temperature: float):
    client = ClientConfig("http://x", "m", kind, tokenizer="t", raw_logprobs=raw)
    is_raw = raw if raw is not None else kind == "openai"
    if is_raw or temperature != 0.7:
        make_config(client, answer=SamplingConfig(temperature=temperature))
    else:
        with pytest.raises(UserError, match=r"config\.answer\.temperature is 0\.7, but .* after temperature"):
            make_config(client, answer=SamplingConfig(temperature=temperature))


def test_who_cannot_be_the_teacher():
    hosted = ClientConfig("http://x", "m", "together")
    with pytest.raises(UserError, match=r"'together', which gives no token ids .* use it as config\.question_client"):
        make_config(hosted)
    make_config(ClientConfig("http://x", "m"), question_client=hosted)
    with pytest.raises(UserError, match=r"config\.client\.tokenizer is missing"):
        ClientConfig("http://x", "m", "sglang")
    with pytest.raises(UserError, match=r"batch_size is 2, but only kind='tokasaurus'"):
        ClientConfig("http://x", "m", batch_size=2)
    with pytest.raises(UserError, match=r"config\.client\.tokenizer '/nowhere' cannot be loaded"):
        connect(ClientConfig("http://x", "m", "sglang", tokenizer="/nowhere"), "http://x")
