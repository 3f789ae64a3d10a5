"""Fields of a request and errors of the API, as checked Python values; no thread, no array."""

from __future__ import annotations

import asyncio
import difflib
import functools
import json
import math
import reprlib
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from aiohttp import web

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.store import SOURCES, CartridgeStore, Reference, UnknownCartridge

MAX_STOPS = 16
MAX_CARTRIDGES = 8  # in one request
SEEDS = 2**31
# What a message's role may be, and what chat templates call it.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
BODY_SECONDS = 60.0  # for a request's body to arrive
RETRY_AFTER_SECONDS = 1
MAX_STOP_LENGTH = 1024  # characters
TAG, END_TAG = "<cartridge>", "</cartridge>"
WINDOW_BITS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
MAX_DEPTH = 200  # of lists and objects within one another; Python's JSON gives up at about 900, wherever it is then
to_json = functools.partial(json.dumps, allow_nan=False)  # NaN is no JSON, and nobody else could read it
PIECE = 64  # items of a list that are encoded at once


def to_json_in_pieces(value: Any) -> str:
    """Encodes a reply as `to_json` does, but in pieces: no other thread gets a turn while `json` encodes one."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{to_json(name)}: {to_json_in_pieces(part)}' for name, part in value.items())}}}"
    if isinstance(value, list):
        pieces = (to_json(value[i : i + PIECE])[1:-1] for i in range(0, len(value), PIECE))
        return f"[{', '.join(pieces)}]"
    return to_json(value)


def from_json(written: str | bytes, finite: bool = True) -> Any:
    """The value that JSON stands for, if `to_json` can write it, too: of `finite` numbers, and not too deep.

    Raises: ValueError, as `json` does.
    """
    number = _finite if finite else float
    try:
        value = json.loads(written, parse_constant=number, parse_float=number)
    except RecursionError:
        raise UserError(f"it is nested deeper than {MAX_DEPTH} times") from None
    opened = (b"[", b"{") if isinstance(written, bytes) else ("[", "{")
    may_be_deep = sum(map(written.count, opened)) > MAX_DEPTH
    inner = _containers([value]) if may_be_deep else []
    for _ in range(MAX_DEPTH):
        if not inner:
            return value
        inner = [part for whole in inner for part in _containers(whole.values() if isinstance(whole, dict) else whole)]
    raise UserError(f"it is nested deeper than {MAX_DEPTH} times")


def object_of(written: str) -> dict[str, Any]:
    """The object that a model wrote as JSON; an empty one, if it was cut, or is none."""
    try:
        value = from_json(written)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _containers(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if type(value) in (dict, list)]


def _finite(written: str) -> float:
    value = float(written)
    if not math.isfinite(value):
        raise UserError(f"{written[:20]} is no finite number")
    return value


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        extra = {429: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        return web.json_response(self.body, status=self.status, headers=extra.get(self.status), dumps=to_json)


class Fields:
    """A JSON object, read field by field; null is as good as absent, and every complaint names its field."""

    def __init__(self, values: object, name: str = "the body", size: int = 0):
        if not isinstance(values, dict):
            raise ApiError(400, f"{name} is not a JSON object", code="invalid_value")
        self.values, self.size = values, size

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name)
        return default if value is None else value

    def has_only(self, *known: str) -> None:
        """Refuses names beside these, since nobody could say what they would have changed. Raises: ApiError."""
        for name in self.values:
            if name not in known and self.get(name) is not None:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else "/openapi.json lists the fields that there are"
                refuse(name[:80], self.get(name), f"nothing: there is no such field here ({hint})")

    def flag(self, name: str, default: bool = False) -> bool:
        return read_flag(name, self.get(name, default))

    def text(self, name: str) -> str:
        return text(name, self.get(name))


def read_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        refuse(name, value, "true or false")
    return value


def read_integer(name: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        refuse(name, value, f"an integer from {low} to {high}")
    return value


def read_number(name: str, value: object, low: float, high: float) -> float:
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        refuse(name, value, f"a number from {low} to {high}")
    return float(value)  # type: ignore[arg-type]


def token_ids(name: str, ids: object, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        refuse(name, ids, f"a list of token ids from 0 to {vocab_size - 1}")
    return tuple(ids)


async def read_body(request: web.Request) -> Fields:
    """The JSON object of a request. Raises: ApiError."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
        raw = _unpacked(raw, request.headers.get("Content-Encoding", "").strip().lower(), request.client_max_size)
        return Fields(from_json(raw, finite=False), size=len(raw))  # a number's field says what it may be
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from error
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


def _unpacked(raw: bytes, encoding: str, most: int) -> bytes:
    """The unpacked body. Unpacking ends when it has more than the `most` bytes that a body may have."""
    if encoding in ("", "identity"):
        return raw
    if encoding not in WINDOW_BITS:
        message = f"Content-Encoding is {shorten(encoding)}, expected {' or '.join(WINDOW_BITS)}, or none"
        raise ApiError(415, message, code="unsupported_encoding")
    inflating = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        body = inflating.decompress(raw, most + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not {encoding}: {error}", code="invalid_encoding") from error
    if len(body) > most:
        raise ApiError(413, f"the body has more than {most} bytes when it is unpacked", code="body_too_large")
    if not inflating.eof or inflating.unused_data:
        raise ApiError(400, f"the body is not one whole {encoding} stream: pack it again", code="invalid_encoding")
    return body


def refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ApiError(400, f"{name} is {shorten(value)}, expected {expected}", name, "invalid_value")


def shorten(value: object) -> str:
    """The beginning of a value's text, however long or deep the value is."""
    shown = _SHORT.repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxlong = 4, 20, 20, 100, 100


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(name, value, "a text without lone surrogates")
    return value


def read_messages(values: object) -> list[dict[str, Any]]:
    """Messages as chat templates take them: role, content, and what tools have to do with it."""
    if not isinstance(values, list) or not values:
        refuse("messages", values, "a list with at least one message")
    return [_read_message(f"messages[{i}]", value) for i, value in enumerate(values)]


def _read_message(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        refuse(where, value, "an object with role and content")
    content, role = value.get("content"), text(f"{where}.role", value.get("role"))
    if role not in ROLES:
        refuse(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if isinstance(content, list):
        content = "".join(_read_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    calls = value.get("tool_calls") or []
    if content is None and calls:
        content = ""  # a message that only calls
    message: dict[str, Any] = {"role": ROLES[role], "content": text(f"{where}.content", content)}
    if calls:
        if role != "assistant" or not isinstance(calls, list):
            refuse(f"{where}.tool_calls", calls, "a list, in a message of the assistant")
        message["tool_calls"] = [_read_call(f"{where}.tool_calls[{i}]", call) for i, call in enumerate(calls)]
    if role == "tool":
        message["tool_call_id"] = text(f"{where}.tool_call_id", value.get("tool_call_id"))
    for name in ("name", "reasoning_content"):
        if value.get(name) is not None:
            message[name] = text(f"{where}.{name}", value[name])
    for name, part in value.items():
        if name not in (*message, "content", "tool_calls", "tool_call_id") and part not in (None, "", [], {}):
            refuse(f"{where}.{name}", part, "nothing: messages have no such part here")
    return message


def _read_call(where: str, value: object) -> dict[str, Any]:
    """A call as it was answered; its arguments become an object, as templates take them."""
    call = Fields(value, where)
    function = Fields(call.get("function"), f"{where}.function")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = from_json(arguments or "{}")
        except ValueError:
            refuse(f"{where}.function.arguments", arguments, "JSON")
    if not isinstance(arguments, dict):
        refuse(f"{where}.function.arguments", arguments, "a JSON object")
    told = {"name": text(f"{where}.function.name", function.get("name")), "arguments": arguments}
    return {"id": text(f"{where}.id", call.get("id")), "type": "function", "function": told}


def _read_part(where: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        refuse(where, part, 'a part of type "text"')
    return text(f"{where}.text", part.get("text"))


def read_texts(name: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse(name, values, f"a list of at most {MAX_STOPS} texts")
    texts = tuple(text(name, value) for value in values)
    if not all(0 < len(one) <= MAX_STOP_LENGTH for one in texts):
        refuse(name, values, f"texts that are not empty, of at most {MAX_STOP_LENGTH} characters")
    return texts


def read_cartridges(value: object) -> tuple[Reference, ...]:
    """`cartridges: [{"id", "source", "force_redownload"}]`, in their order."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_CARTRIDGES:
        example = '[{"id": "manual", "source": "local"}]'
        refuse("cartridges", value, f"a list of at most {MAX_CARTRIDGES} like {example}")
    return tuple(read_reference(f"cartridges[{i}]", part) for i, part in enumerate(value))


def read_reference(where: str, value: object) -> Reference:
    fields = Fields(value, where)
    fields.has_only("id", "source", "force_redownload")
    source = fields.get("source", "local")
    if not isinstance(source, str) or source not in SOURCES:
        refuse(f"{where}.source", source, f"one of {', '.join(SOURCES)}")
    return Reference(text(f"{where}.id", fields.get("id")), source, fields.flag("force_redownload"))


def check_cartridges(
    store: CartridgeStore, references: Sequence[Reference], param: str, code: str = "cartridge_not_found"
) -> None:
    """Refuses cartridges that the store cannot have, as far as it knows at once. Raises: ApiError."""
    try:
        store.check(references)
    except UserError as error:
        raise ApiError(400, str(error), param, "invalid_value") from error
    except UnknownCartridge as error:
        raise ApiError(404, str(error), param, code) from error


def take_tags(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], tuple[Reference, ...]]:
    """Cartridges that system messages name as `<cartridge>{"id": …}</cartridge>`, and the messages without them.

    A system message that held nothing else is left out, since a cartridge takes its place.
    """
    kept, found = [], []
    for message in messages:
        content, tags = _split(message["content"]) if message["role"] == "system" else (message["content"], [])
        found += tags
        content = content.strip() if tags else content
        if content or not tags:
            kept.append(message | {"content": content})
    if len(found) > MAX_CARTRIDGES:
        refuse("messages", found, f"at most {MAX_CARTRIDGES} cartridges")
    return kept, tuple(map(_read_tag, found))


def _split(content: str) -> tuple[str, list[str]]:
    """The text without its tags, and what stands in them; each character is looked at once."""
    kept, tags, start = [], [], 0
    while (opened := content.find(TAG, start)) >= 0 and (closed := content.find(END_TAG, opened + len(TAG))) >= 0:
        kept.append(content[start:opened])
        tags.append(content[opened + len(TAG) : closed])
        start = closed + len(END_TAG)
    return "".join([*kept, content[start:]]), tags


def _read_tag(tag: str) -> Reference:
    try:
        return read_reference("<cartridge>", from_json(tag))
    except ValueError:
        refuse("<cartridge>", tag, 'JSON like {"id": "manual", "source": "local"}')
