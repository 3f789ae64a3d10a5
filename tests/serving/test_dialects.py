"""`/v1/responses` and `/v1/messages` over HTTP: what they ask is the chat's, and what they tell is theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_server import END, SAID, Client, ScriptEngine, folder, serving  # pyrefly: ignore[missing-import]

__all__ = ["folder"]  # a fixture

CALLED = '<tool_call>\n{"name": "size", "arguments": {"of": "lid"}}\n</tool_call>'
TALK = [*f"I look.{CALLED}\n{CALLED.replace('lid', 'box')}".encode(), END]
SCHEMA = {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]}
OPENAI_TOOL = {"type": "function", "name": "size", "description": "A size.", "parameters": SCHEMA}
ANTHROPIC_TOOL = {"name": "size", "description": "A size.", "input_schema": SCHEMA}


async def events(client: Client, path: str, body: dict[str, Any]) -> list[Any]:
    async with client.session.post(client.url + path, json=body | {"stream": True}) as response:
        assert response.status == 200 and response.content_type == "text/event-stream"
        blocks = (await response.text()).removesuffix("\n\n").split("\n\n")
    told = []
    for block in blocks:
        name, data = block.split("\n")
        told.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {told[-1]['type']}"
    return told


def test_a_response_is_the_chat_s_answer(folder: Path):
    async def test(client: Client) -> None:
        body = {"model": "tiny:manual", "instructions": "Be kind.", "input": "hello", "max_output_tokens": 50}
        status, reply = await client.post("/v1/responses", json=body)
        assert status == 200 and reply["object"] == "response" and reply["status"] == "completed"
        (item,) = reply["output"]
        assert item["type"] == "message" and item["role"] == "assistant"
        assert [part["text"] for part in item["content"]] == ["Grüße!"]
        assert reply["model"] == "tiny:manual" and reply["instructions"] == "Be kind." and reply["store"] is False
        prompt = len(b"s:Be kind.\nu:hello\na:")
        assert reply["usage"] == {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "cartridge_tokens": 5},
            "output_tokens": len(SAID),
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + len(SAID),
        }
        _, reply = await client.post("/v1/responses", json=body | {"max_output_tokens": 2})
        assert reply["status"] == "incomplete" and reply["incomplete_details"] == {"reason": "max_output_tokens"}

    serving(ScriptEngine(SAID), test, folder)


def test_a_response_streams_what_it_is():
    async def test(client: Client) -> None:
        body = {"input": [{"role": "user", "content": [{"type": "input_text", "text": "hello"}]}]}
        told = await events(client, "/v1/responses", body)
        assert [event["sequence_number"] for event in told] == list(range(len(told)))
        kinds = [event["type"].removeprefix("response.") for event in told]
        deltas = kinds.count("output_text.delta")
        assert kinds == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *["output_text.delta"] * deltas,
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        assert deltas > 3 and "".join(event.get("delta", "") for event in told) == "Grüße!"
        last, item = told[-1]["response"], told[-2]["item"]
        assert last["output"] == [item] and item["content"][0]["text"] == "Grüße!"
        _, whole = await client.post("/v1/responses", json=body)
        ours = [{**reply, "id": 0, "created_at": 0, "output": 0, "usage": 0} for reply in (last, whole)]
        assert ours[0] == ours[1]

    serving(ScriptEngine(SAID), test)


def test_a_response_calls_tools():
    async def test(client: Client) -> None:
        body = {"input": "how wide?", "tools": [OPENAI_TOOL], "tool_choice": "auto"}
        _, reply = await client.post("/v1/responses", json=body)
        text, *calls = reply["output"]
        assert text["content"][0]["text"] == "I look."
        assert [(call["name"], json.loads(call["arguments"])["of"]) for call in calls] == [
            ("size", "lid"),
            ("size", "box"),
        ]
        assert len({call["call_id"] for call in calls}) == len({item["id"] for item in reply["output"]}) - 1 == 2
        told = await events(client, "/v1/responses", body)
        items = [event["item"] for event in told if event["type"] == "response.output_item.done"]
        assert [(item["type"], item.get("arguments")) for item in items] == [
            (item["type"], item.get("arguments")) for item in reply["output"]
        ]
        for item in items[1:]:
            mine = [event for event in told if event.get("item_id") == item["id"]]
            assert "".join(event.get("delta", "") for event in mine) == item["arguments"]
        status, reply = await client.post(
            "/v1/responses",
            json={
                "input": [
                    {"role": "user", "content": "how wide?"},
                    *reply["output"],
                    *({"type": "function_call_output", "call_id": c["call_id"], "output": "4 cm"} for c in calls),
                ],
                "tools": [OPENAI_TOOL],
            },
        )
        assert status == 200, reply

    serving(ScriptEngine(TALK, max_length=4000), test)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": 5}, "input", "a list"),
        ({"input": []}, "input", "at least one message"),
        ({"input": [{"role": "martian", "content": "x"}]}, "input[0].role", "one of system"),
        ({"input": [{"type": "reasoning"}]}, "input[0].type", "function_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type", "input_text"),
        ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens is 0, expected an integer from 1"),
        ({"temperature": 9}, "temperature", "from 0.0 to 2.0"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores nothing"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"truncation": "auto"}, "truncation", "shorten"),
        ({"text": {"format": {"type": "poem"}}}, "text.format", "expected"),
        ({"include": ["file_search_call.results"]}, "include", "nothing of this"),
        ({"include": [{}]}, "include", "nothing of this"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "only"),
        ({"nonsense": 1}, "nonsense", "no such field"),
    ],
)
def test_a_response_says_what_is_wrong_in_its_own_words(fields: dict[str, Any], param: str, words: str):
    async def test(client: Client) -> None:
        status, reply = await client.post("/v1/responses", json={"input": "hello", **fields})
        assert status == 400 and (reply["error"]["param"] or "").startswith(param), reply
        assert words in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


ONE = {"max_tokens": 50, "messages": [{"role": "user", "content": "hello"}]}


def test_a_message_is_the_chat_s_answer(folder: Path):
    async def test(client: Client) -> None:
        system = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
        body = ONE | {"model": "tiny:manual", "system": system}
        status, reply = await client.post("/v1/messages", json=body, headers={"anthropic-version": "2023-06-01"})
        prompt = len(b"s:Be kind.\nu:hello\na:")
        assert status == 200 and reply.pop("id").startswith("msg_")
        assert reply == {
            "type": "message",
            "role": "assistant",
            "model": "tiny:manual",
            "content": [{"type": "text", "text": "Grüße!"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": prompt,
                "cache_read_input_tokens": 0,
                "cache_creation_input_tokens": 0,
                "output_tokens": len(SAID),
                "cartridge_tokens": 5,
            },
        }
        _, again = await client.post("/v1/messages", json=body)
        assert again["usage"]["cache_read_input_tokens"] == prompt - 1 and again["usage"]["input_tokens"] == 1
        _, reply = await client.post("/v1/messages", json=body | {"stop_sequences": ["xyz", "üß"]})
        assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "üß")
        _, reply = await client.post("/v1/messages", json=body | {"max_tokens": 2})
        assert reply["stop_reason"] == "max_tokens"
        _, counted = await client.post("/v1/messages/count_tokens", json={"messages": ONE["messages"], "system": "X"})
        assert counted == {"input_tokens": len(b"s:X\nu:hello\na:")}
        opened = [*ONE["messages"], {"role": "assistant", "content": "He"}]
        _, counted = await client.post("/v1/messages/count_tokens", json={"messages": opened})
        assert counted == {"input_tokens": len(b"u:hello\na:He")}, "an answer goes on with what it begins with"

    serving(ScriptEngine(SAID), test, folder)


def test_a_message_streams_what_it_is():
    async def test(client: Client) -> None:
        told = await events(client, "/v1/messages", ONE)
        kinds = [event["type"] for event in told]
        deltas = kinds.count("content_block_delta")
        assert kinds == [
            *("message_start", "content_block_start"),
            *["content_block_delta"] * deltas,
            *("content_block_stop", "message_delta", "message_stop"),
        ]
        assert "".join(event["delta"].get("text", "") for event in told if "delta" in event) == "Grüße!"
        assert told[0]["message"]["content"] == [] and told[0]["message"]["stop_reason"] is None
        assert told[-2]["delta"]["stop_reason"] == "end_turn" and told[-2]["usage"]["output_tokens"] == len(SAID)

    serving(ScriptEngine(SAID), test)


def test_a_message_calls_tools():
    async def test(client: Client) -> None:
        body = ONE | {"max_tokens": 500, "tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "auto"}}
        _, reply = await client.post("/v1/messages", json=body)
        text, *uses = reply["content"]
        assert text == {"type": "text", "text": "I look."} and reply["stop_reason"] == "tool_use"
        assert [(use["name"], use["input"]) for use in uses] == [("size", {"of": "lid"}), ("size", {"of": "box"})]
        told = await events(client, "/v1/messages", body)
        for use, index in zip(uses, (1, 2), strict=True):
            mine = [event for event in told if event.get("index") == index]
            assert mine[0]["content_block"] | {"id": 0} == use | {"id": 0, "input": {}}
            assert json.loads("".join(event["delta"]["partial_json"] for event in mine[1:-1])) == use["input"]
        results = [{"type": "tool_result", "tool_use_id": use["id"], "content": "4 cm"} for use in uses]
        history = [
            *ONE["messages"],
            {"role": "assistant", "content": reply["content"]},
            {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
        ]
        status, reply = await client.post("/v1/messages", json=body | {"messages": history})
        assert status == 200, reply

    serving(ScriptEngine(TALK, max_length=4000), test)


@pytest.mark.parametrize(
    ("fields", "status", "kind", "words"),
    [
        ({"messages": []}, 400, "invalid_request_error", "at least one message"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "tool_result"),
        ({"stop_sequences": [""]}, 400, "invalid_request_error", "stop_sequences"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error", "custom"),
        ({"tool_choice": {"type": "some"}}, 400, "invalid_request_error", "tool, auto, any"),
        ({"tool_choice": {"type": {}}}, 400, "invalid_request_error", "tool, auto, any"),
        ({"mcp_servers": [{"url": "x"}]}, 400, "invalid_request_error", "called by the client"),
        ({"model": "claude"}, 404, "not_found_error", "does not exist"),
        ({"max_tokens": 500}, 400, "invalid_request_error", "maximum context length is 400 tokens"),
    ],
)
def test_a_message_says_what_is_wrong_in_its_own_shape(fields: dict[str, Any], status: int, kind: str, words: str):
    async def test(client: Client) -> None:
        got, reply = await client.post("/v1/messages", json=ONE | fields)
        assert got == status and reply["type"] == "error" and reply["error"]["type"] == kind, reply
        assert words in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


def test_a_stream_that_fails_says_so():
    async def test(client: Client) -> None:
        told = await events(client, "/v1/messages", ONE | {"max_tokens": 350})
        assert told[-1]["error"]["type"] == "timeout_error"
        told = await events(client, "/v1/responses", {"input": "hello"})
        assert told[-1]["type"] == "response.failed" and told[-1]["response"]["error"]["code"] == "timeout"

    serving(ScriptEngine(list(b"abc"), max_num_seqs=1, pause=0.01), test, max_seconds=0.3)


def test_tokens_are_counted_as_the_chat_counts_them(folder: Path):
    async def test(client: Client) -> None:
        tag = {"role": "system", "content": '<cartridge>{"id": "manual"}</cartridge>'}
        talk = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hello"}]
        for more in (
            {},
            {"model": "tiny:manual"},
            {"cartridges": [{"id": "manual"}]},
            {"messages": [tag, *talk]},
            {"tools": [{"type": "function", "function": {"name": "size", "parameters": SCHEMA}}]},
            {"chat_template_kwargs": {"enable_thinking": True}},
        ):
            body = {"messages": talk, **more}
            _, chat = await client.chat(**body, max_tokens=1, return_token_ids=True)
            _, counted = await client.post("/tokenize", json=body)
            assert counted["tokens"] == chat["prompt_token_ids"] and counted["count"] == chat["usage"]["prompt_tokens"]
            slots = chat["usage"]["prompt_tokens_details"]["cartridge_tokens"]
            assert counted["max_model_len"] == 4000 - slots
        _, text = await client.post("/tokenize", json={"prompt": "hi", "model": "tiny:manual"})
        assert text["tokens"] == [*b"hi"], "a cartridge holds the beginning of the text"

    serving(ScriptEngine(SAID, max_length=4000), test, folder)
