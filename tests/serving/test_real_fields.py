"""Fields that change an answer, asked of a tiny real model by the `openai` package."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import openai
import pytest
import tiny
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

HELLO: Any = [{"role": "user", "content": "Which cat?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["cat", "owl"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weigh", "description": "Weighs.", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "clock"}},
]
TEXT = "The cat number 3 weighs"


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    model = tiny.model()
    engine = Engine(model, max_num_seqs=4, max_length=1024)
    store = CartridgeStore(Path("none"), lambda _: None)
    with (
        running(Server(engine, model.tokenizer, store, "tiny")) as root,
        openai.OpenAI(base_url=f"{root}/v1", api_key="key", max_retries=0) as made,
    ):
        yield made


def written(client: openai.OpenAI, **fields: Any) -> list[int]:
    """The token ids of an answer."""
    body = {"temperature": 0, "ignore_eos": True, "return_token_ids": True} | fields
    reply = client.completions.create(model="tiny", prompt=TEXT, max_tokens=24, extra_body=body)
    return reply.choices[0].model_dump()["token_ids"]


def logits_behind(ids: list[int]) -> np.ndarray:
    return np.asarray(tiny.model().logits(np.array([ids]))[0, -1])


def test_penalties_are_those_of_the_formulas(client: openai.OpenAI):
    prompt = tiny.model().tokenizer.encode(TEXT)
    for rules in (
        {"frequency_penalty": 1.5},
        {"presence_penalty": 2.0},
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.7, "presence_penalty": -0.3, "repetition_penalty": 1.2},
    ):
        answer = written(client, **rules)
        for at, token in enumerate(answer):
            logits = logits_behind([*prompt, *answer[:at]])
            counts = np.bincount(answer[:at], minlength=len(logits))
            seen = counts + np.bincount(prompt, minlength=len(logits)) > 0
            penalty = rules.get("repetition_penalty", 1.0)
            logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
            logits = (
                logits - rules.get("frequency_penalty", 0) * counts - rules.get("presence_penalty", 0) * (counts > 0)
            )
            assert logits[token] >= logits.max() - 1e-4, (rules, at)
    assert written(client, frequency_penalty=1.5) != written(client), "it does something"


def test_biases_and_bans_hold(client: openai.OpenAI):
    plain = written(client)
    banned = plain[0]
    assert banned not in written(client, logit_bias={str(banned): -100})
    assert written(client, logit_bias={"65": 100}) == [65] * 24
    assert set(written(client, temperature=2, allowed_token_ids=[65, 66, 67])) <= {65, 66, 67}
    assert written(client, temperature=2, min_p=1.0) == plain
    word = tiny.model().tokenizer.decode(plain[2:5])
    assert word not in tiny.model().tokenizer.decode(written(client, ignore_eos=False, bad_words=[word]))


def test_no_end_comes_before_its_time(client: openai.OpenAI):
    at_once: Any = {"logit_bias": {str(i): 100 for i in tiny.model().tokenizer.stop_ids}, "ignore_eos": False}
    assert len(written(client, **at_once)) == 1
    assert len(written(client, min_tokens=7, **at_once)) == 8


def test_those_beside_notice_nothing(client: openai.OpenAI):
    """Steps of batches with rules, masks and neither give each request what it gets alone."""
    plain: Any = {"model": "tiny", "prompt": TEXT, "max_tokens": 40, "temperature": 0}
    alone = client.completions.create(**plain).choices[0].text
    ruled: Any = {"extra_body": {"repetition_penalty": 1.3}}
    formed: Any = {"extra_body": {"structured_outputs": {"json": SCHEMA}}, "seed": 3, "temperature": 1}
    wanted = [client.completions.create(**plain | own).choices[0].text for own in (ruled, formed)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="key", max_retries=0) as many:
            asked = [many.completions.create(**plain | own) for own in ({}, ruled, formed, {}) * 2]
            return [reply.choices[0].text for reply in await asyncio.gather(*asked)]

    assert asyncio.run(together()) == [alone, *wanted, alone] * 2


def test_the_prompt_is_told_with_its_log_probabilities(client: openai.OpenAI):
    prompts = [TEXT, "An owl 👍 of"]
    reply = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=0, echo=True, logprobs=2, extra_body={"prompt_logprobs": 1}
    )
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        ids = tiny.model().tokenizer.encode(prompt)
        wanted = np.asarray(jax.nn.log_softmax(tiny.model().logits(np.array([ids]))[0]))
        told = choice.logprobs
        assert choice.text == prompt and choice.finish_reason == "length" and told is not None
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
        np.testing.assert_allclose(told.token_logprobs[1:], wanted[np.arange(len(ids) - 1), ids[1:]], atol=1e-4)
        for token, best, row in zip(told.tokens[1:], told.top_logprobs[1:], wanted, strict=False):
            assert token in best and abs(max(best.values()) - row.max()) < 1e-4
        starts = [prompt[at:] for at in told.text_offset]
        assert all(
            start.startswith(name) or name.startswith("bytes:") for start, name in zip(starts, told.tokens, strict=True)
        )
        scored = choice.model_dump()["prompt_logprobs"]
        assert scored[0] is None and [str(i) in row for i, row in zip(ids[1:], scored[1:], strict=True)]
    whole = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, echo=True, temperature=0).choices[0].text
    after = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, temperature=0).choices[0].text
    assert whole == TEXT + after
    stream = client.completions.create(model="tiny", prompt=TEXT, max_tokens=5, echo=True, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_the_best_of_several_are_told(client: openai.OpenAI):
    ask: Any = {"model": "tiny", "prompt": TEXT, "max_tokens": 6, "seed": 1, "logprobs": 0}
    written = client.completions.create(**ask, n=4)
    every = written.choices
    best = client.completions.create(**ask, n=2, best_of=4)
    means = sorted((np.mean(choice.logprobs.token_logprobs) for choice in every), reverse=True)
    assert [np.mean(choice.logprobs.token_logprobs) for choice in best.choices] == pytest.approx(means[:2], abs=1e-5)
    assert best.usage == written.usage


@pytest.mark.parametrize("seed", range(4))
def test_a_random_model_answers_in_json(client: openai.OpenAI, seed: int):
    forms: list[Any] = [{"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}]
    for form in forms:
        reply = client.chat.completions.create(
            model="tiny", messages=HELLO, response_format=form, seed=seed, max_tokens=400
        )
        assert reply.choices[0].finish_reason == "stop"
        jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
    loose = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format={"type": "json_object"}, seed=seed, max_tokens=200
    ).choices[0]
    assert loose.message.content.startswith("{")
    if loose.finish_reason == "stop":
        assert isinstance(json.loads(loose.message.content), dict)
    for body, texts in (({"guided_choice": ["yes", "no"]}, ["yes", "no"]), ({"guided_regex": "a{3}"}, ["aaa"])):
        reply = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=body, seed=seed)
        assert reply.choices[0].message.content in texts


def test_tools_are_called_and_their_answers_read(client: openai.OpenAI):
    ask: Any = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "seed": 5, "max_tokens": 300}
    named = {"type": "function", "function": {"name": "weigh"}}
    reply = client.chat.completions.create(**ask, tool_choice=named).choices[0]
    assert reply.finish_reason == "tool_calls" and reply.message.content is None
    (call,) = reply.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    streamed: dict[str, str] = {"id": "", "name": "", "arguments": ""}
    for chunk in client.chat.completions.create(**ask, tool_choice=named, stream=True):
        for part in chunk.choices[0].delta.tool_calls or ():
            streamed["id"] += part.id or ""
            streamed["name"] += part.function.name or ""
            streamed["arguments"] += part.function.arguments or ""
    assert (streamed["name"], streamed["arguments"]) == ("weigh", call.function.arguments)
    turns = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "3 grams"},
    ]
    asked: Any = {"model": "tiny", "messages": turns, "tools": TOOLS, "max_tokens": 4}
    after = client.chat.completions.create(**asked, extra_body={"return_token_ids": True})
    text = tiny.model().tokenizer.decode(after.model_dump()["prompt_token_ids"])
    assert "3 grams" in text and '"name": "weigh"' in text and "Weighs." in text
    silent = client.chat.completions.create(**ask | {"tool_choice": "none"}, extra_body={"return_token_ids": True})
    assert "Weighs." not in tiny.model().tokenizer.decode(silent.model_dump()["prompt_token_ids"])
    assert client.chat.completions.create(**ask, tool_choice="required").choices[0].message.tool_calls


def test_a_message_goes_on(client: openai.OpenAI):
    turns: Any = [*HELLO, {"role": "assistant", "content": "The cat number"}]
    body = {"continue_final_message": True, "return_token_ids": True}
    reply = client.chat.completions.create(model="tiny", messages=turns, max_tokens=2, extra_body=body).model_dump()
    decode = tiny.model().tokenizer.decode
    assert decode(reply["prompt_token_ids"], skip_special_tokens=False).endswith("assistant\nThe cat number")


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 2**31 - 1},
        {"min_tokens": 2**31},
        {"allowed_token_ids": []},
        {"tools": TOOLS, "tool_choice": "required", "guided_regex": "a+"},
        {"tools": TOOLS, "tool_choice": "required", "bad_words": ["cat"]},
        {"x" * 1000: 1},
    ],
)
def test_what_cannot_be_is_refused_and_the_next_is_answered(client: openai.OpenAI, fields: dict[str, Any]):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body=fields)
    assert len(str(caught.value)) < 1000
    assert client.completions.create(model="tiny", prompt=TEXT, max_tokens=2).choices


def test_an_empty_prompt_is_not_too_long(client: openai.OpenAI):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="", max_tokens=2)
    assert caught.value.code == "invalid_value"


def test_a_schema_beside_json_object_is_kept_to(client: openai.OpenAI):
    asked: Any = {"type": "json_object", "schema": SCHEMA}
    reply = client.chat.completions.create(model="tiny", messages=HELLO, response_format=asked, max_tokens=200)
    jsonschema.validate(json.loads(reply.choices[0].message.content or ""), SCHEMA)


def test_a_grammar_that_meets_a_limit_has_not_stopped(client: openai.OpenAI):
    body = {"guided_grammar": 'start: "b" ' + '"a"? ' * 9000}
    (choice,) = client.chat.completions.create(model="tiny", messages=HELLO, extra_body=body).choices
    assert choice.message.content == "b" and choice.finish_reason == "length"
