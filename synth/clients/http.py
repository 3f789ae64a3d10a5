"""One attempt at one request, and every way in which it can fail as `Refused`, `Unavailable` or `Busy`."""

from __future__ import annotations

import email.utils
import json
import time
from typing import Any, Self

import aiohttp

from command_line import files
from command_line.errors import UserError
from synth.clients.base import Busy, Refused, Unavailable
from synth.config import ClientConfig


class Http:
    """A session with one server, an async context manager; `timeout` seconds are for a whole request and its reply."""

    def __init__(self, timeout: float, api_key: str | None = None):
        self._timeout, self._api_key = timeout, api_key

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # whoever calls bounds the requests in flight
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def get(self, url: str) -> Any:
        return parse(await self._bytes("GET", url, None), url)

    async def post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        """A JSON object for a JSON object."""
        reply = parse(await self._bytes("POST", url, body), url)
        if not isinstance(reply, dict):
            raise Unavailable(f"{url} gave a reply that is not a JSON object: {str(reply)[:100]!r}", "broken reply")
        return reply

    async def post_for_bytes(self, url: str, body: dict[str, Any]) -> bytes:
        return await self._bytes("POST", url, body)

    async def models(self, url: str) -> list[str]:
        """The models that the server at `url` serves, from OpenAI's list of them or Together's bare one."""
        try:
            reply = await self.get(f"{url}/models")
        except Unavailable as error:
            if error.kind not in ("connection", "timeout"):
                raise
            raise Unavailable(
                f"no inference server answers at {url}: start one with python -m cartridges_jax.serve "
                "or change config.client.base_url",
                error.kind,
            ) from error
        models = reply.get("data") if isinstance(reply, dict) else reply
        if not isinstance(models, list):
            raise Refused(f"GET {url}/models gave no list of models: config.client.base_url should end in /v1")
        return [str(model.get("id")) for model in models if isinstance(model, dict)]

    async def check_model(self, url: str, model: str) -> None:
        served = await self.models(url)
        if model not in served:
            raise Refused(
                f"{url} does not serve {model!r}, it serves {', '.join(served) or 'nothing'}: "
                "change config.client.model"
            )

    async def _bytes(self, method: str, url: str, body: dict[str, Any] | None) -> bytes:
        try:
            async with self._session.request(method, url, json=body) as response:
                data = await response.read()
        except TimeoutError as error:
            raise Unavailable(f"{url} gave no answer in {self._timeout:g} s", "timeout") from error
        except aiohttp.ClientPayloadError as error:
            raise Unavailable(f"{url} gave a reply that ends early: {error}", "broken reply") from error
        except aiohttp.InvalidURL as error:
            raise Refused(f"{url} is not a URL") from error
        except aiohttp.ClientError as error:
            raise Unavailable(f"{url} cannot be reached: {error or type(error).__name__}", "connection") from error
        status, retry_after = response.status, response.headers.get("Retry-After")
        if status < 400:
            return data
        problem = f"{method} {url} gave HTTP {status}: {_server_words(data)}"
        if status in (429, 503):
            raise Busy(problem, f"http {status}", _seconds(retry_after))
        if status == 408:
            raise Unavailable(problem, "timeout")
        if status >= 500:
            raise Unavailable(problem, f"http {status}")
        raise Refused(problem)


class HttpClient:
    """What the clients share: a session with the server at `url`, which ends in /v1, and the check that begins it."""

    def __init__(self, config: ClientConfig, url: str):
        self._config = config
        self._url = url.rstrip("/")
        self._root = self._url.removesuffix("/v1")  # where routes live that are not OpenAI's
        self._http = Http(config.timeout_seconds, config.api_key)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.__aexit__()

    async def check(self) -> None:
        await self._http.check_model(self._url, self._config.model)


def parse(data: bytes, url: str) -> Any:
    try:
        return files.parse_json(data, url)
    except UserError as error:
        raise Unavailable(f"{url} gave a reply that is not JSON: {data[:100]!r}", "broken reply") from error


def _server_words(data: bytes) -> str:
    """The message inside an error reply, in OpenAI's shape or another."""
    text = data.decode("utf-8", "replace")
    try:
        reply = json.loads(text)
        error = reply.get("error", reply)
        return str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError, RecursionError):
        return " ".join(text.split())[:300] or "no message"


def _seconds(retry_after: str | None) -> float:
    """From either form that HTTP allows."""
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
