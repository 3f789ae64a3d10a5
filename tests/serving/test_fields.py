"""What single fields of a request do to its answer, over real HTTP, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_server import (  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
    END,
    SAID,
    TOKENIZER,
    Client,
    ScriptEngine,
    content,
    folder,
    serving,
)

from cartridges_jax.serving.fields import NEUTRAL, generation_fields
from cartridges_jax.serving.openapi import document_of

__all__ = ["folder"]  # a fixture
TABLE = generation_fields(4, 8, 257)
EMOJI = [*"a👍!".encode(), END]


def said(reply: Any) -> str:
    return reply["choices"][0]["message"]["content"]


@pytest.mark.parametrize("field", [field for field in TABLE.fields if field.refused], ids=lambda field: field.name)
def test_what_is_not_done_is_refused_and_asking_for_nothing_is_not(field: Any):
    schema = document_of("tiny", TABLE)["components"]["schemas"]
    route = field.routes[0]
    told = schema[{"chat": "ChatCompletionRequest", "text": "CompletionRequest"}[route]]["properties"][field.name]
    assert told["description"].startswith("Refused") and told["enum"] == [field.default, None]

    async def test(client: Client) -> None:
        path, body = {
            "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
            "text": ("/v1/completions", {"prompt": "x"}),
        }[route]
        for value in (field.default, None):
            assert (await client.post(path, json=body | {field.name: value}))[0] == 200
        other = False if field.default is True else "something"
        status, reply = await client.post(path, json=body | {field.name: other})
        assert (status, reply["error"]["param"]) == (400, field.name) and field.refused in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


def test_what_changes_no_answer_is_accepted():
    async def test(client: Client) -> None:
        assert (await client.chat(**dict.fromkeys(NEUTRAL, "x")))[0] == 200

    serving(ScriptEngine(SAID), test)


def test_what_ends_an_answer_may_be_shown():
    async def test(client: Client) -> None:
        assert said((await client.chat(stop_token_ids=[ord("e")]))[1]) == "Grüß"
        assert said((await client.chat(stop_token_ids=[ord("e")], include_stop_str_in_output=True))[1]) == "Grüße"
        fields: dict[str, Any] = dict(stop=["ße", "ß"], include_stop_str_in_output=True)
        assert said((await client.chat(**fields))[1]) == content(await client.stream(**fields)) == "Grüß"
        shown = dict(include_stop_str_in_output=True, skip_special_tokens=False)
        assert said((await client.chat(**shown))[1]) == "Grüße!<end>"
        _, reply = await client.chat(ignore_eos=True, skip_special_tokens=False, max_tokens=len(SAID) + 1)
        assert said(reply) == "Grüße!<end>G"

    serving(ScriptEngine(SAID), test)


def test_prompts_are_cut_at_their_beginning(folder: Path):
    async def test(client: Client) -> None:
        ask: Any = {"max_tokens": 2, "return_token_ids": True}
        _, reply = await client.post("/v1/completions", json={"prompt": "abcdef", "truncate_prompt_tokens": 3} | ask)
        assert bytes(reply["prompt_token_ids"]) == b"def"
        _, reply = await client.post("/v1/completions", json={"prompt": "x" * 900, "truncate_prompt_tokens": -1} | ask)
        assert len(reply["prompt_token_ids"]) == 400 - 2
        behind = {"prompt": "x" * 900, "truncate_prompt_tokens": -1, "model": "tiny:manual"}
        _, reply = await client.post("/v1/completions", json=behind | ask)
        assert len(reply["prompt_token_ids"]) == 400 - 5 - 2, "the cartridge's slots take room, too"

    serving(ScriptEngine(SAID), test, folder)


def test_bytes_join_to_the_text_and_offsets_are_characters():
    async def test(client: Client) -> None:
        _, reply = await client.chat(logprobs=True, top_logprobs=1)
        entries = reply["choices"][0]["logprobs"]["content"]
        assert bytes(byte for entry in entries for byte in entry["bytes"] or []).decode() == said(reply) == "a👍!"
        assert entries[1]["token"] == "bytes:\\xf0" and entries[-1]["token"] == "<end>" and entries[-1]["bytes"] is None
        _, reply = await client.post("/v1/completions", json={"prompt": "x", "logprobs": 1})
        told = reply["choices"][0]["logprobs"]
        assert told["text_offset"] == [0, 1, 1, 1, 1, 2, 3]

    serving(ScriptEngine(EMOJI), test)


@pytest.mark.parametrize(
    "fields",
    [
        {"stop_token_ids": [ord("e")]},
        {"stop_token_ids": [ord("e")], "include_stop_str_in_output": True},
        {"skip_special_tokens": False, "include_stop_str_in_output": True},
        {"skip_special_tokens": False},
    ],
)
def test_bytes_join_to_the_text_however_it_ends(fields: dict[str, Any]):
    async def test(client: Client) -> None:
        _, reply = await client.chat(logprobs=True, **fields)
        entries = reply["choices"][0]["logprobs"]["content"]
        assert bytes(byte for entry in entries for byte in entry["bytes"] or []).decode() == said(reply)

    serving(ScriptEngine(SAID), test)


def test_no_stop_string_ends_an_answer_before_its_time():
    async def test(client: Client) -> None:
        assert said((await client.chat(stop=["ü", "ß", "!"]))[1]) == "Gr"
        assert said((await client.chat(stop=["ü", "ß", "!"], min_tokens=4))[1]) == "Grü"
        assert said((await client.chat(stop=["ü", "!"], min_tokens=6))[1]) == "Grüße"

    serving(ScriptEngine(SAID), test)


class Ambiguous(type(TOKENIZER)):  # type: ignore[misc]
    """The tokens 65 and 66 have one text."""

    def token_bytes(self, token_id: int) -> bytes:
        return b"A" if token_id in (65, 66) else super().token_bytes(token_id)


def test_best_tokens_hold_the_one_that_was_drawn_and_none_is_lost(monkeypatch: pytest.MonkeyPatch):
    engine = ScriptEngine([99])  # its best tokens are 99, 65, 66 and 67

    async def test(client: Client) -> None:
        body = {"prompt": "x", "max_tokens": 1}
        _, reply = await client.post("/v1/completions", json=body | {"logprobs": 0})
        assert reply["choices"][0]["logprobs"]["top_logprobs"] == [{"c": -0.25}]
        _, reply = await client.post("/v1/completions", json=body | {"logprobs": 4})
        (best,) = reply["choices"][0]["logprobs"]["top_logprobs"]
        assert best == {"c": -0.25, "A": -2.0, "token_id:66": -3.0, "C": -4.0}

    monkeypatch.setattr("test_server.TOKENIZER", Ambiguous())
    serving(engine, test)
