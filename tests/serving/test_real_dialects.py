"""Forms and calls over `/v1/responses` and `/v1/messages`, of a tiny real model that knows nothing."""

from __future__ import annotations

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
from test_real_fields import SCHEMA, client  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)

__all__ = ["client"]  # a fixture
ASKED: Any = {"model": "tiny", "input": "Which cat?", "max_output_tokens": 300, "temperature": 1.0}


class Cat(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["cat", "owl"]
    weight: Literal[1, 2, 3]


def test_a_response_keeps_to_a_schema(client: openai.OpenAI):
    form: Any = {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}
    made = client.responses.create(**ASKED, text={"format": form})
    jsonschema.validate(json.loads(made.output_text), SCHEMA)
    assert made.status == "completed"
    parsed = client.responses.parse(**ASKED, text_format=Cat).output_parsed
    assert isinstance(parsed, Cat) and parsed.weight in (1, 2, 3)


def test_a_response_calls_what_it_must(client: openai.OpenAI):
    tool: Any = {"type": "function", "name": "weigh", "parameters": SCHEMA, "strict": True}
    (call,) = client.responses.create(**ASKED, tools=[tool], tool_choice="required", parallel_tool_calls=False).output
    assert call.type == "function_call" and call.name == "weigh"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    with client.responses.stream(**ASKED, tools=[tool], tool_choice={"type": "function", "name": "weigh"}) as stream:
        (streamed,) = stream.get_final_response().output
    assert streamed.type == "function_call"
    jsonschema.validate(json.loads(streamed.arguments), SCHEMA)


def test_a_message_calls_what_it_must(client: openai.OpenAI):
    tools = [{"name": "weigh", "input_schema": SCHEMA}, {"name": "clock", "input_schema": {"type": "object"}}]
    body = {"max_tokens": 300, "messages": [{"role": "user", "content": "Which cat?"}], "tools": tools}
    for choice in ({"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weigh"}):
        reply: Any = client.post("/messages", body=body | {"tool_choice": choice}, cast_to=object)
        (use,) = reply["content"]
        assert use["type"] == "tool_use" and reply["stop_reason"] == "tool_use"
        if use["name"] == "weigh":
            jsonschema.validate(use["input"], SCHEMA)
