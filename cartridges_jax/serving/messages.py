"""Anthropic's `/v1/messages`, read as a chat and told as content blocks; https://docs.anthropic.com/en/api/messages."""

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
from cartridges_jax.serving.protocol import ApiError, Fields, object_of, refuse, text, to_json
from cartridges_jax.serving.requests import GenerationRequest, Reader

THINKING = {"enabled": True, "adaptive": True, "disabled": False}
NAMES = {"stop": "stop_sequences"}  # what the chat calls the fields of a message
TEXTS = ("text",)
CHOICES = {"auto": "auto", "any": "required", "none": "none"}
REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
ERRORS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


_field = functools.partial(passed_on, "messages")
TABLE = FieldTable(
    (
        _field("model", {"type": "string"}, "The model, or `model:CARTRIDGE`."),
        _field("cartridges", {"type": "array"}, "Cartridges in front of the prompt, in their order."),
        _field("messages", {"type": "array"}, "The conversation."),
        _field("system", {"type": ["string", "array"]}, "The system message."),
        _field("max_tokens", {"type": "integer"}, "The most tokens of the answer."),
        _field("temperature", {"type": "number"}, "0 takes the best token.", 1.0),
        _field("top_p", {"type": "number"}, "Keeps the best tokens of so much probability.", 1.0),
        _field("top_k", {"type": "integer"}, "Keeps so many best tokens.", 0),
        _field("stop_sequences", {"type": "array"}, "Texts that end the answer.", []),
        _field("stream", {"type": "boolean"}, "Sends the answer as it is written.", False),
        _field("tools", {"type": "array"}, "Functions that may be called.", []),
        _field("tool_choice", {"type": "object"}, "auto, any, none or a tool.", {}),
        _field("thinking", {"type": "object"}, "Whether the model thinks first, if its template can tell it to.", {}),
        _field("cache_control", {"type": "object"}, "Accepted: beginnings are always remembered."),
        _field("output_config", {"type": "object"}, refused="a chat completion takes response_format"),
        _field("container", {}, refused="this server runs no code"),
        _field("mcp_servers", {"type": "array"}, "", [], "tools are called by the client"),
        _field("context_management", {"type": "object"}, refused="shorten the conversation instead"),
    )
)


class Message:
    """One request to `/v1/messages`."""

    def __init__(self, reader: Reader, body: Fields):
        self._reader, self._body = reader, body

    def read(self) -> GenerationRequest:
        asked = TABLE.read(self._body, "messages")
        choice = Fields(asked["tool_choice"], "tool_choice")
        thinking = Fields(asked["thinking"], "thinking").get("type")
        if thinking not in (None, *THINKING):
            refuse("thinking.type", thinking, f"one of {', '.join(THINKING)}")
        messages = _messages(asked["system"], asked["messages"])
        chat = {
            **{name: asked[name] for name in ("model", "cartridges", "max_tokens", "temperature", "top_p", "top_k")},
            "messages": messages,
            "stop": asked["stop_sequences"],
            "stream": asked["stream"],
            "tools": [_tool(f"tools[{i}]", tool) for i, tool in enumerate(read_list("tools", asked["tools"]))],
            "tool_choice": _tool_choice(choice),
            "parallel_tool_calls": not choice.flag("disable_parallel_tool_use"),
        }
        if thinking is not None:
            chat["chat_template_kwargs"] = {"enable_thinking": THINKING[thinking]}
        if messages[-1]["role"] == "assistant":  # the answer goes on with what it begins with
            chat |= {"add_generation_prompt": False, "continue_final_message": True}
        try:
            return self._reader.chat(Fields(chat, size=self._body.size))
        except ApiError as error:
            raise renamed(error, NAMES) from error

    def whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        content = [_block(part) for part in parts_of(deltas[0])]
        return told(answer) | {"content": content, "usage": _usage(answer), **ending(answer)}

    def writer(self, answer: Answer) -> MessageWriter:
        return MessageWriter(answer)

    @staticmethod
    def refusal(error: ApiError) -> web.Response:
        response = error.response()
        response.text = to_json(_error(error))
        return response


class MessageWriter:
    """Tells a message as named events."""

    def __init__(self, answer: Answer):
        self._answer = answer
        self._parts = Parts()

    def begin(self) -> Iterable[bytes]:
        return [self._event("message_start", message=told(self._answer) | {"usage": _usage(self._answer)})]

    def push(self, _: int, delta: Delta) -> Iterable[bytes]:
        return [self._step(step) for step in self._parts.push(delta)]

    def end(self) -> Iterator[bytes]:
        yield from map(self._step, self._parts.end())
        yield self._event("message_delta", delta=ending(self._answer), usage=_usage(self._answer))
        yield self._event("message_stop")

    def fail(self, error: ApiError) -> Iterable[bytes]:
        return [event(_error(error), "error")]

    def _step(self, step: Step) -> bytes:
        kind, part, piece = step
        if kind == "open":
            empty = Part(part.index, name=part.name, call_id=part.call_id)
            return self._event("content_block_start", index=part.index, content_block=_block(empty))
        if kind == "close":
            return self._event("content_block_stop", index=part.index)
        text_delta = {"type": "text_delta", "text": piece}
        delta = {"type": "input_json_delta", "partial_json": piece} if part.name else text_delta
        return self._event("content_block_delta", index=part.index, delta=delta)

    def _event(self, type: str, **fields: Any) -> bytes:
        return event({"type": type, **fields}, type)


def told(answer: Answer) -> dict[str, Any]:
    """A message that has not begun."""
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": answer.generation.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def ending(answer: Answer) -> dict[str, Any]:
    """Why a message has ended."""
    choice = answer.choices[0]
    reason = "stop_sequence" if choice.stop_string is not None else REASONS[str(choice.finish_reason)]
    return {"stop_reason": reason, "stop_sequence": choice.stop_string}


def _block(part: Part) -> dict[str, Any]:
    """A part of an answer as a content block."""
    if not part.name:
        return {"type": "text", "text": part.text}
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": object_of(part.text)}


def _usage(answer: Answer) -> dict[str, Any]:
    """Counts of tokens; those that were remembered are no input here, but counted apart."""
    return {
        "input_tokens": answer.prompt_tokens - answer.cached_tokens,
        "cache_read_input_tokens": answer.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": answer.num_tokens,
        "cartridge_tokens": answer.cartridge_tokens,
    }


def _error(error: ApiError) -> dict[str, Any]:
    return {"type": "error", "error": {"type": ERRORS.get(error.status, "api_error"), "message": error.message}}


def _messages(system: object, values: object) -> list[dict[str, Any]]:
    """The messages of a chat that say the same."""
    messages = []
    if system is not None:
        messages.append({"role": "system", "content": joined_text("system", system, TEXTS)})
    for i, value in enumerate(read_list("messages", values)):
        where = f"messages[{i}]"
        message = Fields(value, where)
        role, content = text(f"{where}.role", message.get("role")), message.get("content")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif role == "assistant":
            messages.append(_assistant(f"{where}.content", content))
        elif role == "user":
            messages += _user(f"{where}.content", content)
        else:
            refuse(f"{where}.role", role, "user or assistant")
    if not messages:
        refuse("messages", values, "a list with at least one message")
    return messages


def _assistant(where: str, blocks: object) -> dict[str, Any]:
    said, thought, calls = "", "", []
    for i, value in enumerate(read_list(where, blocks)):
        block = Fields(value, f"{where}[{i}]")
        kind = block.get("type")
        if kind == "text":
            said += text(f"{where}[{i}].text", block.get("text"))
        elif kind == "thinking":
            thought += text(f"{where}[{i}].thinking", block.get("thinking"))
        elif kind == "tool_use":
            function = {"name": block.get("name"), "arguments": block.get("input", {})}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        else:
            refuse(f"{where}[{i}].type", kind, "text, thinking or tool_use")
    message: dict[str, Any] = {"role": "assistant", "content": said}
    if thought:
        message["reasoning_content"] = thought
    return message | ({"tool_calls": calls} if calls else {})


def _user(where: str, blocks: object) -> Iterator[dict[str, Any]]:
    """What tools gave, each a message, and what the user says."""
    said, is_result = "", False
    for i, value in enumerate(read_list(where, blocks)):
        block = Fields(value, f"{where}[{i}]")
        kind = block.get("type")
        if kind == "text":
            said += text(f"{where}[{i}].text", block.get("text"))
        elif kind == "tool_result":
            is_result = True
            id = text(f"{where}[{i}].tool_use_id", block.get("tool_use_id"))
            given = joined_text(f"{where}[{i}].content", block.get("content", ""), TEXTS)
            given = f"Error: {given}" if block.flag("is_error") else given
            yield {"role": "tool", "tool_call_id": id, "content": given}
        else:
            refuse(f"{where}[{i}].type", kind, "text or tool_result")
    if said or not is_result:
        yield {"role": "user", "content": said}


def _tool(where: str, value: object) -> dict[str, Any]:
    tool = Fields(value, where)
    if tool.get("type", "custom") != "custom":
        refuse(f"{where}.type", tool.get("type"), "custom: tools are called by the client")
    function = {"name": tool.get("name"), "description": tool.get("description", ""), "strict": tool.get("strict")}
    return {"type": "function", "function": function | {"parameters": tool.get("input_schema")}}


def _tool_choice(choice: Fields) -> object:
    kind = choice.get("type")
    if kind is None:
        return None
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind not in tuple(CHOICES):  # it may be anything, also what has no hash
        refuse("tool_choice.type", kind, f"tool, {', '.join(CHOICES)}")
    return CHOICES[kind]
