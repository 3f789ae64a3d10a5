"""Requests and errors of the API, as checked Python values; no socket, no thread, no array.

API shapes: OpenAI's chat completions, with vLLM's `return_token_ids`, `return_tokens_as_token_ids` and
`prompt_logprobs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from aiohttp import web

from cartridges_jax.serving.scheduler import Request

MAX_STOPS = 16
SEEDS = 2**31
RETRY_AFTER_SECONDS = 1
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


@dataclass(frozen=True)
class Call:
    """A chat completion that is asked for, checked; `request` lacks what only the engine thread knows or decides."""

    model: str
    cartridge: str | None
    request: Request
    max_tokens: int | None  # None: as many as fit
    n: int = 1
    stops: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    prompt_logprobs: int | None = None  # so many alternatives at each token of the prompt; None: nothing about it


class Fields:
    """A JSON object, read field by field; null is as good as absent, and every complaint names its field."""

    def __init__(self, values: object):
        if not isinstance(values, dict):
            raise ApiError(400, "the body is not a JSON object")
        self._values = values

    def get(self, name: str) -> Any:
        return self._values.get(name)

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


def read_cartridge(value: object) -> str | None:
    """The id in `cartridges: [{"id", "source"}]`."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not isinstance(value[0], dict):
        refuse("cartridges", value, 'a list like [{"id": "manual", "source": "local"}]')
    if len(value) > 1:
        refuse("cartridges", value, "at most one cartridge: compose several into one file first")
    if value[0].get("source", "local") != "local":
        refuse("cartridges", value, 'the source "local": put the file into the folder of cartridges')
    return text("cartridges[0].id", value[0].get("id"))
