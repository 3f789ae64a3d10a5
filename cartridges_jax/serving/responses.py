"""OpenAI's `/v1/responses`, read as a chat and told as output items; https://platform.openai.com/docs/api-reference.

Nothing is stored: a conversation goes on by sending its items again, as clients do that set `store` to false.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aiohttp import web

from cartridges_jax.serving.answers import Answer
from cartridges_jax.serving.choices import Delta
from cartridges_jax.serving.dialects import event, joined_text, passed_on, read_list, renamed
from cartridges_jax.serving.fields import FieldTable
from cartridges_jax.serving.parts import Part, Parts, Step, parts_of
from cartridges_jax.serving.protocol import ApiError, Fields, refuse, text, to_json
from cartridges_jax.serving.requests import GenerationRequest, Reader

TEXTS = ("input_text", "output_text", "text")
# What the chat calls the fields of a response.
NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
# Fields of a request that its response repeats.
ECHOED = ("instructions", "max_output_tokens", "parallel_tool_calls", "temperature", "tools", "top_p", "truncation")
REASONING = "reasoning.encrypted_content"  # which clients want where nothing is stored; there is none
STORED = "this server stores nothing: send the whole conversation as input"


_field = functools.partial(passed_on, "responses")
TABLE = FieldTable(
    (
        _field("model", {"type": "string"}, "The model, or `model:CARTRIDGE`."),
        _field("cartridges", {"type": "array"}, "Cartridges in front of the input, in their order."),
        _field("input", {"type": ["string", "array"]}, "A text, or the items of a conversation."),
        _field("instructions", {"type": "string"}, "The system message."),
        _field("max_output_tokens", {"type": "integer"}, "The most tokens of the answer."),
        _field("temperature", {"type": "number"}, "0 takes the best token.", 1.0),
        _field("top_p", {"type": "number"}, "Keeps the best tokens of so much probability.", 1.0),
        _field("stream", {"type": "boolean"}, "Sends the answer as it is written.", False),
        _field("stream_options", {"type": "object"}, "Accepted; it changes no answer."),
        _field("text", {"type": "object"}, "`format`: text, json_object or json_schema.", {}),
        _field("tools", {"type": "array"}, "Functions that may be called.", []),
        _field("tool_choice", {}, "none, auto, required or a function."),
        _field("parallel_tool_calls", {"type": "boolean"}, "Whether one answer may call several.", True),
        _field("include", {"type": "array"}, "Nothing more than the answer is told.", []),
        _field("truncation", {"type": "string"}, "", "disabled", "shorten the input instead"),
        _field("background", {"type": "boolean"}, "", False, "answers are written while the client waits"),
        _field("previous_response_id", {"type": "string"}, refused=STORED),
        _field("conversation", {}, refused=STORED),
        _field("prompt", {}, refused=STORED),
        _field("max_tool_calls", {"type": "integer"}, refused="tools are called by the client"),
        _field("top_logprobs", {"type": "integer"}, "", 0, "/v1/chat/completions tells log-probabilities"),
        _field("reasoning", {"type": "object"}, refused="models here take chat_template_kwargs of a chat completion"),
    )
)


class Response:
    """One request to `/v1/responses`."""

    def __init__(self, reader: Reader, body: Fields):
        self._reader, self._body = reader, body
        self._echoed: dict[str, Any] = {}  # what its response repeats

    def read(self) -> GenerationRequest:
        asked = TABLE.read(self._body, "responses")
        for name in read_list("include", asked["include"]):
            if name != REASONING:
                refuse("include", name, "nothing of this: the answer is all that is told")
        names = ("model", "cartridges", "temperature", "top_p", "stream", "parallel_tool_calls")
        chat = {
            **{name: asked[name] for name in names},
            "messages": _messages(asked["instructions"], asked["input"]),
            "max_completion_tokens": asked["max_output_tokens"],
            "tools": [_nested(f"tools[{i}]", tool) for i, tool in enumerate(read_list("tools", asked["tools"]))],
            "tool_choice": asked["tool_choice"] and _nested("tool_choice", asked["tool_choice"]),
            "response_format": _response_format(Fields(asked["text"], "text")),
        }
        self._echoed = {
            **{name: asked[name] for name in ECHOED},
            "tool_choice": asked["tool_choice"] or "auto",
            "text": {"format": {"type": "text"}} | asked["text"],
            "metadata": self._body.get("metadata", {}),
        }
        for name, value in self._echoed.items():
            try:
                to_json(value)
            except ValueError:
                refuse(name, value, "JSON, of finite numbers")
        try:
            return self._reader.chat(Fields(chat, size=self._body.size))
        except ApiError as error:
            raise renamed(error, NAMES) from error

    def whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        return self.told(answer, parts_of(deltas[0]), str(deltas[0].finish_reason))

    def writer(self, answer: Answer) -> ResponseWriter:
        return ResponseWriter(self, answer)

    @staticmethod
    def refusal(error: ApiError) -> web.Response:
        return error.response()

    def told(
        self, answer: Answer, parts: Sequence[Part], finish_reason: str | None, error: ApiError | None = None
    ) -> dict[str, Any]:
        """The response as it is now: in progress without a reason for its end, or failed with an error."""
        statuses = {None: "in_progress", "length": "incomplete"}
        status = "failed" if error else statuses.get(finish_reason, "completed")
        item_status = "incomplete" if status == "incomplete" else "completed"
        return {
            "id": f"resp_{answer.id}",
            "object": "response",
            "created_at": answer.created,
            "model": answer.generation.model,
            "status": status,
            "output": [item_of(answer, part, item_status) for part in parts],
            "error": error and {"code": error.code or "server_error", "message": error.message},
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "usage": _usage(answer) if finish_reason else None,
            **self._echoed,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
        }


class ResponseWriter:
    """Tells a response as events with names and numbers."""

    def __init__(self, response: Response, answer: Answer):
        self._response, self._answer = response, answer
        self._parts = Parts()
        self._finish_reason: str | None = None
        self._number = 0

    def begin(self) -> Iterable[bytes]:
        return [self._event(f"response.{name}", response=self._told()) for name in ("created", "in_progress")]

    def push(self, _: int, delta: Delta) -> Iterable[bytes]:
        self._finish_reason = delta.finish_reason or self._finish_reason
        return [written for step in self._parts.push(delta) for written in self._step(step)]

    def end(self) -> Iterable[bytes]:
        steps = [written for step in self._parts.end() for written in self._step(step)]
        told = self._told()
        return [*steps, self._event(f"response.{told['status']}", response=told)]

    def fail(self, error: ApiError) -> Iterable[bytes]:
        return [self._event("response.failed", response=self._told(error))]

    def _told(self, error: ApiError | None = None) -> dict[str, Any]:
        return self._response.told(self._answer, self._parts.all, self._finish_reason, error)

    def _step(self, step: Step) -> Iterator[bytes]:
        kind, part, piece = step
        ended = "incomplete" if self._finish_reason == "length" else "completed"
        item = item_of(self._answer, part, "in_progress" if kind == "open" else ended)
        place = {"output_index": part.index}
        inside = place | {"item_id": item["id"]} | ({} if part.name else {"content_index": 0})
        said = "function_call_arguments" if part.name else "output_text"
        logprobs = {} if part.name else {"logprobs": []}
        if kind == "add":
            yield self._event(f"response.{said}.delta", **inside, delta=piece, **logprobs)
            return
        if kind == "open":
            yield self._event("response.output_item.added", **place, item=item | ({} if part.name else {"content": []}))
            if not part.name:
                yield self._event("response.content_part.added", **inside, part=item["content"][0])
            return
        written = {"arguments": part.text, "name": part.name} if part.name else {"text": part.text}
        yield self._event(f"response.{said}.done", **inside, **written, **logprobs)
        if not part.name:
            yield self._event("response.content_part.done", **inside, part=item["content"][0])
        yield self._event("response.output_item.done", **place, item=item)

    def _event(self, type: str, **fields: Any) -> bytes:
        self._number += 1
        return event({"type": type, "sequence_number": self._number - 1, **fields}, type)


def item_of(answer: Answer, part: Part, status: str) -> dict[str, Any]:
    """A part of an answer as an output item."""
    if part.name:
        told = {"type": "function_call", "id": f"fc_{answer.id}_{part.index}", "call_id": part.call_id}
        return told | {"name": part.name, "arguments": part.text, "status": status}
    content = [{"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}]
    told = {"type": "message", "id": f"msg_{answer.id}_{part.index}", "role": "assistant"}
    return told | {"status": status, "content": content}


def _usage(answer: Answer) -> dict[str, Any]:
    return {
        "input_tokens": answer.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": answer.cached_tokens,
            "cache_write_tokens": 0,
            "cartridge_tokens": answer.cartridge_tokens,
        },
        "output_tokens": answer.num_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": answer.prompt_tokens + answer.num_tokens,
    }


def _messages(instructions: object, items: object) -> list[dict[str, Any]]:
    """The messages of a chat that say the same."""
    messages: list[dict[str, Any]] = []
    if instructions is not None:
        messages.append({"role": "system", "content": text("instructions", instructions)})
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for i, value in enumerate(read_list("input", items)):
        where = f"input[{i}]"
        item = Fields(value, where)
        kind = item.get("type", "message")
        if kind == "message":
            role = text(f"{where}.role", item.get("role"))
            messages.append({"role": role, "content": joined_text(f"{where}.content", item.get("content"), TEXTS)})
        elif kind == "function_call":
            function = {name: item.get(name) for name in ("name", "arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            said = joined_text(f"{where}.output", item.get("output"), TEXTS)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": said})
        else:
            refuse(f"{where}.type", kind, "message, function_call or function_call_output")
    return messages


def _nested(where: str, value: object) -> object:
    """A tool, or the choice of one, as chats have it: what a function is stands in a `function` of its own."""
    if not isinstance(value, dict) or value.get("type") != "function":
        return value  # which the chat takes or refuses
    return {"type": "function", "function": {name: part for name, part in value.items() if name != "type"}}


def _response_format(options: Fields) -> dict[str, Any] | None:
    for name in options.values:
        if name != "format" and options.get(name) not in (None, "medium"):
            refuse(f"text.{name}", options.get(name), "nothing: only text.format is taken")
    asked = options.get("format")
    if not isinstance(asked, dict) or asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": {name: part for name, part in asked.items() if name != "type"}}
