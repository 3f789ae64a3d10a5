"""Fields of a request and errors of the API, as checked Python values; no thread, no array."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, NoReturn

from aiohttp import web

from cartridges_jax.serving.store import SOURCES, Reference

MAX_STOPS = 16
MAX_CARTRIDGES = 8  # in one request
SEEDS = 2**31
BODY_SECONDS = 60.0  # for a request's body to arrive
RETRY_AFTER_SECONDS = 1
TAG = re.compile(r"<cartridge>(.*?)</cartridge>", re.DOTALL)
# Fields that would change the answer and that are not there yet: asking for them is refused, a neutral value is not.
UNSUPPORTED: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_p": 0,
    "logit_bias": {},
    "tools": [],
    "response_format": {"type": "text"},
    "continue_final_message": False,
    "echo": False,
    "suffix": "",
    "best_of": 1,
}


class ApiError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = (
            "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
            if self.status < 500
            else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> web.Response:
        extra = {429: {"Retry-After": str(RETRY_AFTER_SECONDS)}, 401: {"WWW-Authenticate": "Bearer"}}
        return web.json_response(self.body, status=self.status, headers=extra.get(self.status))


class Fields:
    """A JSON object, read field by field; null is as good as absent, and every complaint names its field."""

    def __init__(self, values: object, name: str = "the body", size: int = 0):
        if not isinstance(values, dict):
            raise ApiError(400, f"{name} is not a JSON object", code="invalid_value")
        self.values, self.size = values, size

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = default if self.get(name) is None else self.get(name)
        if not isinstance(value, bool):
            refuse(name, value, "true or false")
        return value

    def integer(self, name: str, default: Any, low: int, high: int) -> Any:
        value = default if self.get(name) is None else self.get(name)
        if value is not default and (type(value) is not int or not low <= value <= high):
            refuse(name, value, f"an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = default if self.get(name) is None else self.get(name)
        if type(value) not in (int, float) or not low <= value <= high:
            refuse(name, value, f"a number from {low} to {high}")
        return float(value)

    def text(self, name: str) -> str:
        return text(name, self.get(name))

    def group(self, name: str) -> Fields:
        return Fields({} if self.get(name) is None else self.get(name), name)


async def read_body(request: web.Request) -> Fields:
    """The JSON object of a request. Raises: ApiError."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await request.read()
        return Fields(json.loads(raw), size=len(raw))
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error


def refuse(name: str, value: object, expected: str) -> NoReturn:
    raise ApiError(400, f"{name} is {shorten(value)}, expected {expected}", name, "invalid_value")


def shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def text(name: str, value: object) -> str:
    if not isinstance(value, str):
        refuse(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse(name, value, "a text without lone surrogates")
    return value


def read_messages(values: object) -> list[dict[str, str]]:
    if not isinstance(values, list) or not values:
        refuse("messages", values, "a list with at least one message")
    return [_read_message(f"messages[{i}]", value) for i, value in enumerate(values)]


def _read_message(where: str, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        refuse(where, value, "an object with role and content")
    content = value.get("content")
    if isinstance(content, list):
        content = "".join(_read_part(f"{where}.content[{i}]", part) for i, part in enumerate(content))
    return {"role": text(f"{where}.role", value.get("role")), "content": text(f"{where}.content", content)}


def _read_part(where: str, part: object) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        refuse(where, part, 'a part of type "text"')
    return text(f"{where}.text", part.get("text"))


def read_stops(value: object) -> tuple[str, ...]:
    values = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > MAX_STOPS:
        refuse("stop", value, f"a text or a list of at most {MAX_STOPS}")
    stops = tuple(text("stop", stop) for stop in values)
    if "" in stops:
        refuse("stop", value, "texts that are not empty")
    return stops


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
    source = "local" if fields.get("source") is None else fields.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        refuse(f"{where}.source", source, f"one of {', '.join(SOURCES)}")
    return Reference(text(f"{where}.id", fields.get("id")), source, fields.flag("force_redownload"))


def take_tags(messages: list[dict[str, str]]) -> tuple[list[dict[str, str]], tuple[Reference, ...]]:
    """Cartridges that system messages name as `<cartridge>{"id": …}</cartridge>`, and the messages without them.

    A system message that held nothing else is left out, since a cartridge takes its place.
    """
    kept, found = [], []
    for message in messages:
        tags = TAG.findall(message["content"]) if message["role"] == "system" else []
        found += [_read_tag(tag) for tag in tags]
        content = TAG.sub("", message["content"]).strip() if tags else message["content"]
        if content or not tags:
            kept.append(message | {"content": content})
    return kept, tuple(found)


def _read_tag(tag: str) -> Reference:
    try:
        return read_reference("<cartridge>", json.loads(tag))
    except (ValueError, RecursionError):
        refuse("<cartridge>", tag, 'JSON like {"id": "manual", "source": "local"}')
