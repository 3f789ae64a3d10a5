"""What an API has to say for its requests to be answered as chats: its words for the question and for the answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from aiohttp import web

from cartridges_jax.serving.answers import Answer
from cartridges_jax.serving.choices import Delta
from cartridges_jax.serving.fields import Field, Kind, Route, Schema
from cartridges_jax.serving.protocol import ApiError, Fields, refuse, text, to_json
from cartridges_jax.serving.requests import GenerationRequest, Reader

DONE = b"data: [DONE]\n\n"


class EventWriter(Protocol):
    """Tells one answer as server-sent events while it is written."""

    def begin(self) -> Iterable[bytes]: ...

    def push(self, index: int, delta: Delta) -> Iterable[bytes]:
        """What tells a piece of the choice with this index."""

    def end(self) -> Iterable[bytes]: ...

    def fail(self, error: ApiError) -> Iterable[bytes]:
        """What ends an answer that has begun and cannot go on."""


class Dialect(Protocol):
    """One request of an API: it is made of a body, and first read."""

    def __init__(self, reader: Reader, body: Fields): ...

    def read(self) -> GenerationRequest:
        """What is asked for. Raises: ApiError."""

    def whole(self, answer: Answer, deltas: Sequence[Delta]) -> dict[str, Any]:
        """A finished answer in one piece."""

    def writer(self, answer: Answer) -> EventWriter: ...

    @staticmethod
    def refusal(error: ApiError) -> web.Response: ...


class ChunkWriter:
    """Tells answers as OpenAI's chat completions and completions do: in chunks."""

    def __init__(self, answer: Answer):
        self._answer = answer

    def begin(self) -> Iterable[bytes]:
        return [event(self._answer.first_chunk(index)) for index in range(self._answer.generation.num_choices)]

    def push(self, index: int, delta: Delta) -> Iterable[bytes]:
        chunk = self._answer.chunk(index, delta)
        return [event(chunk)] if chunk else []

    def end(self) -> Iterable[bytes]:
        return [event(self._answer.usage_chunk()), DONE] if self._answer.generation.include_usage else [DONE]

    def fail(self, error: ApiError) -> Iterable[bytes]:
        return [event(error.body), DONE]


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    """A server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {to_json(data)}\n\n".encode()


def passed_on(
    route: Route, name: str, schema: Schema, meaning: str = "", default: Any = None, refused: str = ""
) -> Field:
    """A field of a route whose value the chat reads; or one that is `refused`, and why."""
    return Field(name, Kind(lambda _, value: value, schema), meaning, default, (route,), refused)


def read_list(name: str, value: object) -> list[Any]:
    return value if isinstance(value, list) else refuse(name, value, "a list")


def joined_text(where: str, content: object, types: Collection[str]) -> str:
    """A text, or that of a list of parts of these types, one behind the other."""
    if isinstance(content, str):
        return content
    said = []
    for i, value in enumerate(read_list(where, content)):
        part = Fields(value, f"{where}[{i}]")
        if part.get("type") not in types:
            refuse(f"{where}[{i}].type", part.get("type"), " or ".join(types))
        said.append(text(f"{where}[{i}].text", part.get("text")))
    return "".join(said)


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """An error of the chat that a request was read as, in the words of the request."""
    for ours, theirs in names.items():
        if error.param and (error.param == ours or error.param.startswith((f"{ours}.", f"{ours}["))):
            param, message = (text.replace(ours, theirs, 1) for text in (error.param, error.message))
            return ApiError(error.status, message, param, error.code)
    return error
